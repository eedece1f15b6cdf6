// The display chain in the browser; the same formulas as medvision_ray/imaging/display.py, held against it by tests.

import type { Display, Header, LookupTable, Values, Window } from "./pixels";

/** What maps modality values to grey: a window, or the file's own LUT. */
export type Scaling = Window | LookupTable;

const isLut = (scaling: Scaling): scaling is LookupTable => "values" in scaling;

/** A stored value in modality units. */
export function modalityValue(stored: number, display: Display): number {
  return stored * display.slope + display.intercept;
}

/** A stored value's grey in [0, 1]; padding and what is no number is black. */
export function unitValue(stored: number, display: Display, scaling: Scaling, invert = display.invert): number {
  if (display.padding && stored >= display.padding[0] && stored <= display.padding[1]) return 0;
  const value = modalityValue(stored, display);
  const shown = isLut(scaling) ? lookUp(value, scaling) : windowed(value, scaling);
  if (Number.isNaN(shown)) return 0;
  return invert ? 1 - shown : shown;
}

/** DICOM PS3.3 C.11.2.1.2.1 (LINEAR), C.11.2.1.3.1 (SIGMOID), C.11.2.1.3.2 (LINEAR_EXACT). */
export function windowed(value: number, { center, width, function: kind, bounds }: Window): number {
  if (bounds && bounds[1] > bounds[0]) return clamp((value - bounds[0]) / (bounds[1] - bounds[0]));
  if (kind === "SIGMOID") return 1 / (1 + Math.exp((-4 * (value - center)) / width));
  if (kind === "LINEAR_EXACT") {
    if (width <= 0) return Number.isNaN(value) ? NaN : value > center ? 1 : 0;
    return clamp((value - center) / width + 0.5);
  }
  if (width <= 1) return Number.isNaN(value) ? NaN : value > center - 0.5 ? 1 : 0;
  return clamp((value - (center - 0.5)) / (width - 1) + 0.5);
}

function lookUp(value: number, lut: LookupTable): number {
  const index = Math.min(Math.max(rint(Number.isNaN(value) ? 0 : value) - lut.first, 0), lut.values.length - 1);
  return lut.values[index]! / lutTop(lut);
}

/** White of a LUT: its declared depth, or its largest entry where that leaves the leading bit unused. */
function lutTop(lut: LookupTable): number {
  const declared = 2 ** lut.bits - 1;
  const largest = lut.values.reduce((most, value) => Math.max(most, value), 0);
  return largest > Math.floor(declared / 2) ? declared : Math.max(largest, 1);
}

/** To the nearest, halves to even, as numpy rounds. */
function rint(value: number): number {
  const down = Math.floor(value);
  const rest = value - down;
  if (rest !== 0.5) return Math.round(value);
  return down % 2 === 0 ? down : down + 1;
}

const clamp = (value: number): number => (value < 0 ? 0 : value > 1 ? 1 : value); // NaN stays

/** [0, 1] to 8 bits by way of 16, as the scoring does. */
export function to8(unit: number): number {
  return Math.floor((rint(unit * 65535) + 128) / 257);
}

const RANGES = { uint8: [0, 255], int16: [-32768, 32767], uint16: [0, 65535] } as const;

/** Grey of every stored value of an integer type; the first entry belongs to the type's lowest value. */
export function greyTable(type: keyof typeof RANGES, display: Display, scaling: Scaling, invert: boolean): Uint8Array {
  const [lowest, highest] = RANGES[type];
  const unit = isLut(scaling) ? lutUnit(display, scaling, invert) : (stored: number) => unitValue(stored, display, scaling, invert);
  const table = new Uint8Array(highest - lowest + 1);
  for (let stored = lowest; stored <= highest; stored++) table[stored - lowest] = to8(unit(stored));
  return table;
}

