"""A job through Ray's job API: a name that is the same each time, its log followed, its own exit code.

`ray job submit` ends with 1 for every failure, leaves a job running when its terminal goes, and starts a
second one when it is called twice. Here an id is made of the verb, the day and what was given, so that the
same command finds its job again: it follows the one under way, answers with the code of the one that is
over, or begins the next attempt where that one failed or its cluster died with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medvision_ray.errors import MedVisionError, UsageError

DONE, FAILED, REFUSED, OVER_BUDGET, STOPPED = 0, 1, 2, 3, 143
FINAL = (DONE, REFUSED, OVER_BUDGET)
"""Codes that the same command would end with again; docs/operations.md."""
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")
_LOOK_SECONDS = 1.0
_STOP_SECONDS = 90.0
"""How long a stopped job may take; the head's RAY_JOB_STOP_WAIT_TIME_S should be less."""


class JobClient(Protocol):
    """What of `ray.job_submission.JobSubmissionClient` is used."""

    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any], **more: Any) -> str:
        """Begin a job."""
        ...

    def list_jobs(self) -> list[Any]:
        """Every job that the cluster knows."""
        ...

    def get_job_info(self, job_id: str) -> Any:
        """Its status and exit code."""
        ...

    def stop_job(self, job_id: str) -> bool:
        """SIGTERM, and SIGKILL later."""
        ...

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Its log from the beginning, until it is over."""
        ...


@dataclass(frozen=True)
class Submission:
    """What is submitted.

    Attributes:
        verb: of `medvision`.
        arguments: further arguments of the verb, as given.
        config: the job's YAML file on this machine, which travels with the job; None where it has none.
        day: what a name holds beside the content, usually the date: another day is another job.
        code: a wheel or package folder to ship; None where the cluster has the package.
    """

    verb: str
    arguments: tuple[str, ...] = ()
    config: Path | None = None
    day: str = ""
    code: Path | None = None

    @property
    def name(self) -> str:
        """The submission id without its attempt: the same for the same verb, day, arguments and configuration."""
        digest = hashlib.sha256()
        for part in (self.verb, *self.arguments):
            digest.update(part.encode() + b"\0")
        if self.config is not None:
            digest.update(self.config.read_bytes())
        return "-".join(part for part in (self.verb, self.day, digest.hexdigest()[:10]) if part)

    @property
    def entrypoint(self) -> str:
        """The command on the cluster, in the folder that travels."""
        given = ["--config", "job.yaml"] if self.config is not None else []
        return shlex.join(["python", "-m", "medvision_ray.cli", self.verb, *given, *self.arguments])

    def runtime_env(self, folder: Path) -> dict[str, Any]:
        """The job's surroundings; `folder` is an empty one, which gets the configuration and nothing else."""
        if self.config is not None:
            (folder / "job.yaml").write_bytes(self.config.read_bytes())
        (folder / "submission.txt").write_text(f"{self.name}\n", encoding="utf-8")  # Ray refuses an empty folder
        wanted: dict[str, Any] = {"working_dir": str(folder)}
        if self.code is not None:
            wanted["py_modules"] = [str(self.code)]
        return wanted


@dataclass(frozen=True)
class Attempt:
    """One submission of a name; `code` is None while it is under way."""

    number: int
    code: int | None


def attempts(jobs: Sequence[Any], name: str) -> list[Attempt]:
    """The attempts of a name that a cluster knows, oldest first."""
    found = []
    for job in jobs:
        base, separator, number = str(job.submission_id or "").rpartition("-a")
        if separator and base == name and number.isdigit():
            found.append(Attempt(int(number), exit_code(job)))
    return sorted(found, key=lambda attempt: attempt.number)


def exit_code(job: Any) -> int | None:
    """The exit code of a job as Ray tells of it, None while it is under way.

    Ray's status knows one failure alone; the driver's own code is in `driver_exit_code`, negative for a signal.
    A job that was stopped has none, and neither has one whose surroundings could not be made.
    """
    status = str(getattr(job.status, "value", job.status))
    if status not in _OVER:
        return None
    if status == "SUCCEEDED":
        return DONE
    if status == "STOPPED":
        return STOPPED
    code = job.driver_exit_code
    if code is None or code == 0:
        return FAILED
    return 128 - code if code < 0 else int(code)


@dataclass(frozen=True)
class Cluster:
    """A cluster that may be away for a while.

    Attributes:
        connect: makes a client; raises ConnectionError where nothing answers.
        say: takes our own sentences.
        patience_seconds: how long it is waited for.
        pause: sleeps for so many seconds.
    """

    connect: Callable[[], JobClient]
    say: Callable[[str], Any]
    patience_seconds: float = 600.0
    pause: Callable[[float], None] = time.sleep

    def client(self) -> JobClient:
        """A client, as soon as the cluster answers.

        Raises:
            MedVisionError: it does not.
        """
        waited, told = 0.0, False
        while True:
            try:
                return self.connect()
            except (ConnectionError, OSError):
                if waited >= self.patience_seconds:
                    raise MedVisionError(
                        "Expected a Ray cluster's job API at the address, but none has answered for "
                        f"{self.patience_seconds:g} s. Is the tunnel (`ray dashboard cluster.yaml`) open, and --address right?"
                    ) from None
            if not told:
                self.say(f"No cluster answers; waiting up to {self.patience_seconds:g} s.")
                told = True
            step = min(5.0, max(self.patience_seconds - waited, 0.1))
            self.pause(step)
            waited += step


