"""The report job: choose the kind of report, collect what it shows, and write the page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np

from medvision_ray import storage, tables
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.config import ReportJob
from medvision_ray.errors import UsageError
from medvision_ray.reporting import pictures, sources
from medvision_ray.reporting.comparison_page import Compared, comparison_sections
from medvision_ray.reporting.evaluation_page import Evaluated, evaluation_sections
from medvision_ray.reporting.folds_section import OUT_OF_FOLD, Folds
from medvision_ray.reporting.night_page import DRIFT_METRICS, GROUPS, Night, night_sections
from medvision_ray.reporting.page import Page, Section, render
from medvision_ray.reporting.summary import one_split
from medvision_ray.reporting.training_page import Trained, training_sections

_NIGHT_COLUMNS = ["predicted_label", "predicted_probability", "mask_fraction", "frames", *GROUPS]


def build_report(job: ReportJob) -> str:
    """Write one self-contained HTML file; returns its address.

    Raises:
        BundleError: there is no such model.
        UsageError: there is nothing of the wanted kind to report on.
    """
    bundle = load_bundle(job.bundle)
    kind = job.kind or _kind(job, bundle)
    stem, subtitle, sections = _KINDS[kind](job, bundle)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    html = render(Page(job.title, subtitle, now, sections), job.max_megabytes)
    place = job.file or storage.join(job.output, "reports", f"{stem}.html")
    storage.write_bytes(place, html.encode())
    return storage.absolute(place)


def _kind(job: ReportJob, bundle: Bundle) -> str:
    """A baseline asks for a comparison and a run for a night; else what there is: evaluation, training, night."""
    if job.baseline is not None:
        return "comparison"
    if job.run_key is not None:
        return "night"
    if sources.evaluation_metrics(job.output, bundle) is None:
        if sources.history(job.output, bundle) is not None:
            return "training"
        if sources.run_of(job.output, bundle, None) is not None:
            return "night"
    return "evaluation"


def _evaluation(job: ReportJob, bundle: Bundle) -> tuple[str, str, list[Section]]:
    metrics = sources.evaluation_metrics(job.output, bundle)
    details = frame = None
    of = None if metrics is None else one_split(metrics).iloc[0]  # the figures are of what the headline is of
    if of is not None:
        details = frame = sources.details(job.output, bundle, of["dataset"], of["split"])
    if of is None or of["split"] == OUT_OF_FOLD:
        frame = sources.out_of_fold(job.output, bundle)
    content: dict[str, Any] = {}
    if frame is not None:
        content["dice"], content["mask_share"] = frame["dice"].to_numpy(np.float64), sources.mask_share(frame)
        if bundle.classes:
            content["scored"], content["predicted"] = sources.scored_of(bundle, frame)
        content |= _pictures(job, bundle, details)
    runs = sources.runs(job.output, bundle)
    failures = sources.rows_of(job.output, bundle, "failures")
    if runs is not None:
        empty = tables.FAILURES.empty_table().to_pandas()
        failures = empty if failures is None else failures[failures["run_key"].isin(runs["run_key"])]
    evaluated = Evaluated(
        model=_facts(bundle),
        metrics=metrics,
        history=sources.history(job.output, bundle),
        best_epoch=bundle.trained.get("best_epoch"),
        runs=runs,
        failures=failures if runs is not None else None,
        guards=_guards(bundle),
        folds=_folds(job, bundle),
        **content,
    )
    if metrics is None and frame is None and runs is None and evaluated.history is None:
        raise UsageError(
            f"Expected an evaluation, a training or a run of {bundle.model_id} in {job.output}, but there is none. `output` is the "
            "one that the jobs wrote to."
        )
    return f"{bundle.model_id}-evaluation", f"Evaluation of {bundle.model_id}", evaluation_sections(evaluated)


def _pictures(job: ReportJob, bundle: Bundle, frame: Any) -> dict[str, Any]:
    single = pictures.showable(frame)
    if single is None or job.examples == 0:
        return {}
    shown, unread = pictures.examples(pictures.spread(single, job.examples), bundle)
    found: dict[str, Any] = {"spread": shown, "unread": unread}
    chosen = pictures.worst(single, bundle, job.examples)
    found["worst"], unread = pictures.examples(chosen, bundle)
    found["worst_rows"] = pictures.worst_rows(chosen)
    found["unread"] += unread
    if bundle.classes and not bundle.multi_label and job.explanations:
        from medvision_ray.scoring.predictor import Predictor

        chosen = pictures.to_explain(single, bundle, job.explanations)
        found["explained"], unread = pictures.examples(chosen, bundle, Predictor(bundle))
        found["unread"] += unread
    return found


def _training(job: ReportJob, bundle: Bundle) -> tuple[str, str, list[Section]]:
    trained = Trained(
        model=_facts(bundle),
        history=sources.history(job.output, bundle),
        trained=bundle.trained,
        metrics=bundle.metrics,
        guards=_guards(bundle),
        folds=_folds(job, bundle),
        settings={
            "Architecture": bundle.architecture.model_dump(mode="json"),
            "Preprocessing": bundle.preprocess.model_dump(mode="json"),
        },
    )
    return f"{bundle.model_id}-training", f"Training of {bundle.model_id}", training_sections(trained)


def _guards(bundle: Bundle) -> list[tuple[str, Mapping[str, Any]]]:
    """Of an ensemble, its members'."""
    return [(one.model_id, one.trained) for one in bundle.members or (bundle,)]


