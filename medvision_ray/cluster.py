"""Connect to Ray, or start one here, for as long as a job runs."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

from medvision_ray.config import RayConfig
from medvision_ray.errors import MedVisionError
from medvision_ray.native import REUSE_FREED_MEMORY

ResultT = TypeVar("ResultT")
_LET_GO_SECONDS = 5.0


@contextmanager
def ray_session(config: RayConfig, *, dashboard: bool = False) -> Iterator[None]:
    """Have Ray connected inside the block. A connection that is there already is used and left open.

    Args:
        dashboard: start the dashboard (on loopback) with a Ray that is started here; Ray Train's
            clean-up actor needs its API.

    Raises:
        MedVisionError: no cluster answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry out of a hospital
    # A checkpoint counts only once the controller has polled it; its default is every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray Data loads while Ray's own processes start.
    loading = threading.Thread(target=importlib.import_module, args=("ray.data",), daemon=True)
    loading.start()
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        # Ray Data's actors raise a warning of Ray's core at start (ray#53727) that a reader takes for an error.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        # Ray ends a worker that idles for a second and starts another (2 CPU-seconds of imports) for the next
        # block's write, which took a quarter of two cores.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
        # Workers started ahead of need are not the ones that actors get, and cost 4 CPU-seconds of imports.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        os.environ.setdefault("RAY_enable_worker_prestart", "0")
    # Ray's workers inherit it; not left behind, for the next session may be on another's cluster.
    lent = {} if address else {name: value for name, value in REUSE_FREED_MEMORY.items() if name not in os.environ}
    os.environ.update(lent)
    stopping = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                object_store_memory=config.object_store_bytes,
                include_dashboard=dashboard,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except ConnectionError:
        raise MedVisionError(
            f"Expected a Ray cluster at {address}, but none answers. Start one with `ray start --head`, "
            "or leave `ray.address` empty to start one for this job."
        ) from None
    loading.join()
    _hear_sigterm(stopping)
    # Their progress would bury the job's own; after loading, which sets the levels anew.
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        for name in lent:
            os.environ.pop(name, None)


def _hear_sigterm(handler: Any) -> None:
    """Bring SIGTERM to Python again: to the handler from before Ray, or to Ray's own where there was none.

    Ray's core puts absl's failure handler before Python's. It writes a stack, goes on to Python's, and has set an alarm by
    then that aborts the process 3 s later (code 134), whatever it is still writing, publishing or letting go of (Ray 2.60).
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler if callable(handler) else signal.getsignal(signal.SIGTERM))


def interruptible(fit: Callable[[], ResultT]) -> ResultT:
    """Call what waits for Ray Train in a thread of its own, so that signals reach the program as ever.

    In the main thread it puts a handler of its own in the place of the program's for SIGINT, which ends a training with
    code 0 and stays there afterwards (Ray 2.60).
    """
    if threading.current_thread() is not threading.main_thread():
        return fit()
    with waiting_threads("medvision-fit", 1) as threads:
        return threads.submit(fit).result()


@contextmanager
def waiting_threads(name: str, at_once: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that wait for Ray. What was submitted ends with the block, and is let go where the block is interrupted.

    A thread that still waits for Ray when the session ends meets a core that is gone, and then Ray ends the whole program
    at once with code 1 and without a word, now and then (Ray 2.60).

    Args:
        name: of the threads, as none other in this process begins.
        at_once: the most of them.
    """
    pool = ThreadPoolExecutor(at_once, name)
    try:
        try:
            yield pool
        except Exception:
            pool.shutdown(cancel_futures=True)  # those that run go on to their end, and what they make is kept
            raise
        pool.shutdown()
    finally:  # a thread is left only where one of the waits above was interrupted
        pool.shutdown(wait=False, cancel_futures=True)
        _let_go(name)


def _let_go(name: str) -> None:
    """End what threads of this name wait for in Ray, until they have ended or `_LET_GO_SECONDS` have passed.

    `trainer.fit` keeps the actor that it waits for to itself, so it is looked up where the thread stands.
    """
    until = time.monotonic() + _LET_GO_SECONDS
    # Not by `is_alive`: Python 3.11 takes a thread for ended once a wait for it was interrupted.
    while left := [thread for thread in threading.enumerate() if thread.name.startswith(name)]:
        if time.monotonic() > until:
            return
        for thread in left:
            _end_waits(sys._current_frames().get(thread.ident or 0))
        time.sleep(0.05)


def _end_waits(frame: FrameType | None) -> None:
    """Kill the actors and cancel the tasks that a frame and its callers hold."""
    import ray
    from ray.actor import ActorHandle
    from ray.exceptions import RayError

    while frame is not None:
        for value in list(frame.f_locals.values()):
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, ActorHandle):
                    ray.kill(one)
                elif isinstance(one, ray.ObjectRef):
                    with suppress(ValueError, RayError):  # one of an actor's ends with the actor
                        ray.cancel(one, force=True)
        frame = frame.f_back


def worker_runtime_env() -> dict[str, Any]:
    """Runtime environment of workers that run a network: `REUSE_FREED_MEMORY`, where they do not have it already.

    A Ray that was started here gave it to all of its processes. Asking for it nonetheless costs a worker half a second: it
    waits for the agent that makes runtime environments.
    """
    inherited = REUSE_FREED_MEMORY.items() <= os.environ.items()
    return {} if inherited else {"env_vars": REUSE_FREED_MEMORY}


def cluster_gpus() -> int:
    """GPUs of the connected cluster."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def cluster_cpus() -> float:
    """CPUs of the connected cluster."""
    import ray

    return float(ray.cluster_resources().get("CPU", 0))