/** `unitValue` with a LUT whose white is looked for once, not once a value. */
function lutUnit(display: Display, lut: LookupTable, invert: boolean): (stored: number) => number {
  const last = lut.values.length - 1;
  const white = lutTop(lut);
  return (stored) => {
    if (display.padding && stored >= display.padding[0] && stored <= display.padding[1]) return 0;
    const index = Math.min(Math.max(rint(modalityValue(stored, display)) - lut.first, 0), last);
    const shown = lut.values[index]! / white;
    return invert ? 1 - shown : shown;
  };
}

/**
 * A frame as RGBA, every `stride`th pixel of every `stride`th row.
 *
 * Colour is windowed channel by channel on its 0 to 255, which is brightness and contrast.
 */
export function paint(values: Values, header: Header, display: Display, scaling: Scaling, invert: boolean, stride = 1): ImageData {
  const width = Math.ceil(header.width / stride);
  const height = Math.ceil(header.height / stride);
  const picture = new ImageData(width, height);
  const out = new Uint32Array(picture.data.buffer);
  if (header.type === "rgb8") paintColour(values, header, greyTable("uint8", display, scaling, invert), stride, out);
  else if (header.type === "float32") {
    sample(header, stride, (from, to) => (out[to] = grey(to8(unitValue(values[from]!, display, scaling, invert)))));
  } else {
    const table = greyTable(header.type, display, scaling, invert);
    const lowest = RANGES[header.type][0];
    const shades = Uint32Array.from(table, grey);
    if (stride === 1) for (let place = 0; place < values.length; place++) out[place] = shades[values[place]! - lowest]!;
    else paintShades(values, header, shades, lowest, stride, out);
  }
  return picture;
}

/** Written out: this is what a drag over a large picture waits for. */
function paintShades(values: Values, header: Header, shades: Uint32Array, lowest: number, stride: number, out: Uint32Array): void {
  const { width, height } = header;
  let to = 0;
  for (let row = 0; row < height; row += stride) {
    const end = (row + 1) * width;
    for (let from = row * width; from < end; from += stride) out[to++] = shades[values[from]! - lowest]!;
  }
}

const grey = (value: number): number => (0xff000000 | (value << 16) | (value << 8) | value) >>> 0;

function paintColour(values: Values, header: Header, table: Uint8Array, stride: number, out: Uint32Array): void {
  sample(header, stride, (from, to) => {
    const [red, green, blue] = [table[values[3 * from]!]!, table[values[3 * from + 1]!]!, table[values[3 * from + 2]!]!];
    out[to] = (0xff000000 | (blue << 16) | (green << 8) | red) >>> 0;
  });
}

function sample(header: Header, stride: number, take: (from: number, to: number) => void): void {
  let to = 0;
  for (let row = 0; row < header.height; row += stride) {
    const start = row * header.width;
    for (let column = 0; column < header.width; column += stride) take(start + column, to++);
  }
}

/** Windows that radiologists know by name, in HU. */
export const PRESETS: [name: string, center: number, width: number][] = [
  ["Soft tissue", 40, 400],
  ["Lung", -600, 1500],
  ["Bone", 480, 2500],
  ["Brain", 40, 80],
  ["Liver", 60, 160],
];

/** A window from the values of a frame: its 0.5th to 99.5th percentile, padding left out. */
export function autoWindow(values: Values, display: Display): Window {
  const step = Math.max(1, Math.floor(values.length / 65536));
  const found: number[] = [];
  for (let place = 0; place < values.length; place += step) {
    const stored = values[place]!;
    if (display.padding && stored >= display.padding[0] && stored <= display.padding[1]) continue;
    const value = modalityValue(stored, display);
    if (Number.isFinite(value)) found.push(value);
  }
  if (!found.length) return { center: 0, width: 1, function: "LINEAR_EXACT" };
  found.sort((one, other) => one - other);
  const at = (share: number) => found[Math.min(found.length - 1, Math.floor(share * found.length))]!;
  const [low, high] = [at(0.005), at(0.995)];
  return { center: (low + high) / 2, width: Math.max(high - low, 1e-6), function: "LINEAR_EXACT" };
}
