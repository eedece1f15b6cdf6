"""Tell a command or a webhook how a job ended, so that a scheduler or a person learns of a failure.

Nothing that goes wrong here changes the job's exit code. What is sent is a closed list of facts: no
address of an object, no identifier, no configuration.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime, timezone
from email.message import Message
from http.client import HTTPException
from typing import IO, Any

from medvision_ray import monitoring, storage
from medvision_ray.config import (
    ArchiveConfig,
    EvaluateJob,
    LabelsConfig,
    LoggingConfig,
    OnFinishConfig,
    ScoreJob,
    Section,
    TrainJob,
)
from medvision_ray.defects import describe
from medvision_ray.ending import Ending, undisturbed
from medvision_ray.errors import UsageError
from medvision_ray.logs import RUN_COUNTS, Log, finite

EXIT_CODE_VARIABLE = "MEDVISION_EXIT_CODE"
TRIES = 3
_SHOWN_OUTPUT_BYTES = 4096
# Of a job's result, what may leave. A new fact of a result is not sent until it is named here.
SENT = (
    *("listed", "excluded", "already_done", "scored", "failed", "retried", "not_scored", "state", "reasons"),
    *("seconds", "stage_seconds", "bytes_read", "peak_memory_bytes", "images_per_second", "over_budget", "drift"),
    *("key", "images", "metrics", "name", "epochs", "best_epoch", "failures"),
)


def begin(name: str, job: Section, log: Log) -> None:
    """Let the log follow a job's configuration, and find out before the work that its end could not be told.

    Raises:
        UsageError: as `check`.
    """
    logging = getattr(job, "logging", None)
    log.configure(name, logging if isinstance(logging, LoggingConfig) else None)
    spared = tuple(storage.absolute(place) for item in ("output", "bundle") if (place := getattr(job, item, None)))
    for section in (getattr(job, "archive", None), getattr(job, "labels", None)):
        if isinstance(section, ArchiveConfig):
            log.cut_below(storage.absolute(section.uri), (*spared, section.list_file or "", section.s3_inventory or ""))
        elif isinstance(section, LabelsConfig):
            table = storage.absolute(section.table)
            log.cut_below(table.rpartition("/")[0], (*spared, table))
    if isinstance(job, ScoreJob | EvaluateJob | TrainJob):
        check(job.on_finish)


def conclude(name: str, job: Section, ending: Ending, log: Log) -> None:
    """Tell the cluster's metrics and whom `on_finish` names how a job ended; what fails here is only logged."""
    if not isinstance(job, ScoreJob | EvaluateJob | TrainJob):
        return
    try:
        with undisturbed():
            tell(job.on_finish, payload_of(name, ending, log), log, secrets=(job.privacy.key_env,))
            if not monitoring.record_end(job.ray, name, ending.status, ending.result):
                log.warning("The cluster's metrics could not be told how the job ended.", event="metrics")
    except KeyboardInterrupt:
        log.warning("Interrupted while telling how the job ended.", event="on_finish")
    except Exception as error:  # a defect of telling must not change how the job ended
        found = describe(error)
        log.error(found.sentence(), event="defect", kind=found.kind, places=list(found.places))


def check(config: OnFinishConfig) -> None:
    """Find out before the work, not after it, that nobody could be told.

    Raises:
        UsageError: the command is no program here, or the token's variable is empty.
    """
    if config.command and shutil.which(config.command[0]) is None:
        raise UsageError("Expected a program that can be run in `on_finish.command`, but its first word names none.")
    if config.token_env is not None and not _token(config.token_env):
        raise UsageError(
            "Expected the webhook's token in the environment variable that `on_finish.token_env` names, but it is empty "
            "or holds blanks."
        )


def tell(config: OnFinishConfig, payload: dict[str, Any], log: Log, *, secrets: tuple[str, ...] = ()) -> None:
    """Run the command and post to the webhook, if the job's end is one that they want to hear of.

    Args:
        payload: from `payload_of`.
        secrets: environment variables that the command does not get.
    """
    if not config.wanted or (config.when == "failure" and payload["exit_code"] == 0):
        return
    body = json.dumps(payload).encode()
    if config.command:
        hidden = (*secrets, *([config.token_env] if config.token_env else []))
        _run_command(config, body, payload["exit_code"], hidden, log)
    if config.webhook is not None:
        _post(config, body, log)


