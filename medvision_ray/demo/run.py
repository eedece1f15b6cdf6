"""The demo: a phantom hospital from raw images to tables and a report, in one command."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medvision_ray import tables
from medvision_ray.cluster import ray_session
from medvision_ray.config import EvaluateJob, RayConfig, ReportJob, ScoreJob, TrainJob, build_job
from medvision_ray.demo.archive import PhantomArchive, make_archive
from medvision_ray.errors import UsageError
from medvision_ray.logs import Reporter

_MARKER = ".medvision-demo"
_PREPROCESS = {"size": [128, 128]}
_MODEL = {"encoder": "resnet18", "decoder_channels": [64, 32, 24, 16, 8]}
_TRAINING = {"epochs": 14, "batch_size": 4, "learning_rate": 1e-3, "layer_decay": 1.0}
_TABLES = ("predictions", "failures", "metrics", "runs")


def run_demo(folder: str, say: Reporter) -> dict[str, Any]:
    """Make the archive, train, evaluate, score two nights, write the report.

    Returns:
        `objects`, `scored`, `failures`, `accuracy`, `dice`, `tables`, `report`, `seconds` by step.

    Raises:
        UsageError: the folder exists and is not an earlier demo's.
    """
    place = _clean(Path(folder).resolve())
    seconds: dict[str, float] = {}
    output = str(place / "output")

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.monotonic()
        result = call()
        seconds[name] = round(time.monotonic() - started, 1)
        return result

    say("1/5 Making a phantom hospital archive: two nights, 60 patients.")
    archive: PhantomArchive = timed("archive", lambda: make_archive(place))
    say(
        f"    {archive.night_1_objects} objects in night one, {archive.night_2_objects} in night two, 6 of them broken."
    )
    common = {"output": output, "privacy": {"demo_key": True}}
    with ray_session(RayConfig(), dashboard=True):
        say("2/5 Training a hybrid CNN with two DDP workers.")
        bundle = timed("train", lambda: _train(archive, common, say))
        say("3/5 Evaluating on patients that it has never seen.")
        labels = {"table": str(archive.labels)}
        evaluation = timed("evaluate", lambda: _evaluate({**common, "bundle": bundle, "labels": labels}, say))
        say("4/5 Scoring night one, then night two.")
        one = timed("night_1", lambda: _score({**common, "bundle": bundle, "archive": {"uri": archive.night_1}}, say))
        # The second run is given the whole archive: night one is done, so it touches only what is new.
        whole = {"uri": str(Path(archive.night_1).parent)}
        two = timed("night_2", lambda: _score({**common, "bundle": bundle, "archive": whole}, say))
    say("5/5 Writing the report.")
    report = timed("report", lambda: _report({"output": output, "bundle": bundle}))
    runs = (evaluation.run, one, two)
    result = {
        "objects": archive.night_1_objects + archive.night_2_objects,
        "scored": sum(run.scored for run in runs),
        "failures": sum(run.failed for run in runs),
        "accuracy": evaluation.value("accuracy"),
        "dice": evaluation.value("dice"),
        "tables": {name: tables.address(output, name) for name in _TABLES},
        "report": report,
        "seconds": seconds,
    }
    _tell(result, say)
    return result


def _clean(place: Path) -> Path:
    if place.exists() and any(place.iterdir()):
        if not (place / _MARKER).exists():
            raise UsageError(
                f"Expected {place} to be empty or an earlier demo, but it holds other files; give --folder."
            )
        shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    (place / _MARKER).touch()
    return place


def _train(archive: PhantomArchive, common: dict[str, Any], say: Reporter) -> str:
    from medvision_ray.learning.train import train

    settings = {
        **common,
        **_TRAINING,
        "name": "phantom",
        "labels": {"table": str(archive.labels)},
        "preprocess": _PREPROCESS,
        "model": _MODEL,
    }
    return train(build_job(TrainJob, settings, "the demo"), say).bundle.uri


def _evaluate(settings: dict[str, Any], say: Reporter) -> Any:
    from medvision_ray.evaluation.evaluate import evaluate

    return evaluate(build_job(EvaluateJob, {**settings, "dataset": "phantom"}, "the demo"), say)


def _score(settings: dict[str, Any], say: Reporter) -> Any:
    from medvision_ray.scoring.run import score

    return score(build_job(ScoreJob, settings, "the demo"), say)


def _report(settings: dict[str, Any]) -> str:
    from medvision_ray.reporting.collect import build_report

    return build_report(build_job(ReportJob, {**settings, "title": "Phantom hospital"}, "the demo"))


def _tell(result: dict[str, Any], say: Reporter) -> None:
    say(
        f"Test accuracy {result['accuracy']:.3f}, Dice {result['dice']:.3f}, {result['scored']} scored, {result['failures']} failed."
    )
    for name, uri in result["tables"].items():
        say(f"    {name}: {uri}")
    say(f"    report: {result['report']}")
    say("Read the predictions:")
    say("    from deltalake import DeltaTable")
    say(f"    frame = DeltaTable({result['tables']['predictions']!r}).to_pandas()")
    say("    print(frame[['uri', 'modality', 'predicted_label', 'predicted_probability', 'mask_area_mm2']])")
