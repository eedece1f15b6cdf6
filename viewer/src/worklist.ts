// The worklist: rows of the last nights, filtered, sorted, paged.

import type { Api, Choices, Run, WorklistRow } from "./api";
import { fill, h } from "./dom";
import { area, localTime, modality, plural, probability } from "./format";
import { wordsOf } from "./results";

const PAGE = 50;
const NIGHTS = 30;

export class Worklist {
  private table: "predictions" | "failures" = "predictions";
  private filters = { run_key: "", label: "", modality: "", model_id: "", min_probability: "", max_probability: "", order: "newest", error_code: "" };
  private offset = 0;
  private total = 0;
  private choices: Choices | null = null;
  private asked: AbortController | null = null;
  rows: WorklistRow[] = [];
  private readonly controls = h("div", { class: "filters", role: "search", "aria-label": "Filters" });
  private readonly body = h("div", { class: "rows" });
  private readonly pager = h("nav", { class: "pager", "aria-label": "Pages of the list" });

  constructor(
    root: HTMLElement,
    private readonly api: Api,
    private readonly open: (row: WorklistRow) => void,
    private readonly say: (text: string) => void,
  ) {
    fill(root, this.controls, this.body, this.pager);
  }

  /** Called whenever the tab is shown: what there is to choose from may have grown. */
  async refresh(): Promise<void> {
    if (!this.choices) fill(this.body, h("p", { class: "empty busy" }, "Reading the tables"));
    try {
      this.choices = await this.api.choices(NIGHTS);
    } catch (problem) {
      return this.fail(problem);
    }
    this.showControls();
    await this.load();
  }

  async load(): Promise<void> {
    this.asked?.abort();
    const asked = new AbortController();
    this.asked = asked;
    this.body.setAttribute("aria-busy", "true");
    try {
      const found = await this.api.worklist(this.query(), asked.signal);
      this.rows = found.rows;
      this.total = found.total;
    } catch (problem) {
      if (!asked.signal.aborted) this.fail(problem);
      return;
    } finally {
      if (this.asked === asked) this.body.removeAttribute("aria-busy");
    }
    this.showRows();
    this.showPager();
    this.say(`${plural(this.total, this.table === "failures" ? "failure" : "image")}`);
  }

  private query(): URLSearchParams {
    const query = new URLSearchParams({ table: this.table, nights: String(NIGHTS), offset: String(this.offset), limit: String(PAGE) });
    const used = this.table === "failures" ? ["run_key", "model_id", "error_code"] : ["run_key", "model_id", "label", "modality", "min_probability", "max_probability", "order"];
    for (const [name, value] of Object.entries(this.filters)) if (value !== "" && used.includes(name)) query.set(name, value);
    return query;
  }

  private fail(problem: unknown): void {
    const { code, detail } = wordsOf(problem);
    const none = code === "no_tables";
    fill(
      this.body,
      h(
        "div",
        { class: "empty", role: none ? null : "alert" },
        h("h2", {}, none ? "No tables" : "The worklist cannot be read"),
        h("p", {}, none ? "This server was started without the output of a scoring job, so there is nothing to list." : detail),
        !none && h("p", {}, h("code", {}, code)),
        !none && h("button", { onclick: () => void this.refresh() }, "Try again"),
      ),
    );
    fill(this.pager);
  }

  private showControls(): void {
    const { runs, labels, modalities, models, error_codes } = this.choices!;
    const failures = this.table === "failures";
    const kind = (value: "predictions" | "failures", text: string): HTMLElement =>
      h("button", { "aria-pressed": String(this.table === value), onclick: () => this.switchTo(value) }, text);
    fill(
      this.controls,
      h("div", { class: "segments", role: "group", "aria-label": "Table" }, kind("predictions", "Predictions"), kind("failures", "Failures")),
      this.select("run_key", "Night", [["", `Last ${NIGHTS} days`], ...runs.map((run): [string, string] => [run.run_key, runText(run)])]),
      !failures && this.select("label", "Class", [["", "All"], ...labels.map((name): [string, string] => [name, name])]),
      !failures && this.range(),
      !failures && this.select("modality", "Modality", [["", "All"], ...modalities.map((name): [string, string] => [name, modality(name)])]),
      failures && this.select("error_code", "Reason", [["", "All"], ...error_codes.map((name): [string, string] => [name, name])]),
      models.length > 1 && this.select("model_id", "Model", [["", "All"], ...models.map((name): [string, string] => [name, name])]),
      !failures &&
        this.select("order", "Order", [
          ["newest", "Newest first"],
          ["probability", "Most certain first"],
          ["uncertain", "Least certain first"],
        ]),
    );
  }

  private switchTo(table: "predictions" | "failures"): void {
    if (this.table === table) return;
    this.table = table;
    this.offset = 0;
    this.showControls();
    this.controls.querySelector<HTMLElement>('[aria-pressed="true"]')!.focus();
    void this.load();
  }

  private change(name: keyof Worklist["filters"], value: string): void {
    this.filters[name] = value;
    this.offset = 0;
    void this.load();
  }

  private select(name: keyof Worklist["filters"], label: string, options: [string, string][]): HTMLElement {
    const select = h("select", { id: `filter-${name}`, onchange: () => this.change(name, select.value) });
    for (const [value, text] of options) select.append(h("option", { value }, text));
    if (!options.some(([value]) => value === this.filters[name])) this.filters[name] = options[0]![0];
    select.value = this.filters[name];
    return h("label", {}, label, select);
  }