def payload_of(job: str, ending: Ending, log: Log) -> dict[str, Any]:
    """What is sent: how the job ended, what it counted, and of its result the facts of a closed list."""
    result = ending.result
    counts = {name: result[name] for name in RUN_COUNTS if name in result}
    known = {name: value for name, value in log.facts.items() if name in ("total", "done", "failed")}
    return {
        "job": job,
        "status": ending.status,
        "exit_code": ending.exit_code,
        "run_key": result.get("run_key") or log.facts.get("run_key"),
        "model_id": result.get("model_id") or log.facts.get("model_id"),
        "counts": counts or known,
        "error": ending.error,
        "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "total_seconds": round(log.seconds, 1),
        "result": {name: finite(result[name]) for name in SENT if name in result},
    }


def _run_command(config: OnFinishConfig, body: bytes, code: int, hidden: tuple[str, ...], log: Log) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment[EXIT_CODE_VARIABLE] = str(code)
    try:
        child = subprocess.Popen(
            config.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a group of its own, so that the time limit ends its children too
        )
    except (OSError, ValueError):
        log.warning("`on_finish.command` could not be started; nobody was told by it.", event="on_finish")
        return
    try:
        output, _ = child.communicate(body, timeout=config.timeout_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        output, _ = child.communicate()
        _tell_failure(log, f"took longer than {config.timeout_seconds:g} s and was ended", output)
        return
    if child.returncode != 0:
        _tell_failure(log, f"ended with code {child.returncode}", output)


def _tell_failure(log: Log, how: str, output: bytes) -> None:
    """The site's own command: it was given nothing to hide, so the end of what it wrote is shown."""
    tail = output[-_SHOWN_OUTPUT_BYTES:].decode("utf-8", "replace").strip()
    said = f" It wrote:\n{tail}" if tail else " It wrote nothing."
    log.warning(f"`on_finish.command` {how}; the job's exit code stays as it is.{said}", event="on_finish")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry result and token to a host that nobody configured."""

    def redirect_request(  # noqa: PLR0917 - the signature is urllib's
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def _post(config: OnFinishConfig, body: bytes, log: Log, wait: Callable[[float], None] = time.sleep) -> None:
    """Three tries, with jitter between them; connection errors and 5xx answers are tried again."""
    reason = ""
    for number in range(TRIES):
        if number:
            wait(2.0 ** (number - 1) * random.uniform(0.5, 1.5))
        reason = _with_deadline(lambda: _try_post(config, body), config.timeout_seconds)
        if not reason:
            return
        if not reason.startswith(("no answer", "status 5")):
            break
    log.warning(f"`on_finish.webhook` was not told: {reason}. The job's exit code stays as it is.", event="on_finish")


def _with_deadline(call: Callable[[], str], seconds: float) -> str:
    """A socket's own time limit starts anew with each byte; this one does not."""
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(call()), daemon=True, name="on-finish")
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else f"no answer within {seconds:g} s"


def _try_post(config: OnFinishConfig, body: bytes) -> str:
    """Post once; empty where it went well, else why not. The answer's body is not read: it is nobody's business here."""
    if config.webhook is None:
        return ""
    headers = {"Content-Type": "application/json", "User-Agent": "medvision_ray"}
    if config.token_env is not None:
        headers["Authorization"] = f"Bearer {_token(config.token_env)}"
    request = urllib.request.Request(config.webhook.get_secret_value(), body, headers, method="POST")  # noqa: S310
    # An empty ProxyHandler: `https_proxy` of some shell must not decide who reads the result.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    try:
        with opener.open(request, timeout=config.timeout_seconds):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        hint = " (redirects are not followed)" if 300 <= error.code < 400 else ""
        return f"status {error.code}{hint}"
    except (OSError, HTTPException, ValueError):  # ValueError: a host that no name can be
        return "no answer (connection failed)"


def _token(variable: str) -> str:
    """The token, or nothing where it cannot be a header's value."""
    token = os.environ.get(variable, "").strip()
    return token if token.isascii() and token.isprintable() and " " not in token else ""
