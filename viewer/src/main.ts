// The page: tabs, model, theme, dialogs, opening of files, keys.

import { Api, Problem, type WorklistRow } from "./api";
import { render } from "./card";
import { byId, fill, h, icon } from "./dom";
import { chosen, dropped } from "./files";
import { listenToKeys, showHelp, type KeyAction } from "./keys";
import { wordsOf } from "./results";
import { setUpTheme } from "./theme";
import { askForToken } from "./token";
import { Viewer } from "./viewer";
import { Worklist } from "./worklist";

const api = new Api(document.baseURI, askForToken);
const status = byId("status");
const say = (text: string): void => void (status.textContent = text);

const models = byId<HTMLSelectElement>("model");
const model = (): string | null => models.value || null;
const viewer = new Viewer(api, model, say);
const worklist = new Worklist(byId("worklist"), api, (row) => openRow(row), say);

const tabs = { view: byId("tab-view"), worklist: byId("tab-worklist") };
type Tab = keyof typeof tabs;

function show(tab: Tab, focus = false): void {
  for (const name of Object.keys(tabs) as Tab[]) {
    const on = name === tab;
    tabs[name].setAttribute("aria-selected", String(on));
    tabs[name].tabIndex = on ? 0 : -1;
    byId(name).hidden = !on;
  }
  if (focus) tabs[tab].focus();
  history.replaceState(null, "", tab === "view" ? location.pathname + location.search : "#worklist");
  if (tab === "worklist") void worklist.refresh();
}

function openRow(row: WorklistRow): void {
  show("view");
  byId("stage").focus({ preventScroll: true });
  void viewer.openRowOf(row);
}

viewer.neighbour = (by) => {
  const next = viewer.openRow && worklist.neighbour(viewer.openRow, by);
  if (next) openRow(next);
  else viewer.notify("No more rows on this page of the worklist.");
};

for (const name of Object.keys(tabs) as Tab[]) {
  tabs[name].addEventListener("click", () => show(name));
  tabs[name].addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") show(name === "view" ? "worklist" : "view", true);
  });
}

async function loadModels(): Promise<void> {
  try {
    const found = await api.models();
    fill(models);
    for (const one of found) models.append(h("option", { value: one.id, selected: one.default }, one.id));
    byId("model-label").classList.toggle("single", found.length < 2);
  } catch (problem) {
    fill(models, h("option", { value: "" }, "no model"));
    if (problem instanceof Problem && problem.status !== 401) say(wordsOf(problem).detail);
  }
}

async function showCard(): Promise<void> {
  const dialog = byId<HTMLDialogElement>("card-dialog");
  fill(byId("card"), h("p", { class: "busy" }, "Reading the card"));
  dialog.showModal();
  try {
    fill(byId("card"), ...render(await api.card(model() ?? "")));
  } catch (problem) {
    fill(byId("card"), h("h2", {}, "No model card"), h("p", {}, wordsOf(problem).detail));
  }
}

function setUpOpening(): void {
  const [file, folder] = [byId<HTMLInputElement>("file-input"), byId<HTMLInputElement>("folder-input")];
  byId("open-file").addEventListener("click", () => file.click());
  byId("open-folder").addEventListener("click", () => folder.click());
  for (const input of [file, folder]) input.addEventListener("change", () => void viewer.openFiles(chosen(input)));
  let inside = 0;
  const mark = (by: number): void => {
    inside = Math.max(0, inside + by);
    document.body.classList.toggle("dragging", inside > 0);
  };
  document.addEventListener("dragenter", () => mark(1));
  document.addEventListener("dragleave", () => mark(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    mark(-inside);
    if (!event.dataTransfer) return;
    show("view");
    void dropped(event.dataTransfer).then((files) => viewer.openFiles(files));
  });
}

function setUpDialogs(): void {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close")?.addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.id !== "token-dialog" && dialog.close());
  }
  for (const button of document.querySelectorAll(".close")) fill(button, icon("M5 5l10 10M15 5L5 15"));
  byId("card-open").addEventListener("click", () => void showCard());
  byId("help-open").addEventListener("click", help);
  fill(byId("help-open"), icon("M7.500 7.500a2.500 2.500 0 1 1 3.600 2.200c-.8.4-1.100.9-1.100 1.800M10 14.500v.1"));
}