  private range(): HTMLElement {
    const field = (name: "min_probability" | "max_probability", label: string, hint: string): HTMLElement => {
      const input = h("input", {
        type: "number", min: 0, max: 1, step: 0.05, placeholder: hint, "aria-label": label, id: `filter-${name}`,
        onchange: () => input.checkValidity() && this.change(name, input.value),
      });
      input.value = this.filters[name];
      return input;
    };
    return h(
      "div",
      { class: "field", role: "group", "aria-label": "Probability" },
      h("span", {}, "Probability"),
      h("span", { class: "pair" }, field("min_probability", "Least probability", "0"), "–", field("max_probability", "Largest probability", "1")),
    );
  }

  private showRows(): void {
    if (!this.rows.length) {
      const text = this.table === "failures" ? "No object failed here." : "No image fits these filters.";
      return fill(this.body, h("div", { class: "empty" }, h("p", {}, text)));
    }
    fill(this.body, this.table === "failures" ? this.failureTable() : this.predictionTable());
  }

  private predictionTable(): HTMLElement {
    const label = this.filters.label;
    const head = ["Scored", "Modality", "Result", label ? `Probability of ${label}` : "Probability", "Mask area", "Frames", "Image"];
    return this.grid("Predictions", head, (row) => [
      h("td", { class: "time" }, localTime(row.scored_at ?? "")),
      h("td", {}, modality(row.modality ?? "")),
      h("td", { class: "strong" }, (row.predicted_label ?? "").split("|").join(", ") || (row.predicted_label === "" ? "no finding" : "–")),
      h("td", { class: "number" }, meter(row.probability ?? null)),
      h("td", { class: "number" }, maskText(row)),
      h("td", { class: "number" }, row.frames ?? ""),
      h("td", { class: "id" }, shortId(row.image_id)),
    ]);
  }

  private failureTable(): HTMLElement {
    return this.grid("Failures", ["Failed", "Step", "Reason", "What was found", "Tries", "Image"], (row) => [
      h("td", { class: "time" }, localTime(row.failed_at ?? "")),
      h("td", {}, row.stage ?? ""),
      h("td", {}, h("code", {}, row.error_code ?? "")),
      h("td", { class: "sentence" }, row.error ?? ""),
      h("td", { class: "number" }, row.attempts ?? ""),
      h("td", { class: "id" }, shortId(row.image_id)),
    ]);
  }

  private grid(caption: string, head: string[], cells: (row: WorklistRow) => HTMLTableCellElement[]): HTMLElement {
    const lines = this.rows.map((row) => {
      const content = cells(row);
      const first = content[0]!;
      const link = h("button", { class: "rowlink", "aria-label": `Open image ${shortId(row.image_id)}, ${first.textContent}` }, first.textContent);
      fill(first, link);
      content.forEach((cell, index) => cell.setAttribute("data-label", head[index]!));
      return h("tr", { onclick: () => this.open(row), "data-image": row.image_id }, ...content);
    });
    return h(
      "table",
      { "aria-label": caption },
      h("thead", {}, h("tr", {}, ...head.map((text) => h("th", { scope: "col", class: NUMBERS.test(text) ? "number" : null }, text)))),
      h("tbody", {}, ...lines),
    );
  }

  private showPager(): void {
    if (!this.total) return fill(this.pager);
    const go = (offset: number) => () => {
      this.offset = offset;
      void this.load().then(() => this.body.scrollTo(0, 0));
    };
    const last = Math.min(this.offset + this.rows.length, this.total);
    fill(
      this.pager,
      h("span", {}, `${(this.offset + 1).toLocaleString("en")}–${last.toLocaleString("en")} of ${this.total.toLocaleString("en")}`),
      h("button", { disabled: this.offset === 0, onclick: go(Math.max(0, this.offset - PAGE)) }, "Previous"),
      h("button", { disabled: last >= this.total, onclick: go(this.offset + PAGE) }, "Next"),
    );
  }

  /** The row before or after one, on this page. */
  neighbour(imageId: string, by: number): WorklistRow | null {
    const place = this.rows.findIndex((row) => row.image_id === imageId);
    return place < 0 ? null : (this.rows[place + by] ?? null);
  }
}

const NUMBERS = /^(Probability|Mask area|Frames|Tries)/;

function runText(run: Run): string {
  const job = run.job === "score" ? "" : ` ${run.job}`;
  return `${localTime(run.finished_at)}${job} · ${run.scored.toLocaleString("en")} scored, ${run.failed.toLocaleString("en")} failed`;
}

function meter(value: number | null): HTMLElement | string {
  if (value === null) return "–";
  const fillBar = h("i");
  fillBar.style.width = `${value * 100}%`;
  return h("span", { class: "meter" }, h("span", { class: "mini", "aria-hidden": "true" }, fillBar), h("span", { class: "digits" }, probability(value)));
}

function maskText(row: WorklistRow): string {
  if (row.mask_fraction === null || row.mask_fraction === undefined) return "–";
  if (row.mask_fraction === 0) return "none";
  return row.mask_area_mm2 === null || row.mask_area_mm2 === undefined ? `${(row.mask_fraction * 100).toFixed(1)} %` : area(row.mask_area_mm2);
}

/** Enough of an id to tell the rows of a page apart; the whole one stands in the opened image's facts. */
export const shortId = (id: string): string => `…${id.slice(-6)}`;
