"""`medvision tables ACTION`: upkeep and proof of the tables, and what is computed from them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvision_ray.privacy import Pseudonymiser
    from medvision_ray.scoring.erasure import Erasure

DONE, FAILED = 0, 1


def add_tables_verb(verbs: Any, add_json: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add `tables` and its actions to the verbs of the command line."""
    actions = verbs.add_parser(
        "tables", help="compact, vacuum, list or verify the tables; rows of studies; erase patients"
    ).add_subparsers(dest="action", required=True)
    found = {}
    for name, run, text in (
        ("compact", _compact, "merge small files and checkpoint the logs; publishing does this by itself"),
        ("vacuum", _vacuum, "show, and with --delete remove, files that no recent version needs"),
        ("history", _history, "list the commits of every table"),
        ("verify", _verify, "prove the tables; exit code 1 where something does not hold"),
        ("erase-patient", _erase, "show, and with --delete delete, every row of patients"),
        ("studies", _studies, "write one row a study of which a model has scored several objects, as Parquet"),
    ):
        found[name] = actions.add_parser(name, help=text, description=text)
        found[name].add_argument(
            "--output", required=True, metavar="URI", help="the folder or prefix that holds tables/"
        )
        add_json(found[name])
        found[name].set_defaults(run=run)
    vacuum = found["vacuum"]
    vacuum.add_argument(
        "--retain-hours", type=float, metavar="HOURS", help="versions so young stay; 168 (a week) unless given"
    )
    vacuum.add_argument("--delete", action="store_true", help="remove the files; without it they are only shown")
    vacuum.add_argument(
        "--force", action="store_true", help="allow less than 24 hours; nothing may read or publish meanwhile"
    )
    vacuum.add_argument("--log", action="store_true", help="commits so old too; `history` then ends there")
    found["history"].add_argument("--limit", type=int, metavar="N", help="the last N commits of each table")
    found["studies"].add_argument("--bundle", required=True, metavar="URI", help="the model")
    found["studies"].add_argument("--file", metavar="URI", help="where to write; OUTPUT/reports/MODEL-studies.parquet")
    erase = found["erase-patient"]
    erase.add_argument("--patient-key", action="append", default=[], metavar="KEY", help="as in the tables; repeatable")
    erase.add_argument(
        "--uri",
        action="append",
        default=[],
        metavar="URI",
        help="an object of theirs, for rows without a patient_key; with a slash at its end, all below; repeatable",
    )
    erase.add_argument(
        "--ids-from-stdin",
        action="store_true",
        help="read patient IDs, one a line, an issuer behind a tab, and make their keys",
    )
    erase.add_argument(
        "--key-file",
        metavar="FILE",
        help="pseudonym key for that, and for --uri where tables hold hashes; else MEDVISION_PSEUDONYM_KEY",
    )
    erase.add_argument("--delete", action="store_true", help="delete the rows; without it they are only counted")
    found["verify"].add_argument("--run", dest="run_key", metavar="RUN_KEY", help="verify one run")


