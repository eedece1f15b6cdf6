// Mouse, pen, touch and wheel on the stage.

import type { Stage } from "./stage";

type Drag = "window" | "pan";
const WINDOW_SHARE = 1 / 300; // of the window's width, for each CSS pixel

/** Listen on the stage; a drag with the left button changes the window, with another or Shift it pans, two fingers zoom. */
export function listen(canvas: HTMLElement, stage: Stage): void {
  const pointers = new Map<number, { x: number; y: number }>();
  let drag: Drag = "window";
  let wheeled = 0;

  canvas.addEventListener("pointerdown", (event) => {
    if (!stage.current) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, at(canvas, event));
    drag = event.button !== 0 || event.shiftKey ? "pan" : "window";
    canvas.dataset.drag = pointers.size > 1 ? "pan" : drag;
    stage.interact(true);
    canvas.focus({ preventScroll: true });
    if (event.button === 1) event.preventDefault();
  });

  canvas.addEventListener("pointermove", (event) => {
    const now = at(canvas, event);
    const before = pointers.get(event.pointerId);
    if (!before) return stage.point(now.x, now.y);
    if (pointers.size > 1) pinch(stage, pointers, event.pointerId, now);
    else if (drag === "pan") stage.pan(now.x - before.x, now.y - before.y);
    else stage.nudgeWindow((now.y - before.y) * WINDOW_SHARE, (now.x - before.x) * WINDOW_SHARE);
    pointers.set(event.pointerId, now);
  });

  const end = (event: PointerEvent): void => {
    pointers.delete(event.pointerId);
    if (pointers.size) return;
    delete canvas.dataset.drag;
    stage.interact(false);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => stage.onCursor(null));
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", () => stage.fit());

  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!stage.current) return;
      event.preventDefault();
      const pixels = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
      if (event.ctrlKey || event.metaKey || stage.current.source.count === 1) {
        const { x, y } = at(canvas, event);
        return stage.zoom(Math.exp(-pixels / 400), x, y);
      }
      wheeled += pixels; // a notch is about 100, a trackpad sends small ones
      const steps = Math.trunc(wheeled / 60);
      if (steps) {
        wheeled -= steps * 60;
        stage.step(Math.sign(steps) * Math.min(Math.abs(steps), 5));
      }
    },
    { passive: false },
  );
}

function at(canvas: HTMLElement, event: MouseEvent): { x: number; y: number } {
  const box = canvas.getBoundingClientRect();
  return { x: event.clientX - box.left, y: event.clientY - box.top };
}

function pinch(stage: Stage, pointers: Map<number, { x: number; y: number }>, id: number, now: { x: number; y: number }): void {
  const before = pointers.get(id)!;
  const other = [...pointers].find(([key]) => key !== id)![1];
  const apart = (point: { x: number; y: number }) => Math.hypot(point.x - other.x, point.y - other.y) || 1;
  stage.zoom(apart(now) / apart(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
  stage.pan((now.x - before.x) / 2, (now.y - before.y) / 2);
}