def _folds(job: ReportJob, bundle: Bundle) -> Folds | None:
    summary = sources.folds(job.output, bundle)
    if summary is None:
        return None
    metrics = sources.evaluation_metrics(job.output, bundle)
    return Folds(summary, None if metrics is None else metrics[metrics["split"] == OUT_OF_FOLD])


def _comparison(job: ReportJob, bundle: Bundle) -> tuple[str, str, list[Section]]:
    if job.baseline is None:
        raise UsageError("Expected `baseline`, the bundle that a comparison report compares with.")
    baseline = load_bundle(job.baseline)
    found = sources.comparisons(job.output, bundle, baseline)
    if not found:
        raise UsageError(
            f"Expected a comparison of {bundle.model_id} with {baseline.model_id} in {job.output}, but there is none. Run "
            "`medvision compare` first."
        )
    stem = f"{bundle.model_id}-against-{baseline.model_id}"
    compared = Compared(found, _facts(bundle), _facts(baseline))
    return stem, f"{bundle.model_id} compared with {baseline.model_id}", comparison_sections(compared)


def _night(job: ReportJob, bundle: Bundle) -> tuple[str, str, list[Section]]:
    run = sources.run_of(job.output, bundle, job.run_key)
    if run is None:
        which = f"run {job.run_key}" if job.run_key is not None else "scoring run"
        raise UsageError(f"Expected a finished {which} of {bundle.model_id} in {job.output}, but there is none.")
    key = str(run["run_key"])
    columns = tables.probability_columns(bundle.classes)
    rows = sources.run_rows(job.output, bundle, "predictions", key, [*_NIGHT_COLUMNS, *columns])
    failures = sources.run_rows(job.output, bundle, "failures", key)
    drift = sources.run_rows(job.output, bundle, "metrics", key)
    if drift is not None:
        drift = drift[drift["metric"].isin(DRIFT_METRICS)].rename(columns={"class": "class_name"})
    night = Night(
        run=run,
        classes=bundle.classes,
        probabilities=rows[columns].to_numpy(np.float64) if rows is not None and len(rows) and columns else None,
        predictions=rows,
        failures=failures if failures is not None else tables.FAILURES.empty_table().to_pandas(),
        drift=drift,
        model=_facts(bundle),
        versions=json.loads(run["versions"]) if isinstance(run.get("versions"), str) else None,
    )
    return f"{bundle.model_id}-night-{key}", f"Run {key} of {bundle.model_id}", night_sections(night)


_KINDS = {"training": _training, "evaluation": _evaluation, "comparison": _comparison, "night": _night}


def _facts(bundle: Bundle) -> list[tuple[str, str]]:
    architecture, preprocess = bundle.architecture, bundle.preprocess
    heads = [name for name in ("classification", "segmentation") if getattr(architecture, name)]
    facts = [
        ("Model", bundle.model_id),
        ("Encoder", architecture.encoder),
        ("Heads", " and ".join(heads)),
        ("Classes", ", ".join(bundle.classes) or "none"),
        ("Input", f"{preprocess.size[0]} x {preprocess.size[1]} px, {preprocess.color}"),
    ]
    known = [name for name in ("epochs", "best_epoch", "seed") if name in bundle.trained]
    return facts + [(name.replace("_", " ").capitalize(), str(bundle.trained[name])) for name in known]
