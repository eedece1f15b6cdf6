// The viewer tab: what is open, its result, and the controls around the stage.

import { Problem, type Api, type FrameResult, type MaskResult, type Result, type WorklistRecord, type WorklistRow } from "./api";
import { byId, fill, h } from "./dom";
import { PRESETS } from "./display";
import { readFiles, showList, typeOf, type Item } from "./files";
import { kindOf, localTime, plural, probability, windowNumber } from "./format";
import { listen } from "./gestures";
import { heatPicture } from "./overlay";
import { parse } from "./pixels";
import { list, problemCard, showFacts, showResult, waiting, wordsOf } from "./results";
import { ObjectSource, type Source } from "./source";
import { Stage, type StageState } from "./stage";
import { shortId } from "./worklist";

const TOAST_MS = 5000;
const REST_MS = 350; // a slice of a series is scored once scrolling rests on it so long

/** What is on the stage. */
interface Case {
  source: Source;
  /** The result for a frame; null where there is none to be had. */
  result: (frame: number, explain: boolean) => Promise<Result> | null;
  /** Each file of a series has a result of its own. */
  perFrame: boolean;
  scored: string | null;
}

export class Viewer {
  readonly stage: Stage;
  /** Neighbours in the worklist, while a row of it is open. */
  neighbour: (by: number) => void = () => {};

  private items: Item[] = [];
  private item: Item | null = null;
  private names = false;
  private case: Case | null = null;
  private result: Result | null = null;
  private resultFrame = -1;
  private heatOn = false;
  private opening = 0;
  private resting = 0;
  private toasting = 0;
  private rowId: string | null = null;

  constructor(
    private readonly api: Api,
    private readonly model: () => string | null,
    private readonly say: (text: string) => void,
  ) {
    const canvas = byId<HTMLCanvasElement>("stage");
    this.stage = new Stage(canvas);
    listen(canvas, this.stage);
    this.stage.onState = (state) => this.showState(state);
    this.stage.onCursor = (cursor) =>
      fill(byId("corner-br"), cursor && `row ${cursor.row}, column ${cursor.column}: `, cursor && h("b", {}, cursor.value));
    this.stage.onLoading = (loading) => (byId("spinner").hidden = !loading);
    this.setUpControls();
    this.welcome();
  }

  get openRow(): string | null {
    return this.rowId;
  }

  /** Open files; the first that can be shown comes up at once, the list when all are read. */
  async openFiles(files: File[]): Promise<void> {
    if (!files.length) return;
    const ticket = this.begin(files.length > 1 ? `Reading ${plural(files.length, "file")}` : "Reading the file");
    let shown: Item | null = null;
    const items = await readFiles(
      this.api,
      files,
      (item) => {
        if (ticket !== this.opening) return;
        shown = item;
        if (files.length === 1) void this.openItem(item);
        else void this.preview(item, ticket);
      },
      (done, all) => {
        if (ticket === this.opening && all > 1 && done < all) fill(byId("files"), h("p", { class: "fine busy" }, `Reading ${done} of ${all}`));
      },
    );
    if (ticket !== this.opening && !(files.length === 1 && shown)) return;
    this.items = items;
    if (files.length === 1) {
      if (!shown) this.refuse(items[0]!);
      return this.showItems();
    }
    const first = items.find((item) => !item.problem) ?? items[0]!;
    if (files.length > items[0]!.files.length) this.say(`${plural(items.length, "item")} open`);
    await this.openItem(first);
  }

  /** Open a row of the worklist: its picture from the archive, its result from the table. */
  async openRowOf(row: WorklistRow): Promise<void> {
    const ticket = this.begin("Reading the image from the archive");
    this.items = [];
    this.showItems();
    this.rowId = row.image_id;
    let record: WorklistRecord;
    try {
      record = await this.api.record(row.image_id, row.model_id);
    } catch (problem) {
      if (ticket === this.opening) this.refuseWith("The row cannot be read", problem);
      return;
    }
    if (ticket !== this.opening) return;
    const failed = record.table === "failures";
    const result = failed ? null : resultOf(record);
    if (failed) this.showFailure(record);
    else showResult(byId("result"), result!, null, whenOf(record));
    this.showRowFacts(record);
    try {
      const fetchChunk = (first: number): Promise<ArrayBuffer> => this.api.sourcePixels(row.image_id, first);
      const source = new ObjectSource(parse(await fetchChunk(0)), fetchChunk);
      if (ticket !== this.opening) return;
      const answer = result && Promise.resolve(result);
      await this.showCase({ source, result: () => answer, perFrame: false, scored: whenOf(record) }, ticket);
      this.showRowFacts(record);
    } catch (problem) {
      if (ticket === this.opening) this.refuseWith("The image cannot be shown", problem, failed);
    }
  }

