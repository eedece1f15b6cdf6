// The panel beside the picture: label, classes as bars with their operating points, mask, facts of the image.

import { Problem, type ClassResult, type FrameResult, type MaskResult, type OperatingPoint, type Result } from "./api";
import { fill, h } from "./dom";
import { area, modality, probability, share, spacing } from "./format";
import type { Header } from "./pixels";

/** What stands where a result will be. */
export function waiting(panel: HTMLElement, text: string): void {
  fill(panel, h("div", { class: "card muted busy" }, text));
}

export function problemCard(panel: HTMLElement, title: string, problem: unknown, retry?: () => void): void {
  const { code, detail } = wordsOf(problem);
  fill(
    panel,
    h(
      "div",
      { class: "card problem", role: "alert" },
      h("h2", {}, title),
      h("p", {}, detail),
      code && h("p", {}, h("code", {}, code)),
      retry && h("button", { onclick: retry }, "Try again"),
    ),
  );
}

export function wordsOf(problem: unknown): { code: string; detail: string } {
  if (problem instanceof Problem) return { code: problem.code, detail: problem.detail };
  return { code: "page_error", detail: "The page could not work with the server's answer." };
}

/** Show a result; `frame` is that of the frame on the stage, of a picture that has many. */
export function showResult(panel: HTMLElement, result: Result, frame: FrameResult | null, when: string | null = null): void {
  const label = labelText(result.predicted_label);
  const calibrated = result.classes.some((item) => typeof item.calibrated_probability === "number");
  fill(
    panel,
    h(
      "section",
      { class: "card", "aria-label": "Classification" },
      h("p", { class: "over" }, result.frames.length > 1 ? "Model output, all frames" : "Model output"),
      result.classes.length > 0 && h("h2", { class: "label" }, label),
      h("div", { class: "bars", role: "list" }, ...sorted(result.classes).map(bar)),
      result.classes.length > 0 && legend(result, calibrated),
      frame?.predicted_label != null &&
        result.frames.length > 1 &&
        h("p", { class: "frame" }, "This frame: ", h("b", {}, labelText(frame.predicted_label)), ` ${optional(frame.predicted_probability)}`),
    ),
    maskCard(result, frame),
    h(
      "p",
      { class: "fine" },
      "Model ",
      h("code", {}, result.model_id),
      result.preprocess_id ? h("span", { title: "Preprocessing" }, " · preprocessing ", h("code", {}, result.preprocess_id)) : null,
      when && ` · scored ${when}`,
    ),
  );
}

function labelText(label: string | null): string {
  if (label === null) return "No classification";
  return label === "" ? "No finding over its operating point" : label.split("|").join(", ");
}

const optional = (value: number | null): string => (value === null ? "" : probability(value));
const shown = (item: ClassResult): number => item.calibrated_probability ?? item.probability;
const sorted = (classes: ClassResult[]): ClassResult[] => [...classes].sort((one, other) => shown(other) - shown(one));

/** One class: name, number, and a bar on which the operating points are marked. */
function bar(item: ClassResult): HTMLElement {
  const value = shown(item);
  const points = item.operating_points ?? [];
  const positive = points.some((point) => point.positive);
  const fillBar = h("div", { class: "fill" });
  fillBar.style.width = `${value * 100}%`;
  return h(
    "div",
    { class: `bar${positive ? " positive" : ""}${points.length ? "" : " bare"}`, role: "listitem", "aria-label": spoken(item, value) },
    h("span", { class: "name" }, item.name),
    points.length > 0 && h("span", { class: "verdict" }, positive ? "▲ over" : "under"),
    h("span", { class: "number", title: rawText(item) }, probability(value)),
    h("div", { class: "track", "aria-hidden": "true" }, fillBar, ...points.map(tick)),
  );
}

function tick(point: OperatingPoint): HTMLElement {
  const mark = h("i", { class: "tick", title: `${point.name}: ${probability(point.threshold)}` });
  mark.style.left = `${point.threshold * 100}%`;
  return mark;
}

function spoken(item: ClassResult, value: number): string {
  const points = (item.operating_points ?? []).map(
    (point) => `, ${point.positive ? "over" : "under"} the operating point ${point.name} at ${probability(point.threshold)}`,
  );
  return `${item.name}: ${probability(value)}${points.join("")}`;
}

const rawText = (item: ClassResult): string | null =>
  typeof item.calibrated_probability === "number" ? `Calibrated; raw ${probability(item.probability)}` : null;

function legend(result: Result, calibrated: boolean): HTMLElement {
  const names = [...new Set(result.classes.flatMap((item) => (item.operating_points ?? []).map((point) => point.name)))];
  return h(
    "p",
    { class: "fine" },
    calibrated ? "Calibrated probability" : "Probability as the model gives it, not calibrated",
    names.length > 0 && " · ",
    names.length > 0 && h("i", { class: "tick inline", "aria-hidden": "true" }),
    names.length > 0 && ` operating point: ${names.join("; ")}`,
  );
}

function maskCard(result: Result, frame: FrameResult | null): HTMLElement | null {
  const mask = result.frames.length > 1 ? (frame?.mask ?? null) : result.mask;
  if (!result.mask && !mask) return null;
  const where = result.frames.length > 1 ? "Mask on this frame" : "Mask";
  return h("section", { class: "card", "aria-label": "Mask" }, h("h3", {}, where), list(maskFacts(mask, result.mask)));
}

function maskFacts(mask: MaskResult | null, whole: MaskResult | null): [string, string][] {
  if (!mask || !mask.box) return [["Area", whole?.box && whole !== mask ? "none on this frame" : "nothing marked"]];
  const [top, left, bottom, right] = mask.box;
  const facts: [string, string][] = [
    ["Area", mask.area_mm2 === null ? "not known in mm² (no true spacing)" : area(mask.area_mm2)],
    ["Share", `${share(mask.fraction)} of the frame`],
    ["Box", `rows ${top}–${bottom - 1}, columns ${left}–${right - 1}`],
  ];
  if (mask.contours === null) facts.push(["Outline", "not saved by this run"]);
  return facts;
}

/** What the file says of itself. */
export function showFacts(panel: HTMLElement, header: Header, count: number): void {
  const facts: [string, string][] = [
    ["Modality", header.modality === "OT" ? "not named by the file" : modality(header.modality)],
    ["Format", header.format.toUpperCase()],
    ["Size", `${header.width} × ${header.height}${count > 1 ? ` × ${count}` : ""}`],
    ["Stored as", header.type === "rgb8" ? "8-bit RGB" : header.type],
    ["Pixel spacing", spacing(header.spacing_mm, header.spacing_source)],
  ];
  if (header.slice_spacing_mm !== null) facts.push(["Slice spacing", `${header.slice_spacing_mm.toPrecision(3)} mm`]);
  fill(
    panel,
    h("section", { class: "card", "aria-label": "Image" }, h("h3", {}, "Image"), list(facts)),
    header.may_contain_text && h("p", { class: "fine" }, "Pictures of this kind can have letters burned into them, a name among others."),
  );
}

export function list(facts: [string, string | Node][]): HTMLElement {
  return h("dl", {}, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}
