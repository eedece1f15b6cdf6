"""The compare job: two bundles on the same images of a split, as one JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from medvision_ray import storage
from medvision_ray.bundle import load_bundle
from medvision_ray.config import CompareJob, EvaluateJob
from medvision_ray.errors import MedVisionError
from medvision_ray.evaluation.collect import Collected, collect
from medvision_ray.evaluation.paired import Comparison, compare_samples
from medvision_ray.evaluation.samples import EvaluationSamples
from medvision_ray.logs import Reporter


@dataclass(frozen=True)
class ComparedModels:
    """What a comparison found, and where it was written.

    Attributes:
        model_id: of `bundle`.
        baseline_id: of `baseline`.
        left_out: images of the split that one of them has no prediction of.
        over_budget: the scoring of missing predictions failed more often than `budget` allows.
        uri: the JSON file.
    """

    model_id: str
    baseline_id: str
    dataset: str
    split: str
    left_out: int
    over_budget: bool
    comparison: Comparison
    uri: str

    def facts(self) -> dict[str, Any]:
        """What the file holds."""
        named = {"model_id": self.model_id, "baseline_id": self.baseline_id, "dataset": self.dataset}
        return {**named, "split": self.split, "left_out": self.left_out, **asdict(self.comparison)}


def compare(job: CompareJob, say: Reporter) -> ComparedModels:
    """Compare two bundles on the images of a split that both have predicted.

    Raises:
        LabelError: the split can't be used with one of the bundles.
        MedVisionError: both names are one model, or the bundles can't be compared.
    """
    bundles = [load_bundle(uri) for uri in (job.bundle, job.baseline)]
    if bundles[0].model_id == bundles[1].model_id:
        raise MedVisionError(f"Expected two models to compare, but both bundles are {bundles[0].model_id}.")
    shared = {name: getattr(job, name) for name in EvaluateJob.model_fields}
    jobs = [EvaluateJob(**(shared | {"bundle": uri})) for uri in (job.bundle, job.baseline)]
    found = [collect(each, bundle, say) for each, bundle in zip(jobs, bundles, strict=True)]
    comparison = compare_samples(*_on_shared_images(*found), resamples=job.resamples, seed=job.seed)
    dataset = found[0].dataset
    folder = f"{bundles[0].model_id}-against-{bundles[1].model_id}"
    result = ComparedModels(
        model_id=bundles[0].model_id,
        baseline_id=bundles[1].model_id,
        dataset=dataset,
        split=job.split,
        left_out=found[0].images - comparison.images,
        over_budget=any(each.run.over_budget for each in found),
        comparison=comparison,
        uri=storage.join(job.output, "comparisons", folder, f"{dataset}-{job.split}.json"),
    )
    settings = {"resamples": job.resamples, "seed": job.seed, "measured_at": datetime.now(timezone.utc).isoformat()}
    storage.write_bytes(result.uri, json.dumps(result.facts() | settings, indent=1, allow_nan=False).encode())
    return result


def _on_shared_images(one: Collected, other: Collected) -> tuple[EvaluationSamples, EvaluationSamples]:
    """Both in the order of the label table, cut down to the images that each of them has."""
    kept = [
        each.scored["image_id"].isin(rest.scored["image_id"]).to_numpy() for each, rest in ((one, other), (other, one))
    ]
    if not kept[0].any():
        raise MedVisionError("Expected images that both models have predicted, but there is none.")
    return one.samples.take(kept[0]), other.samples.take(kept[1])
