"""metrics.jsonl: one line an epoch, written while a training runs, followed by whoever waits for it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from medvision_ray import storage
from medvision_ray.errors import StorageError

_PAUSE_SECONDS = 0.5


def read_history(uri: str) -> list[dict[str, Any]]:
    """The epochs written so far, in order; none where there is no file."""
    try:
        data = storage.read_bytes(uri)
    except StorageError as error:
        if error.code != "not_found":
            raise
        return []
    return [json.loads(line) for line in data.decode().splitlines()]


def append_epoch(uri: str, epoch: dict[str, Any]) -> None:
    """Add one epoch; those from the same number on, of a run that was lost, go. NaN becomes null."""
    lines = [line for line in read_history(uri) if line["epoch"] < epoch["epoch"]]
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in epoch.items()
    }
    text = "".join(json.dumps(line) + "\n" for line in [*lines, plain])
    storage.write_bytes(uri, text.encode())


def describe(epoch: dict[str, Any], epochs: int) -> str:
    """An epoch in one line, as far as its figures are defined."""
    parts = [f"epoch {epoch['epoch']}/{epochs}"]
    names = (("loss", "train_loss"), ("val loss", "val_loss"), ("accuracy", "val_accuracy"), ("F1", "val_f1"))
    for name, key in (*names, ("dice", "val_dice")):
        if epoch.get(key) is not None:
            parts.append(f"{name} {epoch[key]:.3f}")
    parts.append(f"{epoch['images_per_second']:.0f} images/s")
    return "  ".join(parts)


@contextmanager
def following(uri: str, show: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Call `show` with each epoch that is written inside the block, from a thread of its own."""
    seen = {json.dumps(line) for line in read_history(uri)}
    done = threading.Event()

    def show_new() -> None:
        for line in read_history(uri):
            text = json.dumps(line)
            if text not in seen:
                seen.add(text)
                show(line)

    def follow() -> None:
        while not done.wait(_PAUSE_SECONDS):
            show_new()

    thread = threading.Thread(target=follow, name="medvision-training-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    show_new()
