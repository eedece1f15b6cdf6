"""One holder at a time; a dead one is replaced, a living one is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from medvision_ray import storage
from medvision_ray.scoring import lease as room
from medvision_ray.scoring.lease import Holder, LeaseHeldError, lease

_HOLD = """
import sys, time
from medvision_ray.scoring.lease import lease
with lease(sys.argv[1], "night", "the archive"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life every 50 ms, dead after 1 s of silence."""
    monkeypatch.setattr(room, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(room, "EXPIRE_SECONDS", 1.0)
    monkeypatch.setattr(room, "_LOOK_SECONDS", 0.02)


def _hold(output: str) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, output], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def _plant(output: str, **changes: object) -> str:
    """A lease of somebody on another machine."""
    holder = Holder("the archive", "node-7", 4711, "another boot", 1, "2026-11-24T01:00:00+00:00", 3, False)
    place = storage.join(output, "leases", "night", "000005.json")
    storage.write_bytes(place, json.dumps(vars(replace(holder, **changes))).encode())  # type: ignore[arg-type]
    return place


def test_second_taker_is_told_who_holds_it(store: str) -> None:
    holder = _hold(store)
    try:
        with pytest.raises(LeaseHeldError, match=rf"process {holder.pid} on .*, since 20"), lease(store, "night", "x"):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_killed_holder_is_replaced_at_once(store: str) -> None:
    holder = _hold(store)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lease(store, "night", "the archive") as mine:
        mine.assert_held()


def test_released_lease_is_free_and_leaves_one_object(store: str) -> None:
    for _ in range(3):
        with lease(store, "night", "the archive"):
            pass
    names = [name for name in _objects(store)]
    assert names == ["000003.json"]


def _objects(store: str) -> list[str]:
    from medvision_ray.listing import list_objects

    return [item.path for item in list_objects(storage.join(store, "leases", "night"))]


@pytest.mark.usefixtures("quick")
def test_silent_holder_elsewhere_is_replaced_after_the_expiry(store: str) -> None:
    _plant(store)
    with lease(store, "night", "the archive") as mine:
        mine.assert_held()


@pytest.mark.usefixtures("quick")
def test_holder_elsewhere_that_shows_life_is_left_alone(store: str) -> None:
    _plant(store)
    ended = threading.Event()

    def live() -> None:
        renewals = 3
        while not ended.wait(0.05):
            renewals += 1
            _plant(store, renewals=renewals)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(LeaseHeldError, match="process 4711 on node-7"), lease(store, "night", "the archive"):
            pass
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("quick")
def test_holder_that_was_overtaken_notices(store: str) -> None:
    with lease(store, "night", "the archive") as mine:
        storage.write_bytes(storage.join(store, "leases", "night", "000002.json"), b"{}")
        with pytest.raises(LeaseHeldError, match="took over"):
            mine.assert_held()


def test_of_many_takers_one_wins_at_a_time(store: str) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with lease(store, "night", "the archive", wait_seconds=60):
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == [1, 1, 1, 1]


def test_reused_process_number_is_not_the_holder(store: str) -> None:
    _plant(store, place=room._here(), pid=os.getpid(), process_start=1)
    with lease(store, "night", "the archive") as mine:
        mine.assert_held()
