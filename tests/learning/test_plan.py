"""What a training makes of its label table before it begins: heads, rows, and what there is nothing to learn from."""

from __future__ import annotations

import numpy as np
import pytest

from medvision_ray.config import TrainJob, build_job
from medvision_ray.errors import LabelError
from medvision_ray.learning.ingest import DecodedImages
from medvision_ray.learning.labels import LabelTable
from medvision_ray.learning.loop import TrainPlan
from medvision_ray.learning.train import one_sided, training_plan

NAN = float("nan")


def plan_of(classes: tuple[str, ...], targets: list[list[float]] | None = None, **model: bool) -> TrainPlan:
    """Six train images and two of val, each of a patient of its own, with a mask."""
    n = 8
    table = LabelTable(
        uris=tuple(f"/i/{row}.png" for row in range(n)),
        masks=tuple(f"/m/{row}.png" for row in range(n)),
        classes=classes,
        multi_label=targets is not None,
        labels=np.arange(n) % len(classes) if targets is None else np.full(n, -1),
        targets=None if targets is None else np.array(targets * 4, np.float32),
        patients=tuple(str(row) for row in range(n)),
        splits=np.array(["train"] * 6 + ["val"] * 2),
    )
    decoded = DecodedImages(None, tuple(map(str, range(n))), ("",) * n, (b"",) * n, (None,) * n)
    job = build_job(TrainJob, {"output": "/o", "labels": {"table": "/l.csv"}, "model": model}, "the test")
    return training_plan(job, "/o/training/x", table, decoded)


def test_one_class_is_nothing_to_tell_apart_but_masks_can_be_learned() -> None:
    with pytest.raises(LabelError, match=r"two or more classes to tell apart, but all labels say tumour.*masks alone"):
        plan_of(("tumour",))
    plan = plan_of(("tumour",), classification=False)
    assert (plan.architecture.classification, plan.architecture.segmentation, plan.classes) == (False, True, ())
    assert plan_of(("none", "tumour")).classes == ("none", "tumour")


def test_findings_that_are_always_or_never_there_are_named() -> None:
    plan = plan_of(("both", "always", "never", "blank"), [[1, 1, 0, NAN], [0, NAN, 0, NAN]])
    assert one_sided(plan) == ["always", "never", "blank"]
    assert one_sided(plan_of(("a", "b"))) == []