const { stage } = viewer;
const actions: KeyAction[] = [
  { keys: ["ArrowUp", "PageUp"], shown: "↑ PgUp", what: "Previous frame; zoom in where there is one frame", do: () => move(-1) },
  { keys: ["ArrowDown", "PageDown"], shown: "↓ PgDn", what: "Next frame; zoom out where there is one frame", do: () => move(1) },
  { keys: ["Home"], shown: "Home", what: "First frame", do: () => void stage.goTo(0) },
  { keys: ["End"], shown: "End", what: "Last frame", do: () => void stage.goTo(Infinity) },
  { keys: ["+", "="], shown: "+", what: "Zoom in", do: () => stage.zoom(1.25) },
  { keys: ["-"], shown: "-", what: "Zoom out", do: () => stage.zoom(0.8) },
  { keys: ["f", "0"], shown: "F", what: "Fit to the stage", do: () => stage.fit() },
  { keys: ["o"], shown: "O", what: "One image pixel to one screen pixel", do: () => stage.oneToOne() },
  { keys: ["Shift+ArrowLeft"], shown: "Shift ←", what: "Move the picture; likewise → ↑ ↓", do: () => stage.pan(-40, 0) },
  { keys: ["Shift+ArrowRight"], shown: "", what: "", do: () => stage.pan(40, 0) },
  { keys: ["Shift+ArrowUp"], shown: "", what: "", do: () => stage.pan(0, -40) },
  { keys: ["Shift+ArrowDown"], shown: "", what: "", do: () => stage.pan(0, 40) },
  { keys: ["["], shown: "[", what: "Narrower window (more contrast)", do: () => stage.nudgeWindow(0, -0.1) },
  { keys: ["]"], shown: "]", what: "Wider window (less contrast)", do: () => stage.nudgeWindow(0, 0.1) },
  { keys: [","], shown: ",", what: "Lower window centre (brighter)", do: () => stage.nudgeWindow(-0.05, 0) },
  { keys: ["."], shown: ".", what: "Higher window centre (darker)", do: () => stage.nudgeWindow(0.05, 0) },
  { keys: ["r"], shown: "R", what: "The file's own window", do: () => stage.fileWindow() },
  { keys: ["a"], shown: "A", what: "Window from this frame's values", do: () => stage.automaticWindow() },
  { keys: ["1"], shown: "1 … 5", what: "CT windows: soft tissue, lung, bone, brain, liver", do: () => viewer.preset(0) },
  ...["2", "3", "4", "5"].map((key, index) => ({ keys: [key], shown: "", what: "", do: () => viewer.preset(index + 1) })),
  { keys: ["i"], shown: "I", what: "Invert", do: () => stage.invert() },
  { keys: ["m"], shown: "M", what: "Mask on or off", do: () => viewer.toggleMask() },
  { keys: ["g"], shown: "G", what: "Grad-CAM on or off", do: () => viewer.toggleHeat() },
  { keys: ["j"], shown: "J", what: "Next open file, or next row of the worklist", do: () => viewer.nextItem(1) },
  { keys: ["k"], shown: "K", what: "Previous one", do: () => viewer.nextItem(-1) },
  { keys: ["w"], shown: "W", what: "Worklist", do: () => show("worklist", true) },
  { keys: ["?"], shown: "?", what: "These keys", do: help },
];

function move(by: number): void {
  if ((stage.current?.source.count ?? 1) > 1) stage.step(by);
  else stage.zoom(by < 0 ? 1.25 : 0.8);
}

function help(): void {
  showHelp(byId("help"), actions.filter((action) => action.shown));
  byId<HTMLDialogElement>("help-dialog").showModal();
}

setUpTheme(byId("theme"));
setUpOpening();
setUpDialogs();
listenToKeys(actions, () => !byId("view").hidden);
models.addEventListener("change", () => viewer.rescore());
void loadModels();
if (location.hash === "#worklist") show("worklist");
