"""Process-wide settings of native libraries, made once when a worker starts."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
LARGEST_REUSED_BYTES = 32 << 20
"""Largest block that `reuse_freed_memory` makes glibc keep; it refuses more."""
_KEPT_BYTES = 1 << 30
REUSE_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(LARGEST_REUSED_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT_BYTES),
}
"""Environment of a process that is started to do as after `reuse_freed_memory`, whatever threads it has.

Ray calls what actors and training workers do in a thread of its own. That one has a pool of memory by then, of blocks
that glibc maps and unmaps, and the function comes too late: it cost a sixth to a third of the CPU time of a scored image.
"""


def reuse_freed_memory() -> bool:
    """Let the allocator keep what a forward pass frees, instead of giving it back and faulting it in again.

    A network's activations are blocks of some MB, which glibc maps and unmaps at each pass: on the CPU a
    fifth of the time went into page faults (benchmarks/score_vs_dataloader.py). Blocks of up to 32 MB
    are reused from now on, so batches should be small enough to stay below.

    Returns:
        Whether the allocator took the settings; False where it is not glibc's.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, LARGEST_REUSED_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES))
    return all([mallopt(name, value) == 1 for name, value in settings])


def memory_bytes() -> int:
    """Memory that this process may hope for: the machine's, or its control group's limit where that is lower."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no such group, or `max`
            found.append(int(Path(place).read_text()))
    return min(found)
