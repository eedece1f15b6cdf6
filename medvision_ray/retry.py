"""Try again what may pass, with full jitter, at most so often and so long: the one layer of retries for a store.

The clients below it (boto3) make one attempt a call. Theirs could not be the layer: boto3's ends with the
answer's head, so it retries no body that breaks off, and its attempts would multiply with these.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from medvision_ray.errors import StorageError

T = TypeVar("T")

ATTEMPTS = 10
"""How often a call that may pass is tried."""
CREDENTIAL_ATTEMPTS = 3
"""How often a call is tried whose credentials are refused: they may have been renewed beside this process."""

_FIRST_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 10.0
_LAST_START_SECONDS = 90.0  # no attempt begins later; with the pauses' mean of 28 s the attempts end first
# Waiting does not help against these; every other OSError may pass (a network mount that stalls).
_PERMANENT = frozenset({errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EROFS, errno.EINVAL})


def retrying(call: Callable[[], T], uri: str) -> T:
    """The call's answer, tried again while its error may pass.

    Pauses are uniform between 0 and a bound that doubles ("full jitter", AWS Architecture Blog 2015): clients
    that were throttled together do not come back together. A store's Retry-After is waited for on top.

    Args:
        call: makes one attempt; raises StorageError or OSError.
        uri: what it is about, for the error.

    Raises:
        StorageError: it will not pass, or did not in time; `transient` is kept, so that a caller can tell.
    """
    started = time.monotonic()
    attempt = 1
    while True:
        try:
            return call()
        except StorageError as error:
            problem = error
        except OSError as error:
            problem = _os_error(error, uri)
        bound = min(_LONGEST_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))
        pause = min(_LONGEST_PAUSE_SECONDS, problem.retry_after) + random.uniform(0, bound)
        late = time.monotonic() + pause > started + _LAST_START_SECONDS
        if attempt >= _attempts(problem) or late:
            raise problem from None
        time.sleep(pause)
        attempt += 1


def _attempts(problem: StorageError) -> int:
    if problem.code == "credentials":
        return CREDENTIAL_ATTEMPTS
    return ATTEMPTS if problem.transient else 1


def _os_error(error: OSError, uri: str) -> StorageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return StorageError(f"Expected an object at {uri}, but there is none.", code="not_found")
    if isinstance(error, PermissionError):
        return StorageError(f"The store refused access to {uri}.", code="access_denied")
    return StorageError(f"{uri} could not be read or written.", transient=error.errno not in _PERMANENT)