  /** The result anew, as by another model; window and zoom stay. */
  rescore(): void {
    if (!this.case || this.case.scored !== null) return;
    this.result = null;
    this.stage.layers.contours = null;
    this.setHeat(null);
    void this.score();
  }

  /** Said to those who look and to those who listen, for a while. */
  notify(text: string): void {
    const toast = byId("toast");
    toast.textContent = text;
    toast.hidden = false;
    clearTimeout(this.toasting);
    this.toasting = window.setTimeout(() => (toast.hidden = true), TOAST_MS);
    this.say(text);
  }

  toggleMask(): void {
    this.setMask(!this.stage.layers.showMask);
  }

  toggleHeat(): void {
    if (byId<HTMLButtonElement>("heat").disabled) return;
    this.heatOn = !this.heatOn;
    byId("heat").setAttribute("aria-pressed", String(this.heatOn));
    void this.updateHeat();
  }

  preset(index: number): void {
    const preset = PRESETS[index];
    if (preset && this.stage.current?.source.header.unit === "HU") this.stage.setWindow(preset[1], preset[2]);
  }

  nextItem(by: number): void {
    if (this.rowId) return this.neighbour(by);
    const place = this.item ? this.items.indexOf(this.item) : -1;
    const next = this.items[place + by];
    if (place >= 0 && next) void this.openItem(next);
  }

  private begin(text: string): number {
    this.opening++;
    this.case = this.result = this.item = this.rowId = null;
    this.stage.clear();
    this.forget();
    fill(byId("message"), h("p", { class: "busy" }, text));
    fill(byId("facts"));
    fill(byId("result"));
    return this.opening;
  }

  private async preview(item: Item, ticket: number): Promise<void> {
    const source = await item.open();
    if (ticket !== this.opening) return;
    fill(byId("message"));
    this.label(source);
    await this.stage.show(source, 0);
  }

  private async openItem(item: Item): Promise<void> {
    const ticket = this.begin("Reading the file");
    this.item = item;
    this.showItems();
    if (item.problem) return this.refuse(item);
    try {
      const source = await item.open();
      if (ticket !== this.opening) return;
      const asked = new Map<string, Promise<Result>>();
      const result = (frame: number, explain: boolean): Promise<Result> => {
        const file = item.files[source.fileOf(frame)]!;
        const model = this.model();
        const key = `${source.fileOf(frame)} ${explain} ${model}`;
        const found = asked.get(key) ?? typeOf(file).then((type) => this.api.predict(file, type, model, explain));
        asked.set(key, found);
        found.catch(() => asked.delete(key));
        return found;
      };
      await this.showCase({ source, result, perFrame: item.files.length > 1, scored: null }, ticket);
    } catch (problem) {
      if (ticket === this.opening) this.refuseWith("The file cannot be shown", problem);
    }
  }

  private async showCase(opened: Case, ticket: number): Promise<void> {
    this.case = opened;
    const { source } = opened;
    fill(byId("message"));
    this.label(source);
    showFacts(byId("facts"), source.header, source.count);
    await this.stage.show(source, opened.perFrame ? Math.floor(source.count / 2) : 0);
    if (ticket !== this.opening) return;
    this.say(`${kindOf(source.header)} image, ${source.header.width} by ${source.header.height}, ${plural(source.count, "frame")}`);
    await this.score();
  }

  /** Ask for the result of what is on the stage, and show it. */
  private async score(): Promise<void> {
    const [opened, ticket] = [this.case, this.opening];
    const current = this.stage.current;
    if (!opened || !current) return;
    const asked = opened.result(current.frame, false);
    if (!asked) return;
    if (!this.result || opened.perFrame) waiting(byId("result"), "Scoring");
    try {
      const result = await asked;
      if (ticket !== this.opening || this.case !== opened || (opened.perFrame && this.stage.current?.frame !== current.frame)) return;
      const first = this.result === null;
      this.result = result;
      this.resultFrame = current.frame;
      this.showFrameResult();
      if (first && !opened.perFrame && current.position === 0 && result.frames.length > 1) {
        await this.stage.goTo(current.source.positionOf(result.key_frame));
      }
      this.drawStrip();
      this.say(`Model output: ${result.predicted_label || "no finding"} ${result.predicted_probability === null ? "" : probability(result.predicted_probability)}`);
    } catch (problem) {
      if (ticket === this.opening) problemCard(byId("result"), "No result", problem, () => void this.score());
    }
    if (ticket === this.opening) await this.updateHeat();
  }