def _compact(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import tables

    done = tables.compact(options.output)
    lines = [f"{item.table}: {item.files_before} files before, {item.files_after} after" for item in done]
    return _finish(options, DONE, {"tables": [asdict(item) for item in done]}, lines)


def _vacuum(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import tables
    from medvision_ray.tables.upkeep import RETAIN_HOURS

    hours = RETAIN_HOURS if options.retain_hours is None else options.retain_hours
    done = tables.vacuum(options.output, retain_hours=hours, delete=options.delete, force=options.force)
    verb = "deleted" if options.delete else "would go; --delete removes them"
    lines = [f"{item.table}: {len(item.files)} files of {item.bytes / 1e6:.1f} MB {verb}" for item in done]
    logs = tables.shorten_logs(options.output, retain_hours=hours, delete=options.delete) if options.log else {}
    lines += [f"{name}: {count} files of the log {verb}" for name, count in logs.items()]
    return _finish(options, DONE, {"tables": [asdict(item) for item in done], "log_files": logs}, lines)


def _erase(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import storage
    from medvision_ray.archive.ids import ONLINE
    from medvision_ray.scoring.erasure import erase_patients
    from medvision_ray.tables import SERIES

    names = _names(options)
    keys, places = list(options.patient_key), []
    for address in options.uri:
        place = address.rstrip("/") if address.startswith(ONLINE) else storage.absolute(address)
        hashed = [names.address(place + part) for part in ("", SERIES)] if names is not None else []
        places += [place + "/"] if address.endswith("/") else [place, *hashed]
    keys += _keys_from(sys.stdin, names) if options.ids_from_stdin and names is not None else []
    done = erase_patients(options.output, keys, places, delete=options.delete)
    return _finish(options, DONE, asdict(done), _told(done))


def _keys_from(lines: Iterable[str], names: Pseudonymiser) -> list[str]:
    parts = [line.rstrip("\r\n").partition("\t") for line in lines if line.strip()]
    return [names.patient(patient, issuer) for patient, _, issuer in parts]


def _names(options: argparse.Namespace) -> Pseudonymiser | None:
    """Whoever makes pseudonyms; None where no key is given and none is needed."""
    from medvision_ray.config import PrivacyConfig
    from medvision_ray.privacy import load_pseudonymiser

    config = PrivacyConfig(key_file=options.key_file, uri="hash")
    if not (options.ids_from_stdin or options.key_file or os.environ.get(config.key_env)):
        return None
    return load_pseudonymiser(config)


def _told(done: Erasure) -> list[str]:
    """What went, what comes back, and what else there is to do."""
    verb = "deleted" if done.deleted else "would go; --delete deletes them"
    lines = [f"{name}: {rows} rows {verb}" for name, rows in done.rows.items()]
    if done.unmatched_patients:
        lines.append(
            f"{done.unmatched_patients} of the {done.patients} patients have no row here. Where one should have: was it written "
            "with this pseudonym key, and does the ID come with its issuer?"
        )
    if done.in_archive:
        lines.append(
            f"{done.in_archive} of their {done.images} objects are still in the archive: the next run scores them again. "
            "Delete them there first."
        )
    if done.not_asked:
        lines.append(f"Of {done.not_asked} objects it is not known whether the archive still holds them.")
    lines += [
        f"Run {run} is not finished and can hold rows of theirs: finish it and erase again, or delete runs/{run}."
        for run in done.unfinished_runs
    ]
    if done.made_from_rows:
        lines.append(
            f"{len(done.made_from_rows)} files were made from rows or images; look at them or make them again:"
        )
        lines += [f"  {path}" for path in done.made_from_rows]
    if done.deleted:
        lines.append(
            "Older versions of the tables and their logs hold the rows until `medvision tables vacuum --log --delete` "
            "a week from now (docs/operations.md says how to do it at once)."
        )
    return lines


def _history(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray import tables

    found = tables.history(options.output, options.limit)
    lines = [
        f"{item.table:<12} {item.version:>6} {item.time:%Y-%m-%d %H:%M:%S} {item.operation:<14} {item.run_key or '-':<28} "
        f"rows +{item.rows_added or 0} -{item.rows_removed or 0}, files +{item.files_added or 0} -{item.files_removed or 0}"
        for item in found
    ]
    return _finish(options, DONE, {"commits": [asdict(item) for item in found]}, lines)


def _verify(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.verification import verify

    found = verify(options.output, options.run_key)
    result = {"ok": not found.findings, **asdict(found)}
    counted = ", ".join(f"{rows} {name} in {found.files[name]} files" for name, rows in found.rows.items())
    lines = [f"{found.runs} runs looked at; {counted}."]
    lines += [f"FAILED {item.check}: {item.sentence()}" for item in found.findings] or ["All invariants hold."]
    return _finish(options, FAILED if found.findings else DONE, result, lines)


def _studies(options: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from medvision_ray.bundle import load_bundle
    from medvision_ray.promotion import resolve
    from medvision_ray.reporting.studies import write_studies

    place, count = write_studies(options.output, load_bundle(resolve(options.bundle)), options.file)
    return _finish(options, DONE, {"file": place, "studies": count}, [f"{count} studies in {place}"])


def _finish(
    options: argparse.Namespace, code: int, result: dict[str, Any], lines: list[str]
) -> tuple[int, dict[str, Any]]:
    if not options.json:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return code, result
