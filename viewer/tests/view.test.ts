import { expect, it } from "vitest";
import { area, localTime, probability, spacing } from "../src/format";
import { heatColour } from "../src/overlay";
import { fitted, panned, pixelAspect, pixelAt, zoomed } from "../src/view";

const STAGE = { width: 800, height: 600 };
const PICTURE = { width: 100, height: 50 };

it("fits the whole picture with true proportions", () => {
  expect(fitted(PICTURE, 1, STAGE)).toEqual({ scale: 8, x: 0, y: 100 });
  const aspect = pixelAspect([3, 1]); // rows three times as far apart as columns
  expect(fitted(PICTURE, aspect, STAGE)).toEqual({ scale: 4, x: 200, y: 0 });
});

it("keeps the point under the pointer while zooming", () => {
  const view = fitted(PICTURE, 1, STAGE);
  const before = pixelAt(view, 1, PICTURE, 333, 222);
  expect(pixelAt(zoomed(view, 3, 333, 222), 1, PICTURE, 333, 222)).toEqual(before);
});

it("never loses the picture", () => {
  const view = panned(fitted(PICTURE, 1, STAGE), 1e6, -1e6, PICTURE, 1, STAGE);
  expect([view.x, view.y + 50 * view.scale]).toEqual([760, 40]);
});

it("knows the pixel under a point, and none beside the picture", () => {
  const view = { scale: 2, x: 10, y: 20 };
  expect(pixelAt(view, 1, PICTURE, 10, 20)).toEqual([0, 0]);
  expect(pixelAt(view, 1, PICTURE, 209.9, 119.9)).toEqual([49, 99]);
  expect(pixelAt(view, 1, PICTURE, 9.9, 20)).toBeNull();
  expect(pixelAt(view, 1, PICTURE, 210, 20)).toBeNull();
});

it("shows no heat where there is none", () => {
  expect(heatColour(0)[3]).toBe(0);
  expect(heatColour(255)).toEqual([252, 253, 191, 255]);
});

it("writes numbers as people read them", () => {
  expect([0, 0.0001, 0.004, 0.83, 0.997, 0.9999, 1].map(probability)).toEqual(["0.00", "<0.001", "0.004", "0.83", "0.997", ">0.999", "1.00"]);
  expect([3.24, 24.7, 1234].map(area)).toEqual(["3.2 mm²", "25 mm²", "12.3 cm²"]);
  expect(spacing([0.14, 0.14], "imager")).toBe("0.140 × 0.140 mm at the detector");
  expect(spacing(null, "none")).toBe("not known");
  expect(localTime("no time")).toBe("no time");
});
