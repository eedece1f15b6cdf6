"""Three Ray nodes on this machine (a head that runs no work, two that do), S3 on loopback: nodes killed, added, cut off.

Each test says what it disturbs, and what must come of it. MEDVISION_CLUSTER_RESULTS names a JSON file for what was
measured; it is written only when every test has passed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kills.forge import Driver
from kills.rounds import ACTOR, ROWS, RUN_SECONDS, Theatre
from kills.stage import Stage, stage
from kills.summary import machine

from medvision_ray import storage
from medvision_ray.bundle import Bundle, load_bundle
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.learning.history import read_history

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
_TRAINER = ("RayTrainWorker",)
_WAIT_SECONDS = 240.0
_LATE_SECONDS = 120.0
_POLL_SECONDS = 0.1


@pytest.fixture(scope="module")
def on() -> Iterator[Stage]:
    # A node without its head ends after this time; Ray's default is a minute.
    with stage(RAY_gcs_rpc_server_reconnect_timeout_s="15") as found:
        yield found


@pytest.fixture(scope="module")
def theatre(on: Stage, bundle: Bundle) -> Theatre:
    return Theatre(bundle.uri, on.store, on.cluster, on.forge)


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {}
    yield found
    place = os.environ.get("MEDVISION_CLUSTER_RESULTS")
    if place and len(found) == 4:
        result = {"command": "make test-cluster", "nodes": 3, "measured": found, "machine": machine()}
        Path(place).write_text(json.dumps(result, indent=1) + "\n")


def wait_until(on: Stage, driver: Driver, happened: Callable[[], bool], what: str) -> None:
    """Return as soon as something has happened; the driver must not end before."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while not happened():
        on.forge.poll()
        assert driver.code is None, driver.log.read_text()
        assert time.monotonic() < deadline, what
        time.sleep(_POLL_SECONDS)


def test_a_node_killed_and_another_added_while_scoring(on: Stage, theatre: Theatre, measured: dict[str, Any]) -> None:
    """Two actors on two nodes. One node dies with a block in hand, another comes: it takes over, every row is there once."""
    output, begun = "s3://hospital/node-killed", time.monotonic()
    driver = theatre.hold(lambda: theatre.start(output, None, actors=2), ROWS, 2, onwards=True)
    wait_until(on, driver, lambda: len(on.cluster.workers(*ACTOR)) == 2, "two actors were expected")
    victim = on.cluster.node_of(on.cluster.workers(*ACTOR)[0])
    on.cluster.remove(victim)
    killed = time.monotonic()
    added = on.cluster.add_node()
    wait_until(on, driver, lambda: bool(on.cluster.workers(*ACTOR, node=added)), "no actor came up on the added node")
    noticed = time.monotonic() - killed
    theatre.release()
    assert theatre.wait(driver) == 0, driver.log.read_text()
    assert theatre.problems(output) == []
    measured["node killed and added while scoring"] = {
        "seconds": round(time.monotonic() - begun, 1),
        "seconds_from_the_kill_to_an_actor_on_the_added_node": round(noticed, 1),
    }


def test_a_node_cut_off_and_back_again_while_scoring(on: Stage, theatre: Theatre, measured: dict[str, Any]) -> None:
    """The node of the only actor falls silent with a block in hand, is declared dead, and comes back when another
    actor has done that block: the late rows of the same objects are there twice in the run's folder, and once in the tables."""
    output, begun = "s3://hospital/node-cut-off", time.monotonic()
    driver = theatre.hold_at_first_marker(lambda: theatre.start(output, None, actors=1))
    (actor,) = on.cluster.workers(*ACTOR)
    node = on.cluster.node_of(actor)
    on.cluster.signal_raylet(node, signal.SIGSTOP)
    on.cluster.signal_workers(node, signal.SIGSTOP)
    theatre.release()
    declared = on.cluster.await_declared_dead(node, _WAIT_SECONDS)
    on.store.arm(ROWS, 1)
    theatre.await_held(driver)  # the block's rows, by an actor of the other node
    on.cluster.signal_workers(node, signal.SIGCONT)
    late = late_rows(on)
    on.cluster.signal_raylet(node, signal.SIGCONT)
    theatre.release()
    code = theatre.wait(driver)
    on.cluster.remove(node)
    on.cluster.replace_nodes()
    assert code == 0, driver.log.read_text()
    assert theatre.problems(output) == []
    assert late, "the actor that had been cut off wrote nothing any more, so this test has tested too little"
    measured["node cut off and back while scoring"] = {
        "seconds": round(time.monotonic() - begun, 1),
        "seconds_until_it_was_declared_dead": round(declared, 1),
        "files_of_rows_written_twice": late,
    }