  private frameResult(): FrameResult | null {
    const frame = this.stage.current?.frame ?? 0;
    return this.result?.frames.find((item, index) => (item.frame ?? index) === frame) ?? null;
  }

  private showFrameResult(): void {
    const { result } = this;
    if (!result) return;
    const frame = this.frameResult();
    const mask = result.frames.length > 1 ? (frame?.mask ?? null) : result.mask;
    showResult(byId("result"), result, frame, this.case?.scored);
    this.stage.layers.contours = mask?.contours ?? null;
    byId<HTMLButtonElement>("mask").disabled = byId<HTMLInputElement>("mask-opacity").disabled = result.mask === null;
    this.stage.redraw();
  }

  private async updateHeat(): Promise<void> {
    const [opened, ticket, current] = [this.case, this.opening, this.stage.current];
    const button = byId<HTMLButtonElement>("heat");
    const slider = byId<HTMLInputElement>("heat-opacity");
    button.disabled = slider.disabled = !opened || opened.scored !== null;
    button.title = opened?.scored ? "Rows of the tables hold no explanation; open the file itself" : "Which pixels spoke for the predicted class";
    if (!this.heatOn || !opened || !current || opened.scored !== null) return this.setHeat(null);
    try {
      const result = await opened.result(current.frame, true);
      const picture = result?.explanation ? await heatPicture(result.explanation.png) : null;
      if (ticket !== this.opening) return;
      const wanted = opened.perFrame || current.source.count === 1 ? current.frame : (result?.key_frame ?? 0);
      this.setHeat(this.heatOn && this.stage.current?.frame === wanted ? picture : null, result?.explanation?.class);
      if (!picture) this.noHeat("This server's answer holds no explanation.");
    } catch (problem) {
      if (ticket === this.opening) this.noHeat(`No explanation: ${wordsOf(problem).detail}`);
    }
  }

  private noHeat(why: string): void {
    this.heatOn = false;
    byId("heat").setAttribute("aria-pressed", "false");
    this.setHeat(null);
    this.notify(why);
  }

  private setHeat(picture: HTMLCanvasElement | null, about = ""): void {
    byId("heat-note").textContent = picture ? `Grad-CAM: ${about}` : "";
    this.stage.layers.heat = picture;
    byId("stage").dataset.heat = picture ? "on" : "off";
    this.stage.redraw();
  }

  private setMask(on: boolean): void {
    this.stage.layers.showMask = on;
    byId("mask").setAttribute("aria-pressed", String(on));
    byId("stage").dataset.mask = on ? "on" : "off";
    this.stage.redraw();
    this.say(on ? "Mask shown" : "Mask hidden");
  }

  /** What changes with the frame, the window and the zoom. */
  private showState(state: StageState): void {
    const slider = byId<HTMLInputElement>("slice");
    slider.max = String(state.count);
    slider.value = String(state.position + 1);
    slider.setAttribute("aria-valuetext", `${state.position + 1} of ${state.count}`);
    byId("slice-number").textContent = `${state.position + 1} / ${state.count}`;
    byId("slices").hidden = state.count < 2;
    const numbers = [windowNumber(state.window.center), windowNumber(state.window.width)];
    for (const [index, id] of ["center", "width"].entries()) {
      const field = byId<HTMLInputElement>(id);
      if (document.activeElement !== field) field.value = numbers[index]!;
    }
    byId("invert").setAttribute("aria-pressed", String(state.invert));
    byId<HTMLSelectElement>("preset").value = this.presetOf(state);
    const unit = this.stage.current?.source.header.unit;
    byId("corner-bl").textContent = `C ${numbers[0]}  W ${numbers[1]}${unit ? ` ${unit}` : ""}${state.invert ? "  inverted" : ""}  ·  ${Math.round(state.zoom * 100)} %`;
    byId("corner-tr").textContent = state.count > 1 ? `${state.position + 1} / ${state.count}` : "";
    const canvas = byId("stage");
    canvas.dataset.center = String(state.window.center);
    canvas.dataset.width = String(state.window.width);
    const frame = this.stage.current?.frame ?? 0;
    if (this.case && this.result && frame !== this.resultFrame) this.frameChanged();
  }

