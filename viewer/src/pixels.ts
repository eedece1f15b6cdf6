// The server's pixel answer: a JSON header and the stored values of some frames (see serving/pixel_format.py).

export type VoiFunction = "LINEAR" | "LINEAR_EXACT" | "SIGMOID";

/** In modality units, such as HU. */
export interface Window {
  center: number;
  width: number;
  function: VoiFunction;
  /** Values that become black and white, where the window was made of them. */
  bounds?: [low: number, high: number];
}

/** From stored values to the screen, as the file says. */
export interface Display {
  slope: number;
  intercept: number;
  invert: boolean;
  padding: [number, number] | null;
  window: Window;
  lut: number | null;
}

export interface LookupTable {
  first: number;
  bits: number;
  values: Uint16Array;
}

export type Letters = Record<"left" | "right" | "top" | "bottom", string>;

export interface Header {
  height: number;
  width: number;
  frames: number;
  type: "uint8" | "int16" | "uint16" | "float32" | "rgb8";
  format: string;
  modality: string;
  unit: string;
  spacing_mm: [number, number] | null;
  spacing_source: string;
  slice_spacing_mm: number | null;
  slice_order: number[];
  edges: Letters | null;
  stack: { name: string; position_mm: number } | null;
  may_contain_text: boolean;
  displays: Display[];
  luts: LookupTable[];
}

export type Values = Uint8Array | Int16Array | Uint16Array | Float32Array;

export interface Chunk {
  header: Header;
  first: number;
  frames: Values[];
}

const KINDS = { uint8: Uint8Array, rgb8: Uint8Array, int16: Int16Array, uint16: Uint16Array, float32: Float32Array };

/** Read an answer; the frames are views of its bytes. Every browser that is still made is little-endian. */
export function parse(answer: ArrayBuffer): Chunk {
  const length = new DataView(answer).getUint32(0, true);
  const text = new TextDecoder().decode(new Uint8Array(answer, 4, length));
  const raw = JSON.parse(text) as Header & { first: number; count: number; luts: { first: number; bits: number; values: string }[] };
  const header: Header = { ...raw, luts: raw.luts.map((lut) => ({ ...lut, values: decodeLut(lut.values as unknown as string) })) };
  const samples = header.height * header.width * (header.type === "rgb8" ? 3 : 1);
  const Kind = KINDS[header.type];
  const frames = Array.from(
    { length: raw.count },
    (_, index) => new Kind(answer, 4 + length + index * samples * Kind.BYTES_PER_ELEMENT, samples),
  );
  return { header, first: raw.first, frames };
}

function decodeLut(text: string): Uint16Array {
  const bytes = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

/** The display chain of one frame. */
export function displayOf(header: Header, frame: number): Display {
  return (header.displays[frame] ?? header.displays[0])!;
}
