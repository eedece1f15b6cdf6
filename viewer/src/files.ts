// Files and folders that a person opens: read, sorted into single pictures and series, listed without their names.

import { mediaType, type Api } from "./api";
import { fill, h } from "./dom";
import { kindOf, plural } from "./format";
import { parse, type Chunk, type Header } from "./pixels";
import { wordsOf } from "./results";
import { ObjectSource, StackSource, type Source } from "./source";

const MOST_FILES = 2000;
const AT_ONCE = 2;
const STACK_BYTES = 2 ** 30;

/** One line of the list. */
export interface Item {
  title: string;
  files: File[];
  header: Header | null;
  problem: unknown;
  open: () => Promise<Source>;
}

interface Decoded {
  file: File;
  number: number;
  header: Header | null;
  slice: Chunk | null;
  problem: unknown;
}

/** Decode files; `onFirst` gets the first that can be shown, as soon as it can, the promise all of them. */
export async function readFiles(
  api: Api,
  files: File[],
  onFirst: (item: Item) => void,
  onProgress: (done: number, all: number) => void,
): Promise<Item[]> {
  const chosen = files.slice(0, MOST_FILES);
  const decoded: Decoded[] = new Array<Decoded>(chosen.length);
  let next = 0;
  let done = 0;
  let kept = 0;
  let first = true;
  const work = async (): Promise<void> => {
    for (let index = next++; index < chosen.length; index = next++) {
      const file = chosen[index]!;
      const found: Decoded = { file, number: index + 1, header: null, slice: null, problem: null };
      decoded[index] = found;
      try {
        const chunk = parse(await api.pixels(file, 0));
        found.header = chunk.header;
        const size = chunk.frames.reduce((sum, frame) => sum + frame.byteLength, 0);
        if (chunk.header.stack && kept + size <= STACK_BYTES) {
          kept += size;
          found.slice = chunk;
        }
        if (first) {
          first = false;
          onFirst(single(api, found, chunk));
        }
      } catch (problem) {
        found.problem = problem;
      }
      onProgress(++done, chosen.length);
    }
  };
  await Promise.all(Array.from({ length: Math.min(AT_ONCE, chosen.length) }, work));
  return items(api, decoded);
}

function items(api: Api, decoded: Decoded[]): Item[] {
  const series = new Map<string, Decoded[]>();
  for (const one of decoded) {
    const name = one.slice?.header.stack?.name;
    if (name) series.set(name, [...(series.get(name) ?? []), one]);
  }
  const out: Item[] = [];
  let number = 0;
  for (const one of decoded) {
    const name = one.slice?.header.stack?.name;
    const group = name ? series.get(name)! : [one];
    if (group.length === 1 || !distinct(group)) out.push(single(api, one, null));
    else if (group[0] === one) out.push(stack(group, ++number));
  }
  return out;
}

/** Whether every slice has a place of its own; slices at one place are two acquisitions, and no stack. */
function distinct(group: Decoded[]): boolean {
  return new Set(group.map((one) => one.slice!.header.stack!.position_mm)).size === group.length;
}

function single(api: Api, one: Decoded, chunk: Chunk | null): Item {
  const fetchChunk = (first: number): Promise<ArrayBuffer> => api.pixels(one.file, first);
  return {
    title: `File ${one.number}`,
    files: [one.file],
    header: one.header,
    problem: one.problem,
    open: async () => new ObjectSource(chunk ?? parse(await fetchChunk(0)), fetchChunk),
  };
}

function stack(group: Decoded[], number: number): Item {
  const source = new StackSource(group.map((one, file) => ({ file, chunk: one.slice! })));
  return {
    title: `Series ${number}`,
    files: group.map((one) => one.file),
    header: source.header,
    problem: null,
    open: () => Promise.resolve(source),
  };
}

/** A file's media type by its content. */
export async function typeOf(file: File): Promise<string> {
  return mediaType(new Uint8Array(await file.slice(0, 512).arrayBuffer()));
}

/** Files of a drop, folders and all that is below them, in the order of their paths. */
export async function dropped(data: DataTransfer): Promise<File[]> {
  const entries = Array.from(data.items, (item) => item.webkitGetAsEntry?.() ?? null); // before the first await: the list is emptied then
  if (entries.every((entry) => entry === null)) return Array.from(data.files);
  const found: { path: string; file: File }[] = [];
  const walk = async (entry: FileSystemEntry): Promise<void> => {
    if (found.length >= MOST_FILES) return;
    if (entry.isFile) {
      const file = await new Promise<File>((give, refuse) => (entry as FileSystemFileEntry).file(give, refuse));
      if (wanted(file.name)) found.push({ path: entry.fullPath, file });
    } else {
      const reader = (entry as FileSystemDirectoryEntry).createReader();
      for (;;) {
        const some = await new Promise<FileSystemEntry[]>((give, refuse) => reader.readEntries(give, refuse));
        if (!some.length) break;
        for (const inner of some) await walk(inner);
      }
    }
  };
  for (const entry of entries) if (entry) await walk(entry);
  return found.sort((one, other) => compare(one.path, other.path)).map((item) => item.file);
}

/** Files of an input, in the order of their paths. */
export function chosen(input: HTMLInputElement): File[] {
  const path = (file: File): string => file.webkitRelativePath || file.name;
  const files = Array.from(input.files ?? []).filter((file) => wanted(file.name));
  input.value = ""; // the same file can be chosen again
  return files.sort((one, other) => compare(path(one), path(other)));
}

const wanted = (name: string): boolean => !name.startsWith(".") && name !== "DICOMDIR" && name !== "Thumbs.db";
const compare = (one: string, other: string): number => one.localeCompare(other, "en", { numeric: true });

/** The list of what is open; names of files can name patients, so they are shown only when asked for. */
export function showList(panel: HTMLElement, all: Item[], current: Item | null, names: boolean, choose: (item: Item) => void, setNames: (on: boolean) => void): void {
  if (all.length < 2) return fill(panel);
  const box = h("input", { type: "checkbox", id: "names", onchange: () => setNames(box.checked) });
  box.checked = names;
  fill(
    panel,
    h(
      "section",
      { class: "card files", "aria-label": "Open files" },
      h("h3", {}, plural(all.length, "item"), h("label", { class: "names" }, box, "File names")),
      h(
        "ul",
        {},
        ...all.map((item) =>
          h(
            "li",
            {},
            h(
              "button",
              { class: `item${item.problem ? " bad" : ""}`, "aria-current": item === current ? "true" : null, onclick: () => choose(item) },
              h("span", { class: "title" }, names ? item.files[0]!.name : item.title),
              h("span", { class: "what" }, describe(item)),
            ),
          ),
        ),
      ),
    ),
  );
}

function describe(item: Item): string {
  if (item.problem) return `✕ ${wordsOf(item.problem).code}`;
  const { header } = item;
  if (!header) return "";
  const size = `${header.width} × ${header.height}`;
  return `${kindOf(header)} · ${size}${header.frames > 1 ? ` × ${header.frames}` : ""}`;
}