  private frameChanged(): void {
    const opened = this.case!;
    clearTimeout(this.resting);
    if (!opened.perFrame) {
      this.resultFrame = this.stage.current!.frame;
      this.showFrameResult();
      this.drawStrip();
      void this.updateHeat();
      return;
    }
    this.stage.layers.contours = null;
    this.setHeat(null);
    this.resting = window.setTimeout(() => void this.score(), REST_MS);
  }

  private presetOf(state: StageState): string {
    if (state.ownWindow) return "file";
    const found = PRESETS.findIndex(([, center, width]) => center === state.window.center && width === state.window.width);
    return found >= 0 ? String(found) : "custom";
  }

  /** Over the frame slider: how much of each frame the mask covers. */
  private drawStrip(): void {
    const strip = byId("strip") as unknown as SVGSVGElement;
    const current = this.stage.current;
    const frames = this.result?.frames ?? [];
    fill(strip);
    if (!current || frames.length < 2) return;
    const most = Math.max(...frames.map((frame) => frame.mask?.fraction ?? 0));
    strip.setAttribute("viewBox", `0 0 ${current.source.count} 1`);
    if (!most) return;
    for (const [index, frame] of frames.entries()) {
      const high = (frame.mask?.fraction ?? 0) / most;
      const bar = document.createElementNS(strip.namespaceURI!, "rect");
      const at = { x: current.source.positionOf(frame.frame ?? index) + 0.1, y: 1 - high, width: 0.8, height: high };
      for (const [name, value] of Object.entries(at)) bar.setAttribute(name, String(value));
      strip.append(bar);
    }
  }

  private label(source: Source): void {
    const { header } = source;
    byId("stage").setAttribute("aria-label", `${kindOf(header)} image, ${header.width} by ${header.height} pixels, ${plural(source.count, "frame")}`);
    byId("corner-tl").textContent = `${kindOf(header)}  ${header.width} × ${header.height}`;
    for (const side of ["left", "right", "top", "bottom"] as const) byId(`edge-${side}`).textContent = header.edges?.[side] ?? "";
    for (const option of byId<HTMLSelectElement>("preset").options) {
      if (option.dataset.hu) option.hidden = option.disabled = header.unit !== "HU";
    }
    document.body.classList.toggle("open", true);
  }

  /** Nothing is on the stage: what was said of the last picture goes. */
  private forget(): void {
    for (const id of ["corner-tl", "corner-tr", "corner-bl", "corner-br", "edge-left", "edge-right", "edge-top", "edge-bottom"]) byId(id).textContent = "";
    byId("stage").setAttribute("aria-label", "No image is open");
    byId("slices").hidden = true;
    byId("spinner").hidden = true;
    this.resultFrame = -1;
    clearTimeout(this.resting);
    this.setHeat(null);
    document.body.classList.toggle("open", false);
  }

  private refuse(item: Item): void {
    this.item = item;
    this.showItems();
    this.refuseWith("The file cannot be shown", item.problem);
    fill(byId("result"), h("div", { class: "card muted" }, "Nothing was scored. In a nightly run this object would stand in the failures table under the same code."));
  }

  private refuseWith(title: string, problem: unknown, quiet = false): void {
    this.stage.clear();
    this.forget();
    const { code, detail } = wordsOf(problem);
    const retry = problem instanceof Problem && (problem.status === 0 || problem.status === 503 || problem.status === 401);
    fill(
      byId("message"),
      h(
        "div",
        { class: "refusal", role: quiet ? null : "alert" },
        h("h2", {}, title),
        h("p", {}, detail),
        code && h("p", {}, h("code", {}, code)),
        !retry && !this.rowId && h("button", { onclick: () => byId("file-input").click() }, "Open another file"),
        retry && this.item && h("button", { onclick: () => this.item && void this.openFiles(this.item.files) }, "Try again"),
      ),
    );
  }

