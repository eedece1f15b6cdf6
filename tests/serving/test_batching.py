"""Batches form while the one before is computed; an item's failure, a wait and a client that left do what they should."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from medvision_ray.serving.batching import Batcher


class Scorer:
    """Doubles its items; the first batch lasts until `go`."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.go.wait(20)
        if 13 in items:
            raise ValueError("unlucky")
        return [2 * item for item in items]


async def until(condition: object) -> None:
    while not condition():  # type: ignore[operator]
        await asyncio.sleep(0.002)


def batcher(scorer: Scorer, size: int = 4, wait: float = 0.0) -> tuple[Batcher[int, int], list[int]]:
    sizes: list[int] = []
    return Batcher(scorer, ThreadPoolExecutor(1), size, wait, sizes.append), sizes


def test_what_comes_while_a_batch_is_computed_is_the_next_batch() -> None:
    async def run() -> list[int]:
        score, sizes = batcher(scorer)
        first = asyncio.create_task(score(0))
        await until(lambda: scorer.batches)
        later = [asyncio.create_task(score(item)) for item in range(1, 7)]
        await asyncio.sleep(0.01)
        scorer.go.set()
        found = list(await asyncio.gather(first, *later))
        assert sizes == [len(batch) for batch in scorer.batches]
        return found

    scorer = Scorer()
    assert asyncio.run(run()) == [0, 2, 4, 6, 8, 10, 12]
    assert scorer.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_lone_item_waits_for_nobody() -> None:
    async def run() -> float:
        score, _ = batcher(scorer)
        started = time.perf_counter()
        for item in range(20, 40):
            assert await score(item) == 2 * item
        return time.perf_counter() - started

    scorer = Scorer()
    scorer.go.set()
    assert asyncio.run(run()) < 1.0
    assert len(scorer.batches) == 20


def test_a_wait_gathers_company_and_ends_when_the_batch_is_full() -> None:
    async def run() -> tuple[float, float]:
        score, _ = batcher(scorer, size=3, wait=0.2)
        started = time.perf_counter()
        await asyncio.gather(score(1), score(2))
        between = time.perf_counter()
        await asyncio.gather(score(3), score(4), score(5))
        return between - started, time.perf_counter() - between

    scorer = Scorer()
    scorer.go.set()
    patient, full = asyncio.run(run())
    assert scorer.batches == [[1, 2], [3, 4, 5]]
    assert patient >= 0.19
    assert full < 0.19


def test_a_failure_is_its_batch_s_alone() -> None:
    async def run() -> list[object]:
        score, _ = batcher(scorer, size=2)
        first = asyncio.create_task(score(0))
        await until(lambda: scorer.batches)
        later = [asyncio.create_task(score(item)) for item in (1, 13, 2, 3)]
        await asyncio.sleep(0.01)
        scorer.go.set()
        return list(await asyncio.gather(first, *later, return_exceptions=True))

    scorer = Scorer()
    found = asyncio.run(run())
    assert [value for value in found if isinstance(value, int)] == [0, 4, 6]
    assert [str(value) for value in found if isinstance(value, ValueError)] == ["unlucky", "unlucky"]
    assert scorer.batches == [[0], [1, 13], [2, 3]]


def test_who_gave_up_is_not_computed_for() -> None:
    async def run() -> None:
        score, _ = batcher(scorer)
        first = asyncio.create_task(score(0))
        await until(lambda: scorer.batches)
        gone, staying = asyncio.create_task(score(1)), asyncio.create_task(score(2))
        await asyncio.sleep(0.01)
        gone.cancel()
        first.cancel()  # under way: it is computed to the end, and nobody hears of it
        await asyncio.sleep(0.01)
        scorer.go.set()
        assert await staying == 4
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await score(5) == 10

    scorer = Scorer()
    asyncio.run(run())
    assert scorer.batches == [[0], [2], [5]]


def test_fewer_results_than_items_are_a_failure_and_no_endless_wait() -> None:
    async def run() -> list[object]:
        with ThreadPoolExecutor(1) as executor:
            score: Batcher[int, int] = Batcher(lambda items: items[1:], executor, 4, 0, lambda size: None)
            return list(await asyncio.wait_for(asyncio.gather(score(1), score(2), return_exceptions=True), 10))

    assert all(isinstance(value, ValueError) for value in asyncio.run(run()))
