"""A command or a webhook is told how a job ended; nothing of it changes how it ended."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from medvision_ray import on_finish
from medvision_ray.config import OnFinishConfig, ScoreJob, build_job
from medvision_ray.ending import Ending
from medvision_ray.errors import ConfigError, UsageError
from medvision_ray.logs import Log
from medvision_ray.scoring.summary import RunSummary

PAYLOAD = {"job": "score", "exit_code": 1}
TOKEN = "s3cr3t-t0ken"


class Receiver:
    """A webhook on loopback that answers with the given statuses in turn, the last one for ever."""

    def __init__(self) -> None:
        self.statuses = [200]
        self.seconds = 0.0
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), body))
                time.sleep(outer.seconds)
                status = outer.statuses.pop(0) if len(outer.statuses) > 1 else outer.statuses[0]
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", outer.url + "/elsewhere")
                self.end_headers()

            do_GET = do_POST  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    found = Receiver()
    monkeypatch.setattr(on_finish.random, "uniform", lambda low, high: 0.01)
    yield found
    found.server.shutdown()
    found.server.server_close()


def config(**options: Any) -> OnFinishConfig:
    return OnFinishConfig.model_validate_json(json.dumps(options))


def tell(payload: dict[str, Any] | None = None, *, secrets: tuple[str, ...] = (), **options: Any) -> None:
    on_finish.tell(config(**options), payload or PAYLOAD, Log(), secrets=secrets)


def script(folder: Path, body: str) -> list[str]:
    (folder / "command.py").write_text(f"import json, os, sys, time\n{body}\n")
    return [sys.executable, str(folder / "command.py")]


def test_the_command_gets_the_result_on_standard_input_and_the_exit_code(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'told')!r}, 'w').write(os.environ['MEDVISION_EXIT_CODE'] + sys.stdin.read())"
    tell(command=script(tmp_path, body))
    assert (tmp_path / "told").read_text() == "1" + json.dumps(PAYLOAD)


def test_the_command_is_not_read_by_a_shell(tmp_path: Path) -> None:
    tell(command=["echo", f"; touch {tmp_path / 'shell'}", f"$(touch {tmp_path / 'shell'})"])
    assert not (tmp_path / "shell").exists()


def test_the_command_does_not_get_the_sites_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "k" * 40)
    monkeypatch.setenv("TOKEN", TOKEN)
    body = f"open({str(tmp_path / 'told')!r}, 'w').write(json.dumps(dict(os.environ)))"
    tell(
        command=script(tmp_path, body), webhook="http://127.0.0.1:1/", token_env="TOKEN", secrets=("KEY",),
        timeout_seconds=5,
    )  # fmt: skip
    assert not {"KEY", "TOKEN"} & set(json.loads((tmp_path / "told").read_text()))


def test_a_command_that_fails_is_told_with_the_end_of_its_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell(command=script(tmp_path, "print('x' * 9000 + ' pager is down'); sys.exit(4)"))
    err = capsys.readouterr().err
    assert "ended with code 4" in err
    assert "pager is down" in err
    assert len(err) < 5000


def test_a_command_that_does_well_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell(command=script(tmp_path, "print('sent')"))
    assert capsys.readouterr().err == ""


def test_a_command_over_its_time_is_ended_with_its_children(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(6); open({str(alive)!r}, 'w')"
    body = f"import subprocess; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    tell(command=script(tmp_path, body), timeout_seconds=3)
    assert "took longer than 3 s" in capsys.readouterr().err
    while time.monotonic() - started < 9:  # the child would have written by now
        time.sleep(0.2)
    assert not alive.exists()


def test_a_command_that_does_not_read_is_no_defect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell({"exit_code": 0, "much": "x" * 500_000}, command=["true"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("code", "told"), [(0, False), (1, True), (3, True), (143, True)])
def test_when_failure_tells_of_failures_alone(code: int, told: bool, receiver: Receiver) -> None:
    tell({"exit_code": code}, webhook=receiver.url, when="failure")
    assert bool(receiver.requests) == told


def test_the_webhook_gets_json_and_the_token(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_TOKEN", TOKEN)
    tell(webhook=receiver.url + "/hook", token_env="HOOK_TOKEN")
    ((path, headers, body),) = receiver.requests
    assert (path, headers["Content-Type"], headers["Authorization"]) == ("/hook", "application/json", f"Bearer {TOKEN}")
    assert json.loads(body) == PAYLOAD


def test_a_server_error_is_tried_three_times(receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    receiver.statuses = [503, 500, 200]
    tell(webhook=receiver.url)
    assert (len(receiver.requests), capsys.readouterr().err) == (3, "")
    receiver.statuses = [503]
    tell(webhook=receiver.url)
    assert len(receiver.requests) == 6
    assert "not told: status 503" in capsys.readouterr().err


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_tried_again(status: int, receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    receiver.statuses = [status]
    tell(webhook=receiver.url)
    assert len(receiver.requests) == 1
    assert f"not told: status {status}" in capsys.readouterr().err


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int, receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    receiver.statuses = [status]
    tell(webhook=receiver.url)
    assert [path for path, _, _ in receiver.requests] == ["/"]
    assert "redirects are not followed" in capsys.readouterr().err


def test_nobody_there_is_told_after_three_tries(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = []
    real = on_finish._try_post
    monkeypatch.setattr(on_finish, "_try_post", lambda *given: tries.append(1) or real(*given))
    tell(webhook="http://127.0.0.1:1/hook")
    assert len(tries) == 3
    assert "no answer" in capsys.readouterr().err


def test_a_slow_webhook_costs_three_time_limits_at_most(receiver: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    receiver.seconds = 30.0
    started = time.monotonic()
    tell(webhook=receiver.url, timeout_seconds=0.5)
    assert time.monotonic() - started < 20
    assert "no answer" in capsys.readouterr().err


def test_proxies_of_the_environment_are_not_used(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    tell(webhook=receiver.url)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("form", ["text", "json"])
def test_neither_address_nor_token_is_ever_logged(
    form: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOOK_TOKEN", TOKEN)
    monkeypatch.setattr(on_finish.random, "uniform", lambda low, high: 0.01)
    job = config(webhook="http://127.0.0.1:1/hooks/XYZZY", token_env="HOOK_TOKEN")
    on_finish.tell(job, PAYLOAD, Log(form))
    err = capsys.readouterr().err
    assert "not told" in err
    assert "XYZZY" not in err + repr(job) + str(job.model_dump(mode="json")) + job.model_dump_json()
    assert TOKEN not in err


@pytest.mark.parametrize(
    "url",
    [
        "http://hooks.example.org/XYZZY",
        "ftp://hooks.example.org/XYZZY",
        "file:///XYZZY",
        "hooks.example.org/XYZZY",
        "https://user:XYZZY@hooks.example.org/",
        "https:///XYZZY",
        "https://hooks.example.org/XYZ ZY",
        "https://hooks.example.org:99999/XYZZY",
        "http://127.0.0.1.example.org/XYZZY",
        "http://localhost.example.org/XYZZY",
    ],
)
def test_an_address_that_is_not_https_or_here_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError, match="webhook") as refused:
        build_job(OnFinishConfig, {"webhook": url}, "a test")
    assert "XYZ" not in str(refused.value) + str(refused.value.problems)


@pytest.mark.parametrize(
    "url", ["https://hooks.example.org/x", "http://localhost:8080/x", "http://[::1]:80/", "http://127.9.9.9/"]
)
def test_https_and_this_machine_are_allowed(url: str) -> None:
    assert config(webhook=url).webhook is not None


def test_plain_http_needs_to_be_allowed() -> None:
    assert config(webhook="http://hooks.example.org/x", allow_http=True).wanted
    with pytest.raises(ValidationError):
        config(webhook="http://hooks.example.org/x")


def test_what_could_not_be_told_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="names none"):
        on_finish.check(config(command=["no-such-program-here"]))
    monkeypatch.delenv("HOOK_TOKEN", raising=False)
    given = config(webhook="https://hooks.example.org/x", token_env="HOOK_TOKEN")
    with pytest.raises(UsageError, match="empty or holds blanks"):
        on_finish.check(given)
    monkeypatch.setenv("HOOK_TOKEN", "two\nlines")
    with pytest.raises(UsageError) as refused:
        on_finish.check(given)
    assert "two" not in str(refused.value)
    monkeypatch.setenv("HOOK_TOKEN", TOKEN)
    on_finish.check(given)


def test_the_payload_counts_and_holds_nothing_that_is_not_named() -> None:
    result = {"run_key": "score-1", "model_id": "m-1", "scored": 7, "failed": 1, "archive": "s3://doe", "labels": "doe"}
    found = on_finish.payload_of("score", Ending(0, {**result, "images_per_second": float("nan")}), Log())
    assert (found["run_key"], found["model_id"], found["counts"]) == ("score-1", "m-1", {"scored": 7, "failed": 1})
    assert (found["job"], found["status"], found["exit_code"], found["error"]) == ("score", "done", 0, None)
    assert found["result"]["images_per_second"] is None
    assert "doe" not in json.dumps(found)


def test_the_payload_of_a_run_that_was_stopped_has_what_was_known() -> None:
    log = Log()
    log("frozen", run_key="score-1", model_id="m-1")
    log("going", total=9, done=3, failed=1)
    found = on_finish.payload_of("score", Ending(143, error="Stopped."), log)
    assert (found["run_key"], found["status"]) == ("score-1", "stopped")
    assert found["counts"] == {"total": 9, "done": 3, "failed": 1}


def test_every_fact_of_a_runs_summary_is_sent_or_left_out_on_purpose() -> None:
    known = {*on_finish.SENT, "run_key", "model_id", "job", "archive"}
    assert {field.name for field in dataclasses.fields(RunSummary)} <= known


def test_a_defect_while_telling_leaves_the_exit_code_and_names_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("DOE^JANE")

    monkeypatch.setattr(on_finish, "tell", broken)
    job = build_job(ScoreJob, {"archive": {"uri": str(tmp_path)}, "bundle": "b", "output": "o"}, "a test")
    on_finish.conclude("score", job, Ending(0), Log())
    err = capsys.readouterr().err
    assert "RuntimeError" in err
    assert "DOE" not in err