  private welcome(): void {
    fill(
      byId("message"),
      h(
        "div",
        { class: "welcome" },
        h("h1", {}, "Drop an image here"),
        h("p", {}, "DICOM, NIfTI, PNG, JPEG, TIFF or BMP, one file or a folder with a series."),
        h(
          "div",
          { class: "actions" },
          h("button", { class: "primary", onclick: () => byId("file-input").click() }, "Open file"),
          h("button", { onclick: () => byId("folder-input").click() }, "Open folder"),
        ),
        h("p", { class: "fine" }, "Files go to this server and nowhere else. Their names stay in this browser."),
      ),
    );
    fill(
      byId("result"),
      h("div", { class: "card muted" }, h("p", {}, "The model's output appears here: probabilities with their operating points, the mask and its area.")),
    );
  }

  private showItems(): void {
    showList(byId("files"), this.items, this.item, this.names, (item) => void this.openItem(item), (on) => {
      this.names = on;
      this.showItems();
      byId("names").focus();
    });
  }

  private showFailure(record: WorklistRecord): void {
    fill(
      byId("result"),
      h(
        "section",
        { class: "card problem" },
        h("h2", {}, "Not scored"),
        h("p", {}, String(record.error ?? "")),
        list([
          ["Reason", h("code", {}, String(record.error_code))],
          ["Step", String(record.stage)],
          ["Tries", String(record.attempts)],
        ]),
      ),
    );
  }

  private showRowFacts(record: WorklistRecord): void {
    const section = h(
      "section",
      { class: "card", "aria-label": "Worklist row", id: "row" },
      h("h3", {}, "Worklist row"),
      list([
        ["Image", h("code", { class: "whole" }, record.image_id)],
        ["Run date", record.run_date],
        ["Model", h("code", {}, record.model_id)],
      ]),
      h(
        "div",
        { class: "actions spread" },
        h("button", { onclick: () => this.neighbour(-1), title: "K" }, "Previous"),
        h("button", { onclick: () => this.neighbour(1), title: "J" }, "Next"),
      ),
    );
    document.getElementById("row")?.remove();
    byId("facts").append(section);
    section.setAttribute("aria-description", `Image ${shortId(record.image_id)}`);
  }

  private setUpControls(): void {
    const preset = byId<HTMLSelectElement>("preset");
    preset.append(h("option", { value: "file" }, "From file"), h("option", { value: "auto" }, "Automatic"));
    for (const [index, [name, center, width]] of PRESETS.entries()) {
      preset.append(h("option", { value: index, "data-hu": "yes" }, `${name} ${center}/${width}`));
    }
    preset.append(h("option", { value: "custom", hidden: true }, "By hand"));
    preset.addEventListener("change", () => {
      if (preset.value === "file") this.stage.fileWindow();
      else if (preset.value === "auto") this.stage.automaticWindow();
      else this.preset(Number(preset.value));
    });
    const [center, width] = [byId<HTMLInputElement>("center"), byId<HTMLInputElement>("width")];
    for (const field of [center, width]) {
      field.addEventListener("change", () => this.stage.setWindow(center.valueAsNumber, width.valueAsNumber));
    }
    byId("invert").addEventListener("click", () => this.stage.invert());
    byId("fit").addEventListener("click", () => this.stage.fit());
    byId("one").addEventListener("click", () => this.stage.oneToOne());
    byId("mask").addEventListener("click", () => this.toggleMask());
    byId("heat").addEventListener("click", () => this.toggleHeat());
    const share = (id: string, take: (value: number) => void): void => {
      const slider = byId<HTMLInputElement>(id);
      slider.addEventListener("input", () => {
        take(Number(slider.value) / 100);
        this.stage.redraw();
      });
    };
    share("mask-opacity", (value) => (this.stage.layers.maskOpacity = value));
    share("heat-opacity", (value) => (this.stage.layers.heatOpacity = value));
    const slider = byId<HTMLInputElement>("slice");
    slider.addEventListener("input", () => void this.stage.goTo(Number(slider.value) - 1));
  }
}

const whenOf = (record: WorklistRecord): string => localTime(String(record.scored_at ?? ""));

/** A row of the tables in the form of the API's answer. */
function resultOf(record: WorklistRecord): Result {
  return {
    model_id: record.model_id,
    preprocess_id: record.preprocess_id as string,
    predicted_label: record.predicted_label as string | null,
    predicted_probability: record.predicted_probability as number | null,
    classes: record.classes as Result["classes"],
    key_frame: record.key_frame as number,
    mask: record.mask as MaskResult | null,
    frames: record.frame_results as FrameResult[],
  };
}
