// What each key does; the help dialog lists the same table.

import { fill, h } from "./dom";

export interface KeyAction {
  keys: string[];
  shown: string;
  what: string;
  do: () => void;
}

/** Act on keys pressed anywhere but in fields and open dialogs; `active` says whether the viewer is shown. */
export function listenToKeys(actions: KeyAction[], active: () => boolean): void {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !active()) return;
    const target = event.target as HTMLElement;
    if (target.closest("input:not([type=range]):not([type=checkbox]), select, textarea, dialog[open]")) return;
    if (document.querySelector("dialog[open]")) return;
    const onStage = target.id === "stage" || target === document.body;
    const name = `${event.shiftKey && event.key.length > 1 ? "Shift+" : ""}${event.key.length === 1 ? event.key.toLowerCase() : event.key}`;
    const moving = /Arrow|Page|Home|End|^ $/.test(name);
    if (moving && !onStage) return; // arrow keys belong to the slider, the list or the tab that has the focus
    const action = actions.find((one) => one.keys.includes(name));
    if (!action) return;
    event.preventDefault();
    action.do();
  });
}

const MOUSE: [string, string][] = [
  ["Drag left button", "Window: sideways its width, up and down its centre"],
  ["Drag right or middle button, or Shift and drag", "Move the picture"],
  ["Wheel", "Scroll frames; zoom where there is one frame"],
  ["Ctrl and wheel, two fingers", "Zoom"],
  ["Double click", "Fit to the stage"],
];

export function showHelp(panel: HTMLElement, actions: KeyAction[]): void {
  const row = (keys: (Node | string)[], what: string): HTMLElement => h("tr", {}, h("th", { scope: "row" }, ...keys), h("td", {}, what));
  fill(
    panel,
    h(
      "table",
      { class: "keys" },
      h("tbody", {}, ...actions.map((one) => row(keyCaps(one.shown), one.what)), ...MOUSE.map(([gesture, what]) => row([gesture], what))),
    ),
  );
}

function keyCaps(text: string): (Node | string)[] {
  return text.split(" ").flatMap((key, index) => [index ? " " : "", h("kbd", {}, key)]);
}