def late_rows(on: Stage) -> int:
    """How many blocks have rows of two actors, waited for: a file of rows is named by its first object."""
    deadline = time.monotonic() + _LATE_SECONDS
    while time.monotonic() < deadline:
        names = {path for path in on.store.seen() if path.startswith("PUT")}
        blocks = Counter(re.search(r"/rows/(\d+)-", name).group(1) for name in names)  # type: ignore[union-attr]
        if twice := sum(count > 1 for count in blocks.values()):
            return twice
        time.sleep(_POLL_SECONDS)
    return 0


def test_a_head_lost_while_scoring(on: Stage, theatre: Theatre, measured: dict[str, Any]) -> None:
    """The head dies with rows written and rows to come: the command ends with an error, and run once more on a new
    cluster it finishes what is left; every row is there once."""
    output, begun = "s3://hospital/head-lost", time.monotonic()
    driver = theatre.hold(lambda: theatre.start(output, None, actors=2), ROWS, 4)
    on.cluster.kill_head()
    lost = time.monotonic()
    theatre.release()
    code = theatre.wait(driver)
    ended = time.monotonic() - lost
    assert code != 0, driver.log.read_text()
    written = blocks_of(output)
    assert written, "the first try has left no rows to go on from"
    on.cluster.stop()
    on.cluster.start()
    again = theatre.start(output, None, actors=2)
    assert theatre.wait(again) == 0, again.log.read_text()
    assert theatre.problems(output) == []
    measured["head lost while scoring"] = {
        "seconds": round(time.monotonic() - begun, 1),
        "exit_code_of_the_first_command": code,
        "seconds_until_it_ended": round(ended, 1),
        "blocks_that_were_not_scored_again": written,
    }


def blocks_of(output: str) -> int:
    bucket, prefix = output.removeprefix("s3://").split("/", 1)
    listed = storage.s3_client().list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/runs/").get("Contents", [])
    return sum("/rows/" in item["Key"] and item["Key"].endswith(".parquet") for item in listed)


def test_a_node_killed_while_two_workers_train(
    on: Stage, theatre: Theatre, phantom: PhantomArchive, measured: dict[str, Any]
) -> None:
    """One of two nodes dies after the third epoch and another comes: training goes on from its last
    registered checkpoint, what that holds is not trained again, and it ends with its bundle.

    An epoch takes a second here, and a checkpoint counts once the controller has looked, every half second: after the second
    epoch the first one's can still be on its way."""
    epochs, begun = 8, time.monotonic()
    copy_to_s3(phantom.folder, "s3://hospital/labelled")
    output = "s3://hospital/training"
    settings = {
        "output": output,
        "name": "tiny",
        "labels.table": f"s3://hospital/labelled/{phantom.labels.relative_to(phantom.folder).as_posix()}",
        "preprocess.size": "[64, 64]",
        "model.encoder": "tu-resnet10t",
        "model.decoder_channels": "[8, 8, 8, 8, 8]",
        "epochs": str(epochs),
        "batch_size": "4",
        "privacy.demo_key": "true",
        "ray.address": on.cluster.address,
    }
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    driver = on.forge.start(["train", "--json", *options])
    history = f"{output}/training/tiny/metrics.jsonl"

    wait_until(on, driver, lambda: len(read_history(history)) >= 3, "three epochs were expected")
    workers = on.cluster.workers(*_TRAINER)
    assert len({on.cluster.node_of(pid).node_id for pid in workers}) == 2, "a worker on each node was expected"
    before = read_history(history)
    on.cluster.remove(on.cluster.node_of(workers[-1]))
    killed = time.monotonic()
    on.cluster.add_node()
    assert len(before) < epochs

    def started_again() -> bool:
        return len(set(on.cluster.workers(*_TRAINER)) - set(workers)) == 2

    wait_until(on, driver, started_again, "the workers were not started again")
    resumed = time.monotonic() - killed
    assert on.forge.wait(driver, 2 * RUN_SECONDS) == 0, driver.log.read_text()
    after = read_history(history)
    assert [line["epoch"] for line in after] == list(range(1, epochs + 1))
    assert after[0] == before[0]  # the wall times in it would differ had it been trained again
    assert load_bundle(f"{output}/bundles/tiny").trained["epochs"] == epochs
    measured["node killed while training"] = {
        "seconds": round(time.monotonic() - begun, 1),
        "epochs_before_the_kill": len(before),
        "epochs_not_trained_again": sum(one == two for one, two in zip(before, after, strict=False)),
        "seconds_from_the_kill_to_the_new_workers": round(resumed, 1),
    }


def copy_to_s3(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(uri, path.relative_to(folder).as_posix()), path.read_bytes())
