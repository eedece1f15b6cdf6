"""How many replicas there are: decided in Ray Serve's controller, by what the replicas say of themselves.

Serve's own policy counts the requests under way. A replica of ours refuses what it could not answer in time, so there are never many
more than it takes on, however many are refused: under ten times overload Serve's policy added none. Ray sends this module to the
controller by value, so it imports nothing of this package.
"""

from __future__ import annotations

from typing import Any

LOAD = "medvision_load"
"""Name of the figure that each replica records, see `Admission.load`."""


class ByLoad:
    """A policy of Ray Serve.

    Args:
        target: load of a replica, in (0, 1], at which their number stays.
    """

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        """Wanted number of replicas, not rounded yet, and no state.

        Args:
            context: Serve's `AutoscalingContext`; its loads are means over the last half minute.
        """
        loads = context.aggregated_metrics.get(LOAD, {})
        if not loads:  # none has said anything yet
            return context.target_num_replicas, {}
        return sum(loads.values()) / self._target, {}
