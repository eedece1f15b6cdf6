import { expect, it, vi } from "vitest";
import { parse } from "../src/pixels";
import { ObjectSource, StackSource } from "../src/source";
import { answer, HEADER } from "./pixels";

const frame = (value: number): Int16Array => new Int16Array(6).fill(value);

it("reads what the server sends, whatever the header's length", () => {
  for (const modality of ["CT", "MR ", "a longer one"]) {
    const { header, first, frames } = parse(answer({ ...HEADER, modality, frames: 9 }, [frame(-7), frame(8)], 4));
    expect([header.modality, first, frames.length, frames[0]![0], frames[1]![5]]).toEqual([modality, 4, 2, -7, 8]);
  }
});

it("reads LUTs", () => {
  const luts = [{ first: -2, bits: 12, values: btoa(String.fromCharCode(1, 0, 255, 15)) }];
  const { header } = parse(answer({ ...HEADER, luts }, [frame(0)]));
  expect(Array.from(header.luts[0]!.values)).toEqual([1, 4095]);
});

it("asks for further frames once, a chunk at a time", async () => {
  const header = { ...HEADER, frames: 5 };
  const fetchChunk = vi.fn(async (first: number) => answer(header, first === 4 ? [frame(4)] : [frame(first), frame(first + 1)], first));
  const source = new ObjectSource(parse(answer(header, [frame(0), frame(1)])), fetchChunk);
  expect(source.ready(1)![0]).toBe(1);
  expect(source.ready(3)).toBeNull();
  expect((await Promise.all([source.load(3), source.load(2)])).map((values) => values[0])).toEqual([3, 2]);
  expect((await source.load(4))[0]).toBe(4);
  expect(fetchChunk.mock.calls).toEqual([[2], [4]]);
});

it("asks again for a chunk that did not come", async () => {
  const header = { ...HEADER, frames: 2 };
  let fail = true;
  const source = new ObjectSource(parse(answer(header, [frame(0)])), async (first) => {
    if (fail) throw new Error("away");
    return answer(header, [frame(first)], first);
  });
  await expect(source.load(1)).rejects.toThrow("away");
  fail = false;
  expect((await source.load(1))[0]).toBe(1);
});

it("lets the oldest chunks go past its budget", async () => {
  const header = { ...HEADER, frames: 4 };
  const source = new ObjectSource(parse(answer(header, [frame(0)])), async (first) => answer(header, [frame(first)], first), 24);
  await source.load(1);
  await source.load(2);
  expect([0, 1, 2].map((index) => source.ready(index)?.[0] ?? null)).toEqual([null, 1, 2]);
});

it("scrolls a stack in space, not in the file's order", () => {
  const header = { ...HEADER, frames: 3, slice_order: [2, 0, 1] };
  const source = new ObjectSource(parse(answer(header, [frame(0), frame(1), frame(2)])), async () => new ArrayBuffer(0));
  expect([0, 1, 2].map((position) => source.frameAt(position))).toEqual([2, 0, 1]);
  expect(source.positionOf(0)).toBe(1);
});

it("orders the slices of a series by where they lie", () => {
  const slice = (position_mm: number) => parse(answer({ ...HEADER, stack: { name: "s", position_mm } }, [frame(position_mm)]));
  const source = new StackSource([5, -1, 2].map((height, file) => ({ file, chunk: slice(height) })));
  expect([0, 1, 2].map((index) => source.ready(index)![0])).toEqual([-1, 2, 5]);
  expect([0, 1, 2].map((index) => source.fileOf(index))).toEqual([1, 2, 0]);
  expect([source.header.frames, source.header.slice_spacing_mm]).toEqual([3, 3]);
});
