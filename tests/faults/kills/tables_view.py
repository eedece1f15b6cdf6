"""What a reader of the tables sees: while runs are being killed, and in the end."""

from __future__ import annotations

import math
import threading
from collections import Counter

import pyarrow.dataset as pads

from medvision_ray import storage, tables

_PAUSE_SECONDS = 0.3
TABLES = ("predictions", "failures", "runs")


class Onlooker:
    """Reads the tables of an output all the time; `problems` says where it saw a part of a run."""

    def __init__(self, output: str, whole: dict[str, int]) -> None:
        """Args: whole: rows that a whole run has in each table."""
        self._output, self._whole = output, whole
        self.problems: list[str] = []
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Onlooker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            try:
                self._look()
            except Exception as error:  # a reader must never meet one, so it is a finding of the round
                self.problems.append(f"a reader met {type(error).__name__}: {error}")
            self._stop.wait(_PAUSE_SECONDS)

    def _look(self) -> None:
        for name in TABLES:
            rows = tables.read(self._output, name, ["run_key"])
            counts = Counter(rows["run_key"].to_pylist()) if rows is not None else Counter()
            for key, count in counts.items():
                if count != self._whole[name]:
                    self.problems.append(f"{count} of {self._whole[name]} rows of {key} seen in {name}")
        self.looks += 1


def probabilities(output: str) -> dict[str, float]:
    """Predicted probability by address."""
    rows = tables.read(output, "predictions", ["uri", "predicted_probability"])
    assert rows is not None
    return dict(zip(rows["uri"].to_pylist(), rows["predicted_probability"].to_pylist(), strict=True))


def problems(output: str, expected: dict[str, str | None], reference: dict[str, float]) -> list[str]:
    """How the final tables differ from what they must hold; empty where they don't.

    Args:
        expected: code by address, None for a scored object.
        reference: probability by address, from a run that nobody disturbed.
    """
    found: list[str] = []
    outcomes: list[tuple[str, str | None]] = []
    for name, column in (("predictions", None), ("failures", "error_code")):
        rows = tables.read(output, name, ["uri", column] if column else ["uri"])
        if rows is not None:
            codes = rows[column].to_pylist() if column else [None] * rows.num_rows
            outcomes += zip(rows["uri"].to_pylist(), codes, strict=True)
    lacking = Counter(expected.items()) - Counter(outcomes)
    surplus = Counter(outcomes) - Counter(expected.items())
    if lacking or surplus:
        found.append(f"rows that lack: {dict(lacking)}; rows too many: {dict(surplus)}")
    else:
        scores = probabilities(output)
        found += [
            f"{uri} scored {scores[uri]}, undisturbed {value}"
            for uri, value in reference.items()
            if not math.isclose(scores[uri], value, rel_tol=1e-5)
        ]
    runs = tables.read(output, "runs", ["run_key", "scored", "failed"], pads.field("scored") + pads.field("failed") > 0)
    keys = Counter(runs["run_key"].to_pylist()) if runs is not None else Counter()
    if list(keys.values()) != [1]:
        found.append(f"expected one row of one run in `runs`, but found {dict(keys)}")
    bucket, prefix = output.removeprefix("s3://").split("/", 1)
    listed = storage.s3_client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/runs/").get("Contents", [])
    left = [item["Key"] for item in listed if not item["Key"].endswith("/")]  # folder markers are no objects
    if left:
        found.append(f"left in runs/: {left[:5]}")
    return found
