// Where the frames of what is on the stage come from: one object in chunks, or the slices of a series, one file each.

import { displayOf, parse, type Chunk, type Display, type Header, type Values } from "./pixels";

const KEPT_BYTES = 512 * 2 ** 20;

/** A picture of one frame or many. */
export interface Source {
  readonly header: Header;
  readonly count: number;
  /** Frames in the order of scrolling: of a stack from the lowest slice to the highest. */
  frameAt(position: number): number;
  positionOf(frame: number): number;
  display(frame: number): Display;
  /** The frame if it is here already. */
  ready(frame: number): Values | null;
  load(frame: number): Promise<Values>;
  /** The index, among this source's files, of the one that holds a frame. */
  fileOf(frame: number): number;
}

/** One object; frames come in chunks as they are looked at, and the oldest chunks go when they are many. */
export class ObjectSource implements Source {
  readonly header: Header;
  private readonly chunks = new Map<number, Promise<Values[]>>();
  private readonly here = new Map<number, Values[]>();
  private readonly size: number;
  private readonly bytes: number;

  constructor(
    first: Chunk,
    private readonly fetchChunk: (first: number) => Promise<ArrayBuffer>,
    private readonly keptBytes = KEPT_BYTES,
  ) {
    this.header = first.header;
    this.size = first.frames.length;
    this.bytes = first.frames.reduce((sum, frame) => sum + frame.byteLength, 0);
    this.keep(0, Promise.resolve(first.frames));
    this.here.set(0, first.frames);
  }

  get count(): number {
    return this.header.frames;
  }

  private get order(): number[] | null {
    return this.header.slice_order.length === this.count ? this.header.slice_order : null;
  }

  frameAt(position: number): number {
    return this.order ? this.order[position]! : position;
  }

  positionOf(frame: number): number {
    return this.order ? this.order.indexOf(frame) : frame;
  }

  display(frame: number): Display {
    return displayOf(this.header, frame);
  }

  ready(frame: number): Values | null {
    return this.here.get(Math.floor(frame / this.size))?.[frame % this.size] ?? null;
  }

  async load(frame: number): Promise<Values> {
    const index = Math.floor(frame / this.size);
    const frames = await (this.chunks.get(index) ?? this.fetched(index));
    return frames[frame % this.size]!;
  }

  fileOf(): number {
    return 0;
  }

  private fetched(index: number): Promise<Values[]> {
    const coming = this.fetchChunk(index * this.size).then((answer) => parse(answer).frames);
    this.keep(index, coming);
    coming.then(
      (frames) => this.chunks.get(index) === coming && this.here.set(index, frames),
      () => this.chunks.delete(index), // asked again when it is looked at again
    );
    return coming;
  }

  private keep(index: number, frames: Promise<Values[]>): void {
    this.chunks.set(index, frames);
    while (this.chunks.size > 1 && this.chunks.size * this.bytes > this.keptBytes) {
      const oldest = this.chunks.keys().next().value!;
      this.chunks.delete(oldest);
      this.here.delete(oldest);
    }
  }
}

/** Slices of one series, each in its own file, ordered by where they lie. */
export class StackSource implements Source {
  readonly header: Header;
  readonly files: number[];
  private readonly slices: Chunk[];

  /** `slices`: decoded single slices that share a stack name, with the number of the file that each is from. */
  constructor(slices: { file: number; chunk: Chunk }[]) {
    const sorted = [...slices].sort((one, other) => height(one.chunk) - height(other.chunk));
    this.files = sorted.map((slice) => slice.file);
    this.slices = sorted.map((slice) => slice.chunk);
    const steps = this.slices.slice(1).map((slice, index) => height(slice) - height(this.slices[index]!));
    const median = [...steps].sort((one, other) => one - other)[Math.floor(steps.length / 2)] ?? null;
    this.header = { ...this.slices[0]!.header, frames: slices.length, slice_spacing_mm: median };
  }

  get count(): number {
    return this.slices.length;
  }

  frameAt(position: number): number {
    return position;
  }

  positionOf(frame: number): number {
    return frame;
  }

  display(frame: number): Display {
    return displayOf(this.slices[frame]!.header, 0);
  }

  ready(frame: number): Values | null {
    return this.slices[frame]?.frames[0] ?? null;
  }

  load(frame: number): Promise<Values> {
    return Promise.resolve(this.slices[frame]!.frames[0]!);
  }

  fileOf(frame: number): number {
    return this.files[frame]!;
  }
}

const height = (chunk: Chunk): number => chunk.header.stack?.position_mm ?? 0;
