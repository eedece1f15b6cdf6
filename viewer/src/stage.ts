// The stage: one frame on a canvas, with window, zoom, pan and scroll by mouse, touch and keyboard.

import type { Point } from "./api";
import { autoWindow, modalityValue, paint, type Scaling } from "./display";
import { drawMask } from "./overlay";
import type { Display, Values, Window } from "./pixels";
import type { Source } from "./source";
import { centred, fitted, panned, pixelAspect, pixelAt, zoomed, type Size, type View } from "./view";

const PREVIEW_PIXELS = 800_000;

/** What the page shows beside the picture, told with every change. */
export interface StageState {
  position: number;
  count: number;
  window: Window;
  ownWindow: boolean;
  invert: boolean;
  zoom: number;
}

export interface Cursor {
  row: number;
  column: number;
  value: string;
}

export interface Layers {
  contours: Point[][] | null;
  showMask: boolean;
  maskOpacity: number;
  heat: HTMLCanvasElement | null;
  heatOpacity: number;
}

export class Stage {
  layers: Layers = { contours: null, showMask: true, maskOpacity: 0.25, heat: null, heatOpacity: 0.6 };
  onState: (state: StageState) => void = () => {};
  onCursor: (cursor: Cursor | null) => void = () => {};
  onLoading: (loading: boolean) => void = () => {};

  private source: Source | null = null;
  private values: Values | null = null;
  private frame = 0;
  private position = 0;
  private custom: Window | null = null;
  private inverted = false;
  private view: View = { scale: 1, x: 0, y: 0 };
  private following = true; // the picture is fitted, also when the stage changes its size
  private readonly picture = document.createElement("canvas");
  private painted = "";
  private interacting = false;
  private drawing = 0;

  constructor(private readonly canvas: HTMLCanvasElement) {
    new ResizeObserver(() => this.resized()).observe(canvas);
  }

  /** Show a source from a position on; its own window is taken. */
  async show(source: Source, position: number): Promise<void> {
    this.source = source;
    this.values = null;
    this.custom = null;
    this.inverted = false;
    this.painted = "";
    this.following = true;
    this.layers = { ...this.layers, contours: null, heat: null };
    this.fit();
    await this.goTo(position);
  }

  clear(): void {
    this.source = this.values = null;
    this.canvas.removeAttribute("data-position");
    this.redraw();
  }

  get current(): { source: Source; frame: number; position: number } | null {
    return this.source && { source: this.source, frame: this.frame, position: this.position };
  }

  get display(): Display | null {
    return this.source && this.source.display(this.frame);
  }

  /** The window in use; where the file has a LUT, the window of its inputs. */
  get window(): Window {
    return this.custom ?? this.display?.window ?? { center: 0, width: 1, function: "LINEAR" };
  }

  async goTo(position: number): Promise<void> {
    const source = this.source;
    if (!source) return;
    this.position = Math.min(Math.max(position, 0), source.count - 1);
    const frame = source.frameAt(this.position);
    this.frame = frame;
    const here = source.ready(frame);
    if (!here) this.onLoading(true);
    this.tell();
    try {
      const values = here ?? (await source.load(frame));
      if (this.source !== source || this.frame !== frame) return; // gone on meanwhile
      this.values = values;
      this.redraw();
    } finally {
      if (this.source === source && this.frame === frame) this.onLoading(false);
    }
    this.tell();
  }

  step(by: number): void {
    if (this.source && this.source.count > 1) void this.goTo(this.position + by);
  }

  setWindow(center: number, width: number): void {
    if (!Number.isFinite(center) || !Number.isFinite(width)) return;
    const kind = this.window.function;
    const least = kind === "LINEAR" && this.source?.header.type !== "float32" ? 1 : 1e-6;
    this.custom = { center, width: Math.max(width, least), function: kind };
    this.redraw();
    this.tell();
  }

  /** Change the window by shares of its own width, so that a drag feels the same on HU and on [0, 1]. */
  nudgeWindow(center: number, width: number): void {
    const now = this.window;
    const unit = Math.max(now.width, 1e-6);
    this.setWindow(now.center + center * unit, now.width * Math.exp(width));
  }

  fileWindow(): void {
    this.custom = null;
    this.inverted = false;
    this.redraw();
    this.tell();
  }

  automaticWindow(): void {
    if (!this.values || !this.display) return;
    this.custom = autoWindow(this.values, this.display);
    this.redraw();
    this.tell();
  }

  invert(): void {
    this.inverted = !this.inverted;
    this.redraw();
    this.tell();
  }

  fit(): void {
    if (!this.source) return;
    this.following = true;
    this.view = fitted(this.source.header, this.aspect, this.room);
    this.redraw();
    this.tell();
  }

