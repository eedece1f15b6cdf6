"""A Ray cluster of three nodes on this machine, and the processes in it that can be killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

# Loss of a node is noticed after about two seconds, instead of the thirty that suit a data centre.
_SETTINGS = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OPENBLAS_NUM_THREADS": "1",  # its threads do not survive the forge's fork
}
_OBJECT_STORE_BYTES = 80 << 20
_NODES, _NODE_CPUS = 2, 1


def prepare_environment(folder: Path) -> None:
    """Set what Ray reads when it is imported; its files go to `folder`."""
    os.environ.update({**_SETTINGS, "RAY_TMPDIR": str(folder)})


class LocalCluster:
    """A head that runs no work and two nodes of one logical CPU; use it from the main thread.

    Make it after `prepare_environment` and the forge, which must see the same settings.
    """

    def __init__(self, forge: int) -> None:
        """Args: forge: process number of the parent of all workers."""
        self._forge = forge
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(initialize_head=True, head_node_args=self._arguments(0))
        for _ in range(_NODES):
            self._add()
        self.address: str = self._cluster.address

    def kill_node(self, choice: int) -> None:
        """SIGKILL the raylet of a node that works."""
        nodes = sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)
        self._cluster.remove_node(nodes[choice % len(nodes)], allow_graceful=False)

    def replace_nodes(self) -> None:
        """Add nodes until there are as many as at first."""
        while len(self._cluster.worker_nodes) < _NODES:
            self._add()

    def workers(self, *titles: str) -> list[int]:
        """Processes of the nodes whose title holds one of these texts."""
        return sorted(pid for pid in _children(self._forge) if any(title in _title(pid) for title in titles))

    def stop(self) -> None:
        """End every process of the cluster."""
        self._cluster.shutdown()

    def _add(self) -> None:
        self._cluster.add_node(**self._arguments(_NODE_CPUS))

    @staticmethod
    def _arguments(cpus: int) -> dict[str, Any]:
        return {
            "num_cpus": cpus,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "setup_worker_path": str(Path(__file__).with_name("ray_worker.py")),
        }


def kill(pid: int) -> bool:
    """SIGKILL; False where the process was gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _children(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = place.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(place.parent.name))
    return found


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
