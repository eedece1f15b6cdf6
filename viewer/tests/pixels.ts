// ImageData outside a browser, and an answer of the server made by hand.

import type { Header } from "../src/pixels";

if (!("ImageData" in globalThis)) {
  (globalThis as Record<string, unknown>).ImageData = class {
    readonly data: Uint8ClampedArray;
    constructor(
      readonly width: number,
      readonly height: number,
    ) {
      this.data = new Uint8ClampedArray(4 * width * height);
    }
  };
}

export const HEADER: Header = {
  height: 2,
  width: 3,
  frames: 1,
  type: "int16",
  format: "dicom",
  modality: "CT",
  unit: "HU",
  spacing_mm: [1, 1],
  spacing_source: "pixel_spacing",
  slice_spacing_mm: null,
  slice_order: [],
  edges: null,
  stack: null,
  may_contain_text: false,
  displays: [
    { slope: 1, intercept: 0, invert: false, padding: null, window: { center: 40, width: 400, function: "LINEAR" }, lut: null },
  ],
  luts: [],
};

/** What the server would send. */
export function answer(header: object, frames: ArrayBufferView[], first = 0): ArrayBuffer {
  let text = JSON.stringify({ ...header, first, count: frames.length });
  text += " ".repeat((8 - ((4 + text.length) % 8)) % 8);
  const size = frames.reduce((sum, frame) => sum + frame.byteLength, 0);
  const out = new Uint8Array(4 + text.length + size);
  new DataView(out.buffer).setUint32(0, text.length, true);
  out.set(new TextEncoder().encode(text), 4);
  let place = 4 + text.length;
  for (const frame of frames) {
    out.set(new Uint8Array(frame.buffer, frame.byteOffset, frame.byteLength), place);
    place += frame.byteLength;
  }
  return out.buffer;
}
