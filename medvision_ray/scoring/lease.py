"""One run at a time: a lease in the output folder, taken over when its holder is dead.

A lease is a chain of numbered objects `leases/NAME/NNNNNN.json`; the highest number holds. A number
is taken by a conditional put, so two takers never both win, on S3 and on a disk alike. The holder
rewrites its object every few seconds. Whether it is alive is seen by watching that object change,
so clocks of different machines need not agree; on the same machine its process is looked up.

The lease keeps two runs from doing the same work. That nothing is published twice does not hang on
it: a paused holder that wakes up late meets the tables' own transactions.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from medvision_ray import listing, storage
from medvision_ray.errors import MedVisionError, StorageError

RENEW_SECONDS = 10.0
EXPIRE_SECONDS = 45.0
_LOOK_SECONDS = 0.5


class LeaseHeldError(MedVisionError):
    """Somebody else holds the lease."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        place: names the machine's boot and the process namespace; process numbers mean something only there.
        process_start: start of the process in clock ticks, so that a reused number is not taken for it.
        renewals: grows with each sign of life.
    """

    run: str
    host: str
    pid: int
    place: str
    process_start: int
    since: str
    renewals: int
    released: bool

    def sentence(self) -> str:
        """For a person."""
        return f"process {self.pid} on {self.host}, since {self.since}"


@contextlib.contextmanager
def lease(output: str, name: str, run: str, wait_seconds: float = 0.0) -> Iterator[Lease]:
    """Hold a lease inside the block.

    Args:
        name: what is leased.
        run: what it is held for, in words.
        wait_seconds: how long to wait for a living holder to end.

    Raises:
        LeaseHeldError: a living holder has it.
    """
    folder = storage.join(output, "leases", name)
    held = Lease(folder, _take(folder, run, time.monotonic() + wait_seconds), run)
    try:
        yield held
    finally:
        held.release()


class Lease:
    """A lease that this process holds; a thread renews it."""

    def __init__(self, folder: str, number: int, run: str) -> None:
        self._folder = folder
        self._number = number
        self._run = run
        self._renewals = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True, name="lease")
        self._thread.start()

    def assert_held(self) -> None:
        """Check that nobody took the lease over while this process was stalled.

        Raises:
            LeaseHeldError: somebody did.
        """
        highest = max(_numbers(self._folder), default=0)
        if highest > self._number:
            raise LeaseHeldError(
                f"This process was silent for more than {EXPIRE_SECONDS:g} s and another one took over {self._run}. "
                "Nothing is lost; look at the other one."
            )

    def release(self) -> None:
        """Give the lease back. A failing store is left to the expiry."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(StorageError):
            if max(_numbers(self._folder), default=0) == self._number:
                _write(self._folder, self._number, _self(self._run, self._renewals, released=True))
            for number in _numbers(self._folder):
                if number < self._number:
                    storage.delete_object(_place(self._folder, number))

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            self._renewals += 1
            with contextlib.suppress(StorageError):
                _write(self._folder, self._number, _self(self._run, self._renewals, released=False))


def _take(folder: str, run: str, until: float) -> int:
    while True:
        number = max(_numbers(folder), default=0)
        if number:
            holder = _read(folder, number)
            if holder is not None and not _is_over(folder, number, holder, until):
                continue
        mine = json.dumps(asdict(_self(run, 0, released=False))).encode()
        if storage.create_exclusive(_place(folder, number + 1), mine):
            return number + 1


def _is_over(folder: str, number: int, holder: Holder, until: float) -> bool:
    """Whether a holder has released, is dead, or falls silent while it is watched.

    Raises:
        LeaseHeldError: it lives, and `until` (monotonic) is past.
    """
    seen, silent_since = holder, time.monotonic()
    while not seen.released:
        here = _process_state(seen)
        if here is False:
            return True
        now = time.monotonic()
        if (here or seen.renewals != holder.renewals) and now >= until:
            raise LeaseHeldError(
                f"Expected to be the only one at {seen.run}, but {seen.sentence()} holds it and is alive. "
                "Wait for it to end; it will do the work."
            )
        if now - silent_since > EXPIRE_SECONDS:
            return True
        time.sleep(_LOOK_SECONDS)
        latest = _read(folder, number)
        if latest is None or max(_numbers(folder), default=0) != number:
            return False  # somebody else was faster: look again
        if latest != seen:
            seen, silent_since = latest, time.monotonic()
    return True


def _process_state(holder: Holder) -> bool | None:
    """Whether a holder on this very machine lives; None where that cannot be seen from here."""
    if holder.place != _here() or not holder.place:
        return None
    return _process_start(holder.pid) == holder.process_start


def _self(run: str, renewals: int, *, released: bool) -> Holder:
    return Holder(
        run, socket.gethostname(), os.getpid(), _here(), _process_start(os.getpid()), _SINCE, renewals, released
    )


_SINCE = datetime.now(timezone.utc).isoformat(timespec="seconds")


def _here() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux: the expiry decides
        return ""


def _process_start(pid: int) -> int:
    """Start of a process in clock ticks since boot; 0 where there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0
    return 0 if fields[0] in ("Z", "X") else int(fields[19])


def _place(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _numbers(folder: str) -> list[int]:
    try:
        found = [item.path for item in listing.list_objects(folder)]
    except StorageError as error:
        if error.code != "not_found":
            raise
        return []
    return [int(path.removesuffix(".json")) for path in found if path.removesuffix(".json").isdigit()]


def _read(folder: str, number: int) -> Holder | None:
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(_place(folder, number)))
    except StorageError as error:
        if error.code != "not_found":
            raise
        return None
    return Holder(**content)


def _write(folder: str, number: int, holder: Holder) -> None:
    storage.write_bytes(_place(folder, number), json.dumps(asdict(holder)).encode())
