"""Connect to Ray, or start one here, for as long as a job runs."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from medvision_ray.config import RayConfig
from medvision_ray.errors import MedVisionError
from medvision_ray.native import REUSE_FREED_MEMORY

ResultT = TypeVar("ResultT")


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
    """Call what waits for Ray Train or Ray Tune in a thread of its own, so that signals reach the program as ever.

    In the main thread both put handlers of their own in the place of the program's for SIGINT, which end a training with
    code 0 and a search as if it had been done, and stay there afterwards (Ray 2.60). What is interrupted is not waited
    for: it ends with the session.
    """
    if threading.current_thread() is not threading.main_thread():
        return fit()
    thread = ThreadPoolExecutor(1, "medvision-fit")
    try:
        return thread.submit(fit).result()
    finally:
        thread.shutdown(wait=False)


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
