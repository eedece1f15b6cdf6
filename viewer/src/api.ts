// Requests to the server that gave us this page: bearer token, problem answers (RFC 9457), types of what comes back.

export type Point = [row: number, column: number];

export interface OperatingPoint {
  name: string;
  threshold: number;
  positive: boolean;
}

export interface ClassResult {
  name: string;
  probability: number;
  calibrated_probability?: number | null;
  operating_points?: OperatingPoint[];
}

export interface MaskResult {
  fraction: number;
  area_mm2: number | null;
  pixels?: number;
  box: [number, number, number, number] | null;
  contours: Point[][] | null;
}

export interface FrameResult {
  frame?: number;
  predicted_label: string | null;
  predicted_probability: number | null;
  mask: MaskResult | null;
}

export interface Explanation {
  kind: string;
  class: string;
  png: string;
}

/** What the model says of one object: of `POST /v1/predict`, or of a worklist row. */
export interface Result {
  model_id: string;
  preprocess_id?: string;
  predicted_label: string | null;
  predicted_probability: number | null;
  classes: ClassResult[];
  key_frame: number;
  mask: MaskResult | null;
  frames: FrameResult[];
  explanation?: Explanation | null;
}

export interface Model {
  id: string;
  name: string;
  default: boolean;
}

export interface WorklistRow {
  image_id: string;
  run_key: string;
  run_date: string;
  model_id: string;
  modality?: string;
  frames?: number;
  height?: number;
  width?: number;
  predicted_label?: string | null;
  predicted_probability?: number | null;
  probability?: number | null;
  mask_fraction?: number | null;
  mask_area_mm2?: number | null;
  scored_at?: string;
  stage?: string;
  error_code?: string;
  error?: string;
  attempts?: number;
  failed_at?: string;
}

export interface Run {
  run_key: string;
  job: string;
  model_id: string;
  scored: number;
  failed: number;
  finished_at: string;
}

export interface Choices {
  runs: Run[];
  models: string[];
  labels: string[];
  modalities: string[];
  error_codes: string[];
}

export interface WorklistRecord {
  table: "predictions" | "failures";
  image_id: string;
  model_id: string;
  run_date: string;
  [fact: string]: unknown;
}

/** An answer that is an error, in the server's words. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    readonly detail: string,
  ) {
    super(detail);
  }
}

const TOKEN = "medvision-token";

/** Asks a person for a token; null when they give none. */
export type AskForToken = (reason: "needed" | "refused") => Promise<string | null>;

export class Api {
  private asking: Promise<string | null> | null = null;
  readonly session = hex(crypto.getRandomValues(new Uint8Array(16)));

  constructor(
    private readonly base: string,
    private readonly askForToken: AskForToken,
    private readonly store: Storage = sessionStorage,
  ) {}

  get hasToken(): boolean {
    return this.store.getItem(TOKEN) !== null;
  }

  forgetToken(): void {
    this.store.removeItem(TOKEN);
  }

  models(): Promise<Model[]> {
    return this.json<{ models: Model[] }>("v1/models").then((answer) => answer.models);
  }

  async card(model: string): Promise<string> {
    return (await this.fetch(`v1/models/${encodeURIComponent(model)}/card`)).text();
  }

  async pixels(content: Blob, first: number, signal?: AbortSignal): Promise<ArrayBuffer> {
    const address = `v1/pixels?first=${first}&session=${this.session}`;
    const headers = { "Content-Type": "application/octet-stream" };
    return (await this.fetch(address, { method: "POST", body: content, headers, signal })).arrayBuffer();
  }

  predict(content: Blob, type: string, model: string | null, explain: boolean, signal?: AbortSignal): Promise<Result> {
    const query = new URLSearchParams();
    if (model) query.set("model", model);
    if (explain) query.set("explain", "gradcam");
    const address = `v1/predict${query.size ? `?${query}` : ""}`;
    return this.json<Result>(address, { method: "POST", body: content, headers: { "Content-Type": type }, signal });
  }

  choices(nights: number): Promise<Choices> {
    return this.json(`v1/worklist/choices?nights=${nights}`);
  }

  worklist(query: URLSearchParams, signal?: AbortSignal): Promise<{ total: number; rows: WorklistRow[] }> {
    return this.json(`v1/worklist?${query}`, { signal });
  }

  record(imageId: string, modelId: string): Promise<WorklistRecord> {
    return this.json(`v1/worklist/${imageId}?model_id=${encodeURIComponent(modelId)}`);
  }

  async sourcePixels(imageId: string, first: number, signal?: AbortSignal): Promise<ArrayBuffer> {
    return (await this.fetch(`v1/worklist/${imageId}/pixels?first=${first}`, { signal })).arrayBuffer();
  }

  private async json<T>(address: string, init?: RequestInit): Promise<T> {
    return (await this.fetch(address, init)).json() as Promise<T>;
  }

  /** One request; where the server wants a token or refuses ours, a person is asked and it is sent again. */
  private async fetch(address: string, init: RequestInit = {}): Promise<Response> {
    for (;;) {
      const token = this.store.getItem(TOKEN);
      const headers = new Headers(init.headers);
      if (token) headers.set("Authorization", `Bearer ${token}`);
      let response: Response;
      try {
        response = await fetch(new URL(address, this.base), { ...init, headers, credentials: "same-origin", cache: "no-store" });
      } catch (error) {
        if (error instanceof DOMException && error.name === "AbortError") throw error;
        throw new Problem(0, "unreachable", "The server does not answer. Is it running, and is this computer on its network?");
      }
      if (response.ok) return response;
      if (response.status !== 401) throw await problemOf(response);
      if (this.store.getItem(TOKEN) !== token) continue; // another request has asked meanwhile
      if (!(await this.newToken(token))) throw await problemOf(response);
    }
  }

  private async newToken(old: string | null): Promise<boolean> {
    this.asking ??= this.askForToken(old ? "refused" : "needed").finally(() => (this.asking = null));
    const given = await this.asking;
    if (given === null) return false;
    this.store.setItem(TOKEN, given);
    return true;
  }
}

async function problemOf(response: Response): Promise<Problem> {
  let code = "";
  let detail = "";
  try {
    const body = (await response.clone().json()) as Record<string, unknown>;
    if (typeof body.code === "string") code = body.code;
    if (typeof body.detail === "string") detail = body.detail;
  } catch {
    // no JSON: a proxy's page, of which the status is all that is worth showing
  }
  return new Problem(response.status, code || `http_${response.status}`, detail || `The server answered ${response.status}.`);
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The media type of a file by its first bytes; names and what the system thinks of them are not asked. */
export function mediaType(start: Uint8Array): string {
  const has = (at: number, ...bytes: number[]) => bytes.every((byte, index) => start[at + index] === byte);
  if (has(128, 0x44, 0x49, 0x43, 0x4d)) return "application/dicom";
  if (has(0, 0x89, 0x50, 0x4e, 0x47)) return "image/png";
  if (has(0, 0xff, 0xd8, 0xff)) return "image/jpeg";
  if (has(0, 0x1f, 0x8b)) return "application/gzip";
  if (has(0, 0x49, 0x49, 0x2a, 0x00) || has(0, 0x4d, 0x4d, 0x00, 0x2a)) return "image/tiff";
  if (has(0, 0x42, 0x4d)) return "image/bmp";
  if (has(344, 0x6e, 0x2b, 0x31) || has(4, 0x6e, 0x2b, 0x32)) return "application/octet-stream"; // plain NIfTI
  if (has(0, 0x08, 0x00) || has(0, 0x02, 0x00)) return "application/dicom"; // without preamble
  return "application/octet-stream";
}
