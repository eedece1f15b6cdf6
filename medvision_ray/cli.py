"""`medvision VERB`: parse, call one function, print what happened; no logic."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from medvision_ray import __version__
from medvision_ray.cli_bundle import add_bundle_verb
from medvision_ray.cli_calibrate import add_calibrate_options, calibrate, calibrate_overrides
from medvision_ray.cli_cluster import add_cluster_verbs, split_submission
from medvision_ray.cli_explain import add_explain_options, explain, explain_overrides
from medvision_ray.cli_output import print_facts, reader_may_leave
from medvision_ray.cli_score import add_score_options, score_overrides
from medvision_ray.cli_tables import add_tables_verb
from medvision_ray.ending import DONE, OVER_BUDGET, leave, run_to_the_end
from medvision_ray.errors import UsageError
from medvision_ray.foreign import only_ours
from medvision_ray.logs import FORMATS, Log, finite, open_log


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code of `ending.Ending`: 0 done, 1 failed, 2 wrong usage, 3 over the failure budget, ..."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given, behind = split_submission(given)
    options = argparse.Namespace(json="--json" in given, verb=None, begun=None, behind=behind)
    refused: UsageError | None = None
    try:
        _parser().parse_args(given, options)
        options.log = open_log(options.log_format, debug=options.debug)
    except UsageError as error:
        options.log, refused = _log_before_options(given), error
    options.log.configure(options.verb)
    _quiet()

    def run() -> tuple[int, dict[str, Any]]:
        if refused is not None:
            raise refused
        code, result = options.run(options)
        return int(code), result

    with reader_may_leave():
        with only_ours(options.log):
            ending = run_to_the_end(run, options.log)
            if options.begun is not None:
                from medvision_ray.on_finish import conclude

                conclude(options.verb, options.begun, ending, options.log)
            options.log.end(options.verb or "medvision", ending.status, ending.exit_code, ending.result)
        if options.json:
            told = ending.result if ending.error is None else {"error": ending.error, "exit_code": ending.exit_code}
            sys.stdout.write(json.dumps(finite(told), default=str) + "\n")
    return ending.exit_code


def program(verb: str | None = None) -> NoReturn:
    """Run the command line of this process, or `verb` with its options, and end the process."""
    leave(main([verb, *sys.argv[1:]] if verb else None))


def _log_before_options(given: Sequence[str]) -> Log:
    """The log of a command line that is refused: the format is still looked for."""
    finder = _Parser(add_help=False, allow_abbrev=False)
    finder.add_argument("--log-format", choices=FORMATS)
    try:
        return open_log(finder.parse_known_args(given)[0].log_format, debug=False)
    except UsageError:
        return Log()


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals end like every other refusal."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\n{self.format_usage().strip()}")


def _quiet() -> None:
    """Keep the engine's own chatter out of the job's output; warnings and errors stay."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="medvision", description="Score and train on medical images with Ray.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    jobs = {
        "inventory": (_inventory, "list an archive and count what is new"),
        "train": (_train, "train a hybrid CNN and write its bundle"),
        "tune": (_tune, "search for a better configuration of a train job"),
        "evaluate": (_evaluate, "measure a bundle on a labelled split"),
        "compare": (_compare, "compare two bundles on the same labelled images"),
        "calibrate": (_calibrate, "fit calibration and operating points of a bundle to a val split"),
        "score": (_score, "score what is new in an archive and publish it"),
        "explain": (_explain, "show where in single images a bundle sees what it says"),
        "report": (_report, "write one HTML page about a model"),
        "serve": (_serve, "answer single images over HTTP"),
    }
    for name, (run, text) in jobs.items():
        verb = verbs.add_parser(name, help=text, description=text)
        add_job_options(verb)
        if name == "inventory":
            _add_inventory_options(verb)
        if name == "score":
            add_score_options(verb)
        if name == "tune":
            verb.add_argument("--train", metavar="FILE", help="YAML file of the train job, in place of `train`")
        if name == "serve":
            _add_serve_options(verb)
        if name == "calibrate":
            add_calibrate_options(verb)
        if name == "explain":
            add_explain_options(verb)
        verb.set_defaults(run=run)
    demo = verbs.add_parser("demo", help="make a phantom archive and run every job on it")
    demo.add_argument("--folder", default="demo", help="where to work; a folder of an earlier demo is replaced")
    _add_json(demo)
    demo.set_defaults(run=_demo)
    add_tables_verb(verbs, _add_json)
    add_cluster_verbs(verbs, _add_json)
    add_bundle_verb(verbs, _add_json)
    config = verbs.add_parser("config", help="look at a configuration").add_subparsers(dest="action", required=True)
    show = config.add_parser("show", help="print the full effective configuration of a job, documented")
    show.add_argument("job", choices=sorted(jobs))
    add_job_options(show)
    show.set_defaults(run=_config_show)
    return parser


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """The options that every job has, here and in jobs/."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of the job")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override an option; repeatable",
    )
    _add_json(parser)


def _add_inventory_options(parser: argparse.ArgumentParser) -> None:
    """A huge archive in lists, one a part."""
    parser.add_argument(
        "--split", type=int, metavar="N", help="list once and write a list for each of N parts (docs/scaling.md)"
    )
    parser.add_argument("--to", metavar="URI", help="folder or prefix for the lists")


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Enough to serve without a file."""
    parser.add_argument(
        "--bundle",
        action="append",
        default=[],
        metavar="URI",
        help="bundle to serve; repeatable, the first is the default",
    )
    for flag, key, text in (
        ("--host", "http.host", "address to listen on"),
        ("--port", "http.port", "TCP port"),
        ("--worklist", "worklist", "`output` of score jobs whose tables the viewer page lists"),
        ("--record", "record.output", "folder or URI whose tables keep a row of every answer"),
    ):
        parser.add_argument(flag, dest=key, help=f"{text} (`{key}`)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    """The options on output, which every verb has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object last on standard output")
    parser.add_argument(
        "--log-format",
        choices=FORMATS,
        help="what standard error carries; `json` is one object a line (MEDVISION_LOG_FORMAT)",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="show texts of libraries and of unexpected errors, which can hold identifiers (MEDVISION_DEBUG)",
    )


def _begin(options: argparse.Namespace, name: str) -> Any:
    """A job's configuration; from now on the log follows it, and whom it names is told of the end."""
    from medvision_ray.on_finish import begin
    from medvision_ray.promotion import resolved

    job = _job(options, name)
    begin(name, job, options.log)
    options.begun = job
    return resolved(job)


def _job(options: argparse.Namespace, name: str) -> Any:
    from medvision_ray.config import JOBS, load_job

    return load_job(JOBS[name], options.config, options.overrides)


def _inventory(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    import pyarrow.compute as pc

    from medvision_ray.archive.inventory import list_archive, only_new
    from medvision_ray.bundle import load_bundle
    from medvision_ray.privacy import address_pseudonymiser

    job = _begin(options, "inventory")
    if options.split is not None:
        return _divide(options, job)
    found = list_archive(job.archive, address_pseudonymiser(job.privacy) if job.bundle else None)
    result: dict[str, Any] = {"archive": job.archive.uri, "objects": found.objects.num_rows}
    result.update({name: getattr(found, name) for name in ("excluded", "older", "duplicates", "volumes")})
    result["bytes"] = pc.sum(found.objects["size"]).as_py() or 0
    if job.bundle:
        found = only_new(found, job.output, load_bundle(job.bundle).model_id)
        result.update(already_done=found.already_done, new=found.objects.num_rows)
    print_facts(options, result)
    return DONE, result


def _divide(options: argparse.Namespace, job: Any) -> tuple[int, dict[str, Any]]:
    from medvision_ray.archive.divide import divide
    from medvision_ray.privacy import address_pseudonymiser

    if options.to is None:
        raise UsageError("Expected `--to FOLDER` with `--split`: a folder or prefix for the lists of the parts.")
    done = divide(job.archive, options.split, options.to, address_pseudonymiser(job.privacy), options.log)
    result = {"archive": job.archive.uri, "objects": sum(done.objects), "bytes": done.bytes}
    result |= {"excluded": done.excluded, "older": done.older, "parts": len(done.files)}
    result |= {"smallest": min(done.objects), "largest": max(done.objects), "first_list": done.files[0]}
    print_facts(options, result)
    return DONE, {**result, "lists": [{"file": f, "objects": n} for f, n in zip(done.files, done.objects, strict=True)]}


def _train(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    job = _begin(options, "train")
    if job.folds:
        from medvision_ray.learning.folds import cross_validate

        found = cross_validate(job, options.log)
    else:
        from medvision_ray.learning.train import train

        found = train(job, options.log)
    result = {"bundle": found.bundle.uri, "model_id": found.bundle.model_id, **found.summary}
    print_facts(options, {"bundle": found.bundle.uri, "model_id": found.bundle.model_id})
    return DONE, result


def _tune(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.on_finish import begin

    if options.train is not None:
        from medvision_ray.config import read_yaml

        options.overrides = [f"train={json.dumps(read_yaml(options.train))}", *options.overrides]
    job = _job(options, "tune")
    begin("tune", job.train, options.log)
    options.begun = job.train
    from medvision_ray.learning.tune import tune

    found = tune(job, options.log)
    if not options.json:
        varied = list(job.search)
        for row in found.trials:
            score = "" if row["val_score"] is None else f"{row['val_score']:.4f} at epoch {row['best_epoch']}"
            values = "  ".join(f"{key}={row[key]}" for key in varied)
            sys.stdout.write(f"trial {row['trial']:>3}  {row['state']:<8} {score:<22} {values}\n")
    print_facts(options, {"best_config": found.best_uri})
    return DONE, {**found.summary, "trials": found.trials}


def _evaluate(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    job = _begin(options, "evaluate")
    from dataclasses import asdict

    from medvision_ray.evaluation.evaluate import evaluate

    found = evaluate(job, options.log)
    if not options.json:
        for row in found.metrics:
            shown = row.class_name in ("all", "macro") or "@" in row.metric  # at the operating points a class counts
            if row.subgroup == "all" and shown and row.value is not None:
                interval = f"  [{row.ci_low:.4f}, {row.ci_high:.4f}]" if row.ci_low is not None else ""
                sys.stdout.write(f"{row.class_name:>6} {row.metric:<30} {row.value:.4f}{interval}\n")
    result = {
        "key": found.key,
        "model_id": found.model_id,
        "images": found.images,
        "failed": found.failed,
        "metrics": [asdict(row) for row in found.metrics if row.subgroup == "all"],
        "subgroups": [asdict(row) for row in found.metrics if row.subgroup != "all"],
    }
    return OVER_BUDGET if found.run.over_budget else DONE, result


def _compare(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    job = _begin(options, "compare")
    from medvision_ray.evaluation.compare import compare

    found = compare(job, options.log)
    if not options.json:
        for row in found.comparison.differences:
            if row.class_name in ("all", "macro") and row.difference is not None:
                interval = f"  [{row.ci_low:+.4f}, {row.ci_high:+.4f}]" if row.ci_low is not None else ""
                figures = f"{row.value:.4f} against {row.baseline:.4f}, {row.difference:+.4f}{interval}"
                sys.stdout.write(f"{row.class_name:>6} {row.metric:<30} {figures}\n")
    result = {"comparison": found.uri, "left_out": found.left_out}
    print_facts(options, result)
    return OVER_BUDGET if found.over_budget else DONE, {**found.facts(), **result}


def _calibrate(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    options.overrides = [*options.overrides, *calibrate_overrides(options)]
    return DONE, calibrate(_begin(options, "calibrate"), options, options.log)


def _score(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    options.overrides = [*options.overrides, *score_overrides(options)]
    job = _begin(options, "score")
    from dataclasses import asdict

    from medvision_ray.scoring.run import preview, score

    if options.dry_run:
        options.begun = None  # a preview is no run that anybody waits for
        counts = preview(job)
        print_facts(options, counts)
        return DONE, counts
    summary = score(job, options.log)
    print_facts(options, {"run": summary.sentence()})
    if summary.over_budget:
        over = ", ".join(summary.over_budget)
        options.log.warning(f"done, but over budget (`budget`, `drift.max_psi`): {over}.", event="over_budget")
    return OVER_BUDGET if summary.over_budget else DONE, asdict(summary)


def _explain(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    options.overrides = [*options.overrides, *explain_overrides(options)]
    result = explain(_begin(options, "explain"), options.log)
    print_facts(options, result)
    return OVER_BUDGET if result["failed"] else DONE, result


def _report(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    job = _begin(options, "report")
    from medvision_ray.reporting.collect import build_report

    result = {"report": build_report(job)}
    print_facts(options, result)
    return DONE, result


def _serve(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    found = [
        f"{key}={value}"
        for key in ("http.host", "http.port", "worklist", "record.output")
        if (value := getattr(options, key)) is not None
    ]
    if options.bundle:
        found.append(f"bundles={json.dumps(options.bundle)}")
    options.overrides = [*options.overrides, *found]
    job = _begin(options, "serve")
    from medvision_ray.serving.serve import serve

    return DONE, serve(job, options.log)


def _demo(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.demo.run import run_demo

    return DONE, run_demo(options.folder, options.log)


def _config_show(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.config import JOBS, show_job

    model = JOBS[options.job]
    given = bool(options.config or options.overrides)
    job = _job(options, options.job) if given else None
    if not options.json:
        sys.stdout.write(show_job(model, job))
    return DONE, job.model_dump(mode="json") if job else {}


if __name__ == "__main__":
    program()
