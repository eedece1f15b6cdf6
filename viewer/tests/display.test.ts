import { describe, expect, it } from "vitest";
import { autoWindow, greyTable, paint, to8, unitValue, windowed } from "../src/display";
import type { Display, Window } from "../src/pixels";
import { HEADER } from "./pixels";

const DISPLAY: Display = HEADER.displays[0]!;
const window = (center: number, width: number, kind: Window["function"] = "LINEAR"): Window => ({ center, width, function: kind });

describe("windows, by the standard's formulas (PS3.3 C.11.2.1.2.1)", () => {
  it("LINEAR: black at c - 0.5 - (w - 1) / 2, white at c - 0.5 + (w - 1) / 2", () => {
    expect(windowed(-160, window(40, 400))).toBe(0);
    expect(windowed(239, window(40, 400))).toBe(1);
    expect(windowed(39.5, window(40, 400))).toBe(0.5);
  });

  it("LINEAR_EXACT: the centre is the middle", () => {
    expect(windowed(40, window(40, 400, "LINEAR_EXACT"))).toBe(0.5);
    expect(windowed(240, window(40, 400, "LINEAR_EXACT"))).toBe(1);
  });

  it("SIGMOID never ends", () => {
    expect(windowed(40, window(40, 400, "SIGMOID"))).toBe(0.5);
    expect(windowed(240, window(40, 400, "SIGMOID"))).toBeCloseTo(1 / (1 + Math.exp(-2)), 12);
  });

  it("a width of 1 is a step", () => {
    expect([39, 40].map((value) => windowed(value, window(40, 1)))).toEqual([0, 1]);
    expect([40, 41].map((value) => windowed(value, window(40, 0, "LINEAR_EXACT")))).toEqual([0, 1]);
  });

  it("what is no number is black, also inverted", () => {
    expect(unitValue(NaN, DISPLAY, window(0, 0, "LINEAR_EXACT"))).toBe(0);
    expect(unitValue(NaN, DISPLAY, window(40, 400), true)).toBe(0);
  });
});

describe("from stored values to the screen", () => {
  it("rescales, windows, inverts last, and keeps padding black", () => {
    const display: Display = { ...DISPLAY, slope: 2, intercept: -1000, invert: true, padding: [-5, -1] };
    const table = greyTable("int16", display, window(40, 400), true);
    expect(table[32768 + 400]).toBe(255); // -200 HU is black, inverted white
    expect(table[32768 + 700]).toBe(0);
    expect(table[32768 - 3]).toBe(0);
  });

  it("a LUT wins, holds its ends, and takes the largest entry for white where the leading bit is unused", () => {
    const lut = { first: 100, bits: 16, values: Uint16Array.of(0, 1000, 2000) };
    const shades = [0, 100, 101, 102, 500].map((stored) => to8(unitValue(stored, DISPLAY, lut)));
    expect(shades).toEqual([0, 0, 128, 255, 255]);
  });

  it("goes to 8 bits by way of 16, as scoring does", () => {
    expect([0, 0.5, 1, 1 / 3].map(to8)).toEqual([0, 128, 255, 85]);
  });

  it("paints every pixel, or every other one of every other row", () => {
    const values = Int16Array.of(-160, 239, 39, 239, -160, 239);
    const whole = paint(values, HEADER, DISPLAY, window(40, 400), false);
    expect(Array.from(whole.data.filter((_, index) => index % 4 === 0))).toEqual([0, 255, 127, 255, 0, 255]);
    const coarse = paint(values, HEADER, DISPLAY, window(40, 400), false, 2);
    expect([coarse.width, coarse.height, coarse.data[0], coarse.data[4]]).toEqual([2, 1, 0, 127]);
  });

  it("windows colour channel by channel", () => {
    const header = { ...HEADER, type: "rgb8" as const, width: 1, height: 1 };
    const picture = paint(Uint8Array.of(0, 128, 255), header, DISPLAY, window(127.5, 255, "LINEAR_EXACT"), false);
    expect(Array.from(picture.data)).toEqual([0, 128, 255, 255]);
  });
});

it("an automatic window leaves padding and outliers out", () => {
  const values = new Float32Array(1000).map((_, index) => index);
  values[999] = 1e9;
  values.fill(-3000, 0, 300);
  const { center, width } = autoWindow(values, { ...DISPLAY, padding: [-3000, -3000] });
  expect([center - width / 2, center + width / 2]).toEqual([303, 996]);
});
