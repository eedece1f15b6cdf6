"""Dynamic batches: what has come while the last batch was computed is computed together.

Ray's own `serve.batch` makes up the next batch as soon as its first item is there, though the last one is still being
computed: without a wait every batch is one object (seen with Ray 2.60: under 16 clients all of 655 batches were), and a wait
is time that single objects lose.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from typing import Generic, TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")


class Batcher(Generic[Given, Found]):
    """Collects items for a function of many; for one event loop.

    Args:
        function: results of a batch, in order; called in `executor`, one batch after the other.
        size: most items of a batch.
        wait_seconds: how long a batch that is not full waits for company.
        on_batch: is told how many items a batch has.
    """

    def __init__(
        self,
        function: Callable[[Sequence[Given]], Sequence[Found]],
        executor: Executor,
        size: int,
        wait_seconds: float,
        on_batch: Callable[[int], object],
    ) -> None:
        self._function, self._executor = function, executor
        self._size, self._wait_seconds, self._on_batch = size, wait_seconds, on_batch
        self._waiting: deque[tuple[Given, asyncio.Future[Found]]] = deque()
        self._full = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: Given) -> Found:
        """The result of one item; raises what the function raised for its batch."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Found] = loop.create_future()
        self._waiting.append((item, result))
        if len(self._waiting) >= self._size:
            self._full.set()
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        return await result

    async def _work(self) -> None:
        """Compute until nothing waits."""
        while self._waiting:
            if self._wait_seconds and len(self._waiting) < self._size:
                self._full.clear()
                with suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._wait_seconds)
            batch = self._take()
            if batch:
                await self._compute(batch)

    def _take(self) -> list[tuple[Given, asyncio.Future[Found]]]:
        """The oldest that somebody still waits for; who gave up left a cancelled future."""
        batch: list[tuple[Given, asyncio.Future[Found]]] = []
        while self._waiting and len(batch) < self._size:
            item, result = self._waiting.popleft()
            if not result.done():
                batch.append((item, result))
        return batch

    async def _compute(self, batch: list[tuple[Given, asyncio.Future[Found]]]) -> None:
        self._on_batch(len(batch))
        items = [item for item, _ in batch]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._executor, self._function, items)
            answered = list(zip(batch, found, strict=True))
        except Exception as error:
            for _, result in batch:
                if not result.done():
                    result.set_exception(error)
            return
        for (_, result), one in answered:
            if not result.done():
                result.set_result(one)