  oneToOne(): void {
    if (!this.source) return;
    this.following = false;
    const { scale, x, y } = centred(this.source.header, this.aspect, this.room, 1 / devicePixelRatio);
    const whole = (at: number) => Math.round(at * devicePixelRatio) / devicePixelRatio; // else every pixel would be blurred over two
    this.view = { scale, x: whole(x), y: whole(y) };
    this.redraw();
    this.tell();
  }

  zoom(factor: number, x = this.room.width / 2, y = this.room.height / 2): void {
    if (!this.source) return;
    this.following = false;
    this.view = zoomed(this.view, factor, x, y);
    this.redraw();
    this.tell();
  }

  pan(dx: number, dy: number): void {
    if (!this.source) return;
    this.following = false;
    this.view = panned(this.view, dx, dy, this.source.header, this.aspect, this.room);
    this.redraw();
  }

  /** Pixel and value under a point of the stage. */
  point(x: number, y: number): void {
    const at = this.source && pixelAt(this.view, this.aspect, this.source.header, x, y);
    this.onCursor(at ? { row: at[0], column: at[1], value: this.valueAt(at[0], at[1]) } : null);
  }

  /** While a drag lasts, large pictures are painted coarsely. */
  interact(on: boolean): void {
    this.interacting = on;
    if (!on) this.redraw();
  }

  redraw(): void {
    if (!this.drawing) this.drawing = requestAnimationFrame(() => this.draw());
  }

  private get room(): Size {
    return { width: this.canvas.clientWidth, height: this.canvas.clientHeight };
  }

  private get aspect(): number {
    return pixelAspect(this.source?.header.spacing_mm ?? null);
  }

  private get scaling(): Scaling {
    const lut = this.display?.lut ?? null;
    return this.custom ?? (lut === null ? this.window : this.source!.header.luts[lut]!);
  }

  private valueAt(row: number, column: number): string {
    const { source, values, display } = this;
    if (!source || !values || !display) return "";
    const place = row * source.header.width + column;
    if (source.header.type === "rgb8") return `RGB ${values[3 * place]} ${values[3 * place + 1]} ${values[3 * place + 2]}`;
    const value = modalityValue(values[place]!, display);
    const text = Number.isInteger(value) ? String(value) : value.toPrecision(4);
    return `${text}${source.header.unit ? ` ${source.header.unit}` : ""}`;
  }

  private resized(): void {
    const { width, height } = this.room;
    this.canvas.width = Math.round(width * devicePixelRatio);
    this.canvas.height = Math.round(height * devicePixelRatio);
    if (this.following) this.fit();
    this.redraw();
  }

  private draw(): void {
    this.drawing = 0;
    const context = this.canvas.getContext("2d")!;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    const { source, values } = this;
    if (!source || !values) return;
    this.repaint(source, values);
    const { scale, x, y } = this.view;
    const [width, height] = [source.header.width * scale, source.header.height * scale * this.aspect];
    context.scale(devicePixelRatio, devicePixelRatio);
    context.imageSmoothingEnabled = scale * devicePixelRatio < 8 && scale * devicePixelRatio !== 1;
    context.imageSmoothingQuality = this.interacting ? "low" : "high";
    context.drawImage(this.picture, x, y, width, height);
    if (this.layers.heat) {
      context.globalAlpha = this.layers.heatOpacity;
      context.imageSmoothingEnabled = true;
      context.drawImage(this.layers.heat, x, y, width, height);
      context.globalAlpha = 1;
    }
    if (this.layers.showMask && this.layers.contours) {
      drawMask(context, this.layers.contours, this.view, this.aspect, this.layers.maskOpacity);
    }
  }

  /** The frame in grey, unless it is there as it is wanted. */
  private repaint(source: Source, values: Values): void {
    const pixels = source.header.width * source.header.height;
    const stride = this.interacting ? Math.max(1, Math.ceil(Math.sqrt(pixels / PREVIEW_PIXELS))) : 1;
    const wanted = JSON.stringify([this.frame, this.custom, this.inverted, stride]);
    if (wanted === this.painted) return;
    const display = source.display(this.frame);
    const picture = paint(values, source.header, display, this.scaling, display.invert !== this.inverted, stride);
    this.picture.width = picture.width;
    this.picture.height = picture.height;
    this.picture.getContext("2d")!.putImageData(picture, 0, 0);
    this.painted = wanted;
    this.canvas.dataset.painted = String(Number(this.canvas.dataset.painted ?? 0) + 1);
  }

  private tell(): void {
    if (!this.source) return;
    this.canvas.dataset.position = String(this.position);
    this.onState({
      position: this.position,
      count: this.source.count,
      window: this.window,
      ownWindow: this.custom === null && !this.inverted,
      invert: this.inverted,
      zoom: this.view.scale * devicePixelRatio,
    });
  }
}