def submit(
    wanted: Submission,
    cluster: Cluster,
    write: Callable[[str], Any],
    *,
    folder: Path,
    tries: int = 1,
    again: bool = False,
    wait: bool = True,
) -> tuple[str, int]:
    """Have a job done; answers the submission id and the job's exit code.

    Args:
        write: takes the job's log.
        folder: an empty folder for what travels.
        tries: attempts in this call; a code of `FINAL` is never tried again.
        again: begin a new attempt where one is over with a code of `FINAL`.
        wait: False returns code 0 once the job is submitted.

    Raises:
        MedVisionError: no cluster answers, or it refuses the job.
        KeyboardInterrupt, SystemExit: as they came; the job has been stopped by then.
    """
    surroundings = wanted.runtime_env(folder)
    tried = 0
    while True:
        client = cluster.client()
        known = attempts(client.list_jobs(), wanted.name)
        last = known[-1] if known else Attempt(0, FAILED)
        if last.number and last.code in FINAL and not again:
            cluster.say(
                f"{wanted.name}-a{last.number} is over with exit code {last.code}; --again submits it once more."
            )
            return f"{wanted.name}-a{last.number}", last.code
        if last.code is None:
            identity = f"{wanted.name}-a{last.number}"
            cluster.say(f"{identity} is under way already.")
        else:
            identity = f"{wanted.name}-a{last.number + 1}"
            _begin(client, identity, wanted.entrypoint, surroundings)
            cluster.say(f"Submitted {identity}.")
        if not wait:
            return identity, DONE
        again = False
        tried += 1
        code = _follow(cluster, client, identity, _Log(write))
        if code in FINAL or tried >= tries:
            return identity, FAILED if code is None else code
        cluster.say(f"{identity} ended with {'its cluster' if code is None else f'exit code {code}'}; trying again.")


def _begin(client: JobClient, identity: str, entrypoint: str, surroundings: dict[str, Any]) -> None:
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=identity, runtime_env=surroundings)
    except RuntimeError:
        # Two callers at once: the name is the lock, and whoever comes second follows the first.
        with suppress(RuntimeError, ConnectionError, OSError):
            client.get_job_info(identity)
            return
        raise MedVisionError(
            f"Expected the cluster to take {identity}, but it refused; its dashboard's log says why."
        ) from None


def _follow(cluster: Cluster, client: JobClient, identity: str, log: _Log) -> int | None:
    """The job's exit code once it is over; None where the cluster that comes back does not know the job."""
    try:
        while True:
            try:
                asyncio.run(log.tail(client, identity))
                job = client.get_job_info(identity)
            except (ConnectionError, OSError, RuntimeError, _client_errors()):
                client = cluster.client()
                if identity not in [job.submission_id for job in client.list_jobs()]:
                    return None
                job = client.get_job_info(identity)
            code = exit_code(job)
            if (
                code == FAILED and job.driver_exit_code is None
            ):  # its message can hold the driver's log, the type cannot
                cluster.say(f"{identity} has no exit code of its own: {job.error_type or 'its node is gone'}.")
            if code is not None:
                return code
            cluster.pause(_LOOK_SECONDS)
    except (KeyboardInterrupt, SystemExit):
        cluster.say(f"Stopping {identity}.")
        _stop(client, identity, cluster.pause)
        raise


class _Log:
    """Writes a job's log once; Ray begins each tail at its beginning."""

    def __init__(self, write: Callable[[str], Any]) -> None:
        self._write = write
        self._written = 0  # characters

    async def tail(self, client: JobClient, identity: str) -> None:
        """Write what is new until the job is over or the connection breaks."""
        come = 0
        async for text in client.tail_job_logs(identity):
            new = text[max(self._written - come, 0) :]
            come += len(text)
            if new:
                self._write(new)
                self._written = come


def _stop(client: JobClient, identity: str, pause: Callable[[float], None]) -> None:
    waited = 0.0
    with suppress(RuntimeError, ConnectionError, OSError):
        client.stop_job(identity)
        while exit_code(client.get_job_info(identity)) is None and waited < _STOP_SECONDS:
            pause(_LOOK_SECONDS)
            waited += _LOOK_SECONDS


def _client_errors() -> type[Exception]:
    """What the websocket of the log raises where the head goes."""
    from aiohttp import ClientError

    return ClientError


def connector(address: str) -> Callable[[], JobClient]:
    """Makes clients of Ray's own; RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH with RAY_AUTH_MODE=token are Ray's to read.

    Raises (the function that it answers):
        ConnectionError: nothing answers.
        UsageError: the cluster wants another token.
    """

    def connect() -> JobClient:
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            client: JobClient = JobSubmissionClient(address)
        except AuthenticationError:
            raise UsageError(
                "The cluster wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the file that its "
                "nodes have."
            ) from None
        except requests.exceptions.RequestException:
            raise ConnectionError from None
        return client

    return connect
