// What is drawn over the picture: the mask's outline and area, and the explanation's heat.

import type { Point } from "./api";
import type { View } from "./view";

/** Orange of Okabe and Ito's palette, told apart with every common colour vision; on a dark line, over any grey. */
export const MASK = "230, 159, 0";

/** Outlines as a path in CSS pixels; a contour runs through the centres of its pixels. */
export function outline(contours: Point[][], view: View, aspect: number): Path2D {
  const path = new Path2D();
  for (const line of contours) {
    line.forEach(([row, column], index) => {
      const x = view.x + (column + 0.5) * view.scale;
      const y = view.y + (row + 0.5) * view.scale * aspect;
      if (index === 0) path.moveTo(x, y);
      else path.lineTo(x, y);
    });
    path.closePath();
  }
  return path;
}

/** Draw a mask: its area by `opacity`, its outline always. */
export function drawMask(context: CanvasRenderingContext2D, contours: Point[][], view: View, aspect: number, opacity: number): void {
  if (!contours.length) return;
  const path = outline(contours, view, aspect);
  context.save();
  context.fillStyle = `rgba(${MASK}, ${opacity})`;
  context.fill(path, "evenodd");
  context.lineJoin = "round";
  context.strokeStyle = "rgba(0, 0, 0, 0.65)";
  context.lineWidth = 3.5;
  context.stroke(path);
  context.strokeStyle = `rgb(${MASK})`;
  context.lineWidth = 1.75;
  context.stroke(path);
  context.restore();
}

/** Heat as a picture of colour and transparency: little is clear, much is bright (stops of matplotlib's magma). */
export async function heatPicture(png: string): Promise<HTMLCanvasElement> {
  const image = new Image();
  image.src = `data:image/png;base64,${png}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true })!;
  context.drawImage(image, 0, 0);
  const picture = context.getImageData(0, 0, canvas.width, canvas.height);
  if (isGrey(picture.data)) {
    colour(picture.data);
    context.putImageData(picture, 0, 0);
  }
  return canvas;
}

function isGrey(data: Uint8ClampedArray): boolean {
  for (let place = 0; place < data.length; place += 4) {
    if (data[place] !== data[place + 1] || data[place] !== data[place + 2] || data[place + 3] !== 255) return false;
  }
  return true;
}

const STOPS: [number, number, number][] = [
  [0, 0, 4],
  [81, 18, 124],
  [183, 55, 121],
  [252, 137, 97],
  [252, 253, 191],
];

/** Colour and alpha of a heat of 0 to 255. */
export function heatColour(heat: number): [number, number, number, number] {
  const place = (heat / 255) * (STOPS.length - 1);
  const index = Math.min(Math.floor(place), STOPS.length - 2);
  const share = place - index;
  const [from, to] = [STOPS[index]!, STOPS[index + 1]!];
  const mix = (channel: 0 | 1 | 2) => Math.round(from[channel] + (to[channel] - from[channel]) * share);
  return [mix(0), mix(1), mix(2), Math.round(255 * Math.min(1, heat / 160))];
}

function colour(data: Uint8ClampedArray): void {
  const table = Array.from({ length: 256 }, (_, heat) => heatColour(heat));
  for (let place = 0; place < data.length; place += 4) data.set(table[data[place]!]!, place);
}
