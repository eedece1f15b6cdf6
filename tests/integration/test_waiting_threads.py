"""Threads that wait for Ray are out of it before the session ends: one that is not ends the whole program with code 1."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import ray

from medvision_ray.cluster import interruptible, ray_session, waiting_threads
from medvision_ray.config import RayConfig

pytestmark = [pytest.mark.integration, pytest.mark.core]
_SECONDS = 600  # what would be waited for


class _Waiting:
    async def wait(self) -> None:
        import asyncio

        await asyncio.sleep(_SECONDS)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def _actor() -> None:
    waiting = ray.remote(num_cpus=0)(_Waiting).remote()
    ray.get(waiting.wait.remote())


def _task() -> None:
    ray.get(ray.remote(num_cpus=0)(_sleep).remote(_SECONDS))


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(RayConfig(num_cpus=2, object_store_bytes=100 << 20)):
        yield


def _interrupt_soon() -> None:
    main = threading.main_thread().ident or 0
    threading.Timer(1.5, signal.pthread_kill, [main, signal.SIGINT]).start()


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and so do these tests there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _left(name: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(name)]


@pytest.mark.parametrize("wait", [_actor, _task])
def test_what_is_interrupted_leaves_no_thread_in_ray(wait: Callable[[], None]) -> None:
    _interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        interruptible(wait)
    assert _left("medvision-fit") == []


def test_several_that_wait_and_those_not_begun_are_let_go() -> None:
    begun: list[int] = []

    def one(number: int) -> None:
        begun.append(number)
        _actor()

    def both() -> None:
        with waiting_threads("medvision-several", 2) as threads:
            for found in [threads.submit(one, number) for number in range(4)]:
                found.result()

    _interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        both()
    assert _left("medvision-several") == []
    assert sorted(begun) == [0, 1]


def test_those_that_go_on_after_one_failed_can_be_interrupted_too() -> None:
    def refuse() -> None:
        raise ValueError("no")

    def both() -> None:
        with waiting_threads("medvision-rest", 2) as threads:
            threads.submit(_actor)
            threads.submit(refuse).result()

    _interrupt_soon()
    with pytest.raises(KeyboardInterrupt):
        both()
    assert _left("medvision-rest") == []


def test_where_one_fails_those_that_run_go_on_to_their_end() -> None:
    ended: list[int] = []

    def slow() -> None:
        ray.get(ray.remote(num_cpus=0)(_sleep).remote(1.0))
        ended.append(1)

    def refuse() -> None:
        raise ValueError("no")

    def both() -> None:
        with waiting_threads("medvision-some", 2) as threads:
            threads.submit(slow)
            threads.submit(refuse).result()

    with pytest.raises(ValueError, match="no"):
        both()
    assert ended == [1]
    assert _left("medvision-some") == []
