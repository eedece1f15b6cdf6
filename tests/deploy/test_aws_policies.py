"""Policies of deploy/aws allow what the code asks of S3, and nothing that it never asks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from s3_requests import OUTPUT_PREFIX, POLICIES, Asked, allowed, asked_by, many, recorded, statements

from medvision_ray import storage, tables
from medvision_ray.archive.inventory import freeze, image_id, list_archive, only_new, read_frozen
from medvision_ray.bundle import Bundle, load_bundle, save_bundle
from medvision_ray.config import ArchiveConfig, ScoreJob, build_job
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.listing import list_objects
from medvision_ray.logs import silent
from medvision_ray.promotion import promote, resolve, rollback
from medvision_ray.scoring.erasure import erase_patients
from medvision_ray.scoring.lease import lease
from medvision_ray.scoring.run import score
from medvision_ray.verification import verify

NEVER_SEEN = {"s3:AbortMultipartUpload"}
"""Asked only when a large write breaks off; without it its parts stay and cost money."""


@pytest.fixture
def buckets(s3: str) -> tuple[str, str]:
    """Two: the archive and the output."""
    archive = s3.removeprefix("s3://")
    output = archive + "-tables"
    storage.s3_client().create_bucket(Bucket=output)
    return archive, output


def _commit(archive: str, output: str, run: str, numbers: range, *, replaces: bool = False) -> None:
    schema, about = tables.predictions_schema(("a",)), {"run_key": run, "run_date": date(2026, 3, 1), "model_id": "m"}
    rows = []
    for number in numbers:
        uri = f"{archive}/{number}.dcm"
        mask = np.random.default_rng(number).bytes(1 << 20)  # large enough for uploads in parts
        row = {**about, "image_id": image_id(uri, "1"), "uri": uri, "etag": "1", "patient_key": "a" * 26}
        rows.append({**row, "mask": mask, "p_a": 1.0})
    tables.commit(output, "predictions", schema, pa.Table.from_pylist(rows, schema).to_batches(), run)
    for name, known in (("failures", tables.FAILURES), ("runs", tables.RUNS)):
        row = {**rows[0], "job": "score", "scored": len(rows), "failed": 1, "listed": len(rows) + 1, "retried": 0}
        table = pa.Table.from_pylist([{key: value for key, value in row.items() if key in known.names}], known)
        ids = ("m", np.array([rows[0]["image_id"]])) if replaces and name == "failures" else None
        tables.commit(output, name, known, table.to_batches(), run, replacing=ids)


def _saved(place: str, name: str, like: Bundle) -> Bundle:
    return save_bundle(
        place,
        name=name,
        architecture=like.architecture,
        preprocess=like.preprocess,
        classes=like.classes,
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=like.build_model(),
    )


def _night(archive: str, output: str, bundle: Bundle) -> None:
    """What a run does without its workers."""
    listed = list_archive(ArchiveConfig(uri=archive))
    found = only_new(listed, output, "m", None)
    frozen = f"{output}/runs/r1/inventory.parquet"
    freeze(found, frozen, 8)
    read_frozen(frozen)
    storage.read_start(f"{archive}/1.dcm", 3)
    storage.read_bytes(f"{archive}/1.dcm")
    assert not storage.exists(f"{archive}/none.dcm")
    with lease(output, "publish-m", "a test"):
        for number in range(3):
            _commit(archive, output, f"r{number}", range(20 * number, 20 * number + 12), replaces=number == 2)
    storage.delete_tree(f"{output}/runs/r1")
    tables.compact(output)
    saved = [_saved(f"{output}/bundles/{name}", name, bundle) for name in ("old", "new")]
    for one in saved:
        promote(one.uri, f"{output}/bundles/current")
    rollback(f"{output}/bundles/current")
    load_bundle(resolve(f"{output}/bundles/current")).build_model()
    files, folder = storage.filesystem(f"{output}/training/chest")  # as a training's checkpoints are written and go
    files.copy_file(f"{output.removeprefix('s3://')}/bundles/old/bundle.yaml", f"{folder}/1/state")
    files.move(f"{folder}/1/state", f"{folder}/2/state")
    files.delete_dir(folder)
    verify(output)
    assert erase_patients(output, ["a" * 26], delete=True).rows["predictions"] == 36


def test_a_night_asks_what_its_policies_allow_and_all_of_it(buckets: tuple[str, str], bundle: Bundle) -> None:
    archive, output = buckets
    storage.write_bytes(f"s3://{archive}/1.dcm", b"pixels")
    with recorded() as asked:
        _night(f"s3://{archive}", f"s3://{output}/{OUTPUT_PREFIX}", bundle)
    held = statements("archive-read", "tables-write", archive=archive, tables=output)
    assert {item for item in asked if not allowed(item, held)} == set()
    _assert_each_is_asked(held, asked)


@pytest.mark.integration
def test_a_whole_run_with_its_workers_asks_no_more(
    buckets: tuple[str, str], bundle: Bundle, phantom: PhantomArchive
) -> None:
    archive, output = buckets
    place = f"s3://{output}/{OUTPUT_PREFIX}"
    for found in list(list_objects(str(phantom.night_1)))[:6]:
        storage.write_bytes(f"s3://{archive}/{found.path}", storage.read_bytes(found.uri))
    for found in list_objects(bundle.uri):
        storage.write_bytes(f"{place}/bundles/random/{found.path}", storage.read_bytes(found.uri))
    settings = {
        "archive": {"uri": f"s3://{archive}"},
        "bundle": f"{place}/bundles/random",
        "output": place,
        "privacy": {"demo_key": True},
        "scoring": {"block_rows": 3, "actors": 1},
        "budget": {"max_failure_fraction": 1.0},
        "ray": {"num_cpus": 2},
    }
    with recorded() as asked:
        assert score(build_job(ScoreJob, settings, "a test"), silent).listed == 6
    held = statements("archive-read", "tables-write", archive=archive, tables=output)
    assert {item for item in asked if not allowed(item, held)} == set()
    assert {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"} == {item.action for item in asked}


def test_upkeep_asks_what_its_policy_adds(buckets: tuple[str, str]) -> None:
    archive, output = buckets
    place = f"s3://{output}/{OUTPUT_PREFIX}"
    _commit(f"s3://{archive}", place, "r1", range(2))
    _commit(f"s3://{archive}", place, "r2", range(2, 4))
    tables.compact(place)
    with recorded() as asked:
        tables.vacuum(place, retain_hours=0, delete=True, force=True)
        tables.shorten_logs(place, retain_hours=0, delete=True)
    deleted = [item for item in asked if item.action == "s3:DeleteObject"]
    assert len(deleted) > 3
    night = statements("archive-read", "tables-write", archive=archive, tables=output)
    both = night + statements("tables-upkeep", tables=output)
    assert not all(allowed(item, night) for item in deleted)
    assert {item for item in asked if not allowed(item, both)} == set()


def _assert_each_is_asked(held: list[dict[str, Any]], asked: list[Asked]) -> None:
    """No action of the policies is there for nothing."""
    wanted = {action for statement in held for action in many(statement["Action"])}
    assert wanted - NEVER_SEEN == {item.action for item in asked}


@pytest.mark.parametrize(
    ("request_line", "copied_from", "expected"),
    [
        ("GET /b?list-type=2&prefix=x", None, [Asked("s3:ListBucket", "arn:aws:s3:::b")]),
        ("HEAD /b/a%20c", None, [Asked("s3:GetObject", "arn:aws:s3:::b/a c")]),
        ("PUT /b/k?partNumber=1&uploadId=u", None, [Asked("s3:PutObject", "arn:aws:s3:::b/k")]),
        ("DELETE /b/k?uploadId=u", None, [Asked("s3:AbortMultipartUpload", "arn:aws:s3:::b/k")]),
        ("PUT /b/k", "/a/o", [Asked("s3:GetObject", "arn:aws:s3:::a/o"), Asked("s3:PutObject", "arn:aws:s3:::b/k")]),
        ("POST /moto-api/reset", None, []),
    ],
)
def test_requests_are_told_as_actions(request_line: str, copied_from: str | None, expected: list[Asked]) -> None:
    assert asked_by(*request_line.split(), copied_from) == expected


def test_each_key_of_a_deletion_of_many_counts() -> None:
    body = "<Delete><Object><Key>a&amp;b</Key></Object><Object><Key>c/d</Key></Object></Delete>"
    found = asked_by("POST", "/b?delete", body=body)
    assert found == [Asked("s3:DeleteObject", f"arn:aws:s3:::b/{key}") for key in ("a&b", "c/d")]


def test_what_no_policy_allows_is_seen() -> None:
    held = statements("archive-read", archive="a")
    assert allowed(Asked("s3:GetObject", "arn:aws:s3:::a/x/y"), held)
    assert not allowed(Asked("s3:PutObject", "arn:aws:s3:::a/x"), held)
    assert not allowed(Asked("s3:GetObject", "arn:aws:s3:::ab/x"), held)
    with pytest.raises(AssertionError, match="known request"):
        asked_by("PUT", "/a/x?acl")


def _documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(POLICIES.glob("*.json")):
        yield path.stem, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "document"), list(_documents()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_policies_are_whole_and_narrow(name: str, document: dict[str, Any]) -> None:
    assert (document["Version"], set(document)) == ("2012-10-17", {"Version", "Statement"})
    assert len({statement["Sid"] for statement in document["Statement"]}) == len(document["Statement"])
    for statement in document["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        assert re.fullmatch(r"[A-Za-z0-9]+", statement["Sid"])
        actions = many(statement["Action"])
        if name == "bucket-tls":
            assert (statement["Effect"], statement["Principal"], actions) == ("Deny", "*", ["s3:*"])
            assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
            continue
        assert statement["Effect"] == "Allow"
        assert "Principal" not in statement
        assert all(re.fullmatch(r"(s3|kms|ec2|iam):[A-Za-z]+", action) for action in actions)
        assert "*" not in many(statement["Resource"]) or all(action.startswith("ec2:Describe") for action in actions)


def test_the_head_may_do_what_rays_node_provider_does_and_no_more() -> None:
    """Read out of Ray's source: calls of the client, and those of its resource objects by what they ask."""
    from ray.autoscaler._private.aws import node_provider

    source = Path(node_provider.__file__).read_text(encoding="utf-8")
    calls = set(re.findall(r"ec2(?:_fail_fast)?\.(?:meta\.client\.)?([a-z_]+)\(", source))
    calls |= set(re.findall(r"ec2\.meta\.client\.([a-z_]+)$", source, re.MULTILINE))
    calls |= {"describe_instances"} if "ec2.instances.filter(" in source else set()
    asked = {"".join(word.title() for word in call.split("_")) for call in calls}
    asked = {"RunInstances" if name == "CreateInstances" else name for name in asked}
    held = {action for statement in statements("cluster-head") for action in many(statement["Action"])}
    assert {f"ec2:{name}" for name in asked} == held - {"iam:PassRole"}


def test_the_launcher_names_the_policies_that_are_there() -> None:
    text = (POLICIES.parents[1] / "cluster.yaml").read_text(encoding="utf-8")
    named = set(re.findall(r"deploy/aws/([a-z-]+)\.json", text))
    assert named <= {name for name, _ in _documents()}
    assert {"archive-read", "tables-write"} <= named
    cluster = re.search(r"^cluster_name: (\S+)", text, re.MULTILINE)
    assert cluster is not None
    conditions = [statement.get("Condition", {}).get("StringEquals", {}) for statement in statements("cluster-head")]
    tagged = {value for item in conditions for key, value in item.items() if key.endswith("/ray-cluster-name")}
    assert tagged == {cluster[1]}
