"""A Ray cluster of three nodes on this machine, and the nodes and processes in it that can be killed or cut off."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
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
_POLL_SECONDS = 0.05


def prepare_environment(folder: Path, settings: Mapping[str, str]) -> None:
    """Set what Ray reads when it is imported; its files go to `folder`."""
    os.environ.update({**_SETTINGS, **settings, "RAY_TMPDIR": str(folder)})


class LocalCluster:
    """A head that runs no work and two nodes of one logical CPU; use it from the main thread.

    Make it after `prepare_environment` and the forge, which must see the same settings.
    """

    def __init__(self, forge: int, folder: Path) -> None:
        """Args: forge: process number of the parent of all workers; folder: where it notes their nodes."""
        self._forge, self._folder = forge, folder
        self._cluster: Any = None
        self.start()

    @property
    def address(self) -> str:
        """Of the head that is there now."""
        return str(self._cluster.address)

    def start(self) -> None:
        """Start a head and its nodes."""
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments(0))
        self.replace_nodes()

    def nodes(self) -> list[Any]:
        """The nodes that work."""
        return sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)

    def kill_node(self, choice: int) -> None:
        """SIGKILL the raylet of a node that works."""
        nodes = self.nodes()
        self.remove(nodes[choice % len(nodes)])

    def remove(self, node: Any) -> None:
        """SIGKILL the raylet of this node; its workers end with it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def add_node(self) -> Any:
        """One more node that works."""
        return self._cluster.add_node(**self._arguments(_NODE_CPUS))

    def replace_nodes(self) -> None:
        """Add nodes until there are as many as at first."""
        while len(self._cluster.worker_nodes) < _NODES:
            self.add_node()

    def kill_head(self) -> None:
        """SIGKILL everything of the head: its raylet and the cluster's only store of facts."""
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def workers(self, *titles: str, node: Any = None) -> list[int]:
        """Processes of all nodes, or of one, whose title holds one of these texts."""
        found = sorted(pid for pid in _children(self._forge) if any(title in _title(pid) for title in titles))
        return [pid for pid in found if node is None or self._raylet_of(pid) == node.raylet_socket_name]

    def node_of(self, pid: int) -> Any:
        """The node of a worker."""
        return next(node for node in self.nodes() if node.raylet_socket_name == self._raylet_of(pid))

    def signal_raylet(self, node: Any, number: signal.Signals) -> None:
        """Send a signal to a node's raylet, if it is there."""
        for info in node.all_processes["raylet"]:
            with suppress(ProcessLookupError):
                os.kill(info.process.pid, number)

    def signal_workers(self, node: Any, number: signal.Signals) -> None:
        """Send a signal to every worker of a node."""
        for pid in self.workers("", node=node):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def await_declared_dead(self, node: Any, seconds: float) -> float:
        """Wait until the head counts a node as dead; the answer is how long that took."""
        begun = time.monotonic()
        while any(row["Alive"] and row["NodeID"] == node.node_id for row in self._cluster.global_state.node_table()):
            assert time.monotonic() - begun < seconds, "the head still counts the node as alive"
            time.sleep(_POLL_SECONDS)
        return time.monotonic() - begun

    def stop(self) -> None:
        """End every process of the cluster."""
        self._cluster.shutdown()

    def _raylet_of(self, pid: int) -> str:
        try:
            return (self._folder / f"node-of-{pid}").read_text()
        except FileNotFoundError:
            return ""

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
