"""Processes that a test has started, whoever started them for it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def processes(of: str) -> list[int]:
    """Ids of this test's own descendants whose command line names something."""
    parents, commands = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (place / "stat").read_text().rpartition(")")[2].split()
            if state[0] != "Z":
                parents[int(place.name)] = int(state[1])
                commands[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return sorted(pid for pid in ours if of in commands.get(pid, ""))
