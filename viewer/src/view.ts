// Where the picture lies on the screen: zoom and pan as a plain value, in CSS pixels.

export interface Size {
  width: number;
  height: number;
}

/** `scaleX` and `scaleY` differ where pixels are not square; `x`, `y` is the picture's top left corner. */
export interface View {
  scale: number;
  x: number;
  y: number;
}

const LEAST = 0.02;
const MOST = 60;

/** How much higher than wide a pixel is. */
export function pixelAspect(spacing: [number, number] | null): number {
  return spacing && spacing[1] > 0 ? spacing[0] / spacing[1] : 1;
}

/** The whole picture, centred. */
export function fitted(picture: Size, aspect: number, stage: Size): View {
  return centred(picture, aspect, stage, Math.min(stage.width / picture.width, stage.height / (picture.height * aspect)));
}

/** The picture at a scale, centred. */
export function centred(picture: Size, aspect: number, stage: Size, scale: number): View {
  return { scale, x: (stage.width - picture.width * scale) / 2, y: (stage.height - picture.height * aspect * scale) / 2 };
}

/** Zoomed by a factor; the point under the pointer stays. */
export function zoomed(view: View, factor: number, x: number, y: number): View {
  const scale = Math.min(Math.max(view.scale * factor, LEAST), MOST);
  const real = scale / view.scale;
  return { scale, x: x - (x - view.x) * real, y: y - (y - view.y) * real };
}

/** Moved, but never so far that nothing of the picture is left on the stage. */
export function panned(view: View, dx: number, dy: number, picture: Size, aspect: number, stage: Size): View {
  const margin = 40;
  const keep = (at: number, length: number, room: number) => Math.min(Math.max(at, margin - length), room - margin);
  return {
    scale: view.scale,
    x: keep(view.x + dx, picture.width * view.scale, stage.width),
    y: keep(view.y + dy, picture.height * aspect * view.scale, stage.height),
  };
}

/** Row and column of the pixel under a point of the stage; null beside the picture. */
export function pixelAt(view: View, aspect: number, picture: Size, x: number, y: number): [row: number, column: number] | null {
  const column = Math.floor((x - view.x) / view.scale);
  const row = Math.floor((y - view.y) / (view.scale * aspect));
  return row >= 0 && column >= 0 && row < picture.height && column < picture.width ? [row, column] : null;
}
