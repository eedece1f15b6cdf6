"""Submitting a job: its name, what travels, which attempt, which exit code; against a stand-in for the cluster."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medvision_ray.errors import MedVisionError
from medvision_ray.submission import Attempt, Cluster, Submission, attempts, exit_code, submit


@dataclass
class Job:
    """A job of the stand-in: `script` is what each look finds, the last one stays."""

    submission_id: str
    status: str = "RUNNING"
    driver_exit_code: int | None = None
    error_type: str | None = None
    log: tuple[str, ...] = ()


@dataclass
class StandIn:
    """A cluster; `ends` says how each job that is submitted ends, in order."""

    ends: list[tuple[str, int | None]] = field(default_factory=list)
    jobs: dict[str, Job] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    away: int = 0
    breaks: int = 0
    forgets: bool = False

    def connect(self) -> StandIn:
        if self.away:
            self.away -= 1
            raise ConnectionError
        return self

    def submit_job(self, **given: Any) -> str:
        identity = given["submission_id"]
        if identity in self.jobs:
            raise RuntimeError("it has been used")
        self.submitted.append(given)
        status, code = self.ends.pop(0)
        self.jobs[identity] = Job(identity, status, code, None, ("one\n", "two\n", "three\n"))
        return identity

    def list_jobs(self) -> list[Job]:
        return list(self.jobs.values())

    def get_job_info(self, job_id: str) -> Job:
        if job_id not in self.jobs:
            raise RuntimeError("not there")
        return self.jobs[job_id]

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        self.jobs[job_id].status = "STOPPED"
        return True

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self.jobs[job_id].log:
            yield text
            if self.breaks:
                self.breaks -= 1
                if self.forgets:
                    self.jobs.clear()
                raise RuntimeError("closed unexpectedly")


@pytest.fixture
def go(tmp_path: Path) -> Callable[..., tuple[int, str, list[str]]]:
    def run(cluster: StandIn, wanted: Submission | None = None, **more: Any) -> tuple[int, str, list[str]]:
        written: list[str] = []
        said: list[str] = []
        patience = more.pop("patience", 20.0)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        _, code = submit(
            wanted or Submission("score", day="2026-11-26"),
            Cluster(cluster.connect, said.append, patience, pause=lambda seconds: None),
            written.append,
            folder=folder,
            **more,
        )
        return code, "".join(written), said

    return run


def test_the_name_changes_with_what_is_done_and_with_nothing_else(tmp_path: Path) -> None:
    one, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    one.write_text("output: x\n")
    other.write_text("output: x\n")
    name = Submission("score", ("--max-hours", "6"), one, "2026-11-26").name
    assert name.startswith("score-2026-11-26-")
    assert Submission("score", ("--max-hours", "6"), other, "2026-11-26").name == name
    other.write_text("output: y\n")
    different = [
        Submission("score", ("--max-hours", "6"), other, "2026-11-26"),
        Submission("score", ("--max-hours", "7"), one, "2026-11-26"),
        Submission("score", ("--max-hours6",), one, "2026-11-26"),
        Submission("score", ("--max-hours", "6"), one, "2026-11-27"),
        Submission("evaluate", ("--max-hours", "6"), one, "2026-11-26"),
    ]
    assert len({name, *(each.name for each in different)}) == 6


def test_the_configuration_travels_and_nothing_else(tmp_path: Path) -> None:
    config, folder = tmp_path / "night.yaml", tmp_path / "travels"
    config.write_text("output: x\n")
    folder.mkdir()
    wanted = Submission("score", ("--prefix", "a b"), config, code=Path("dist/x.whl"))
    assert wanted.runtime_env(folder) == {"working_dir": str(folder), "py_modules": ["dist/x.whl"]}
    assert {file.name for file in folder.iterdir()} == {"job.yaml", "submission.txt"}
    assert wanted.entrypoint == "python -m medvision_ray.cli score --config job.yaml --prefix 'a b'"


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("PENDING", None, None),
        ("RUNNING", None, None),
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 3, 3),
        ("FAILED", 137, 137),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),  # its surroundings could not be made
        ("FAILED", 0, 1),  # its node died after it had ended
        ("STOPPED", None, 143),
    ],
)
def test_the_jobs_own_exit_code(status: str, driver: int | None, code: int | None) -> None:
    assert exit_code(Job("x", status, driver)) == code
    as_enum = SimpleNamespace(value=status)
    assert exit_code(SimpleNamespace(status=as_enum, driver_exit_code=driver)) == code


def test_attempts_are_counted_as_numbers() -> None:
    jobs = [Job(f"n-a{number}", "FAILED", 1) for number in (10, 9, 1)]
    jobs += [Job("m-a3"), Job("n-ax"), Job("n"), Job("raysubmit_1")]
    assert attempts([*jobs, SimpleNamespace(submission_id=None)], "n") == [Attempt(n, 1) for n in (1, 9, 10)]


@pytest.mark.parametrize(("end", "code"), [(("SUCCEEDED", 0), 0), (("FAILED", 2), 2), (("FAILED", 3), 3)])
def test_a_job_is_followed_and_the_same_command_again_answers_the_same(go: Any, end: Any, code: int) -> None:
    cluster = StandIn([end])
    assert go(cluster, tries=3)[:2] == (code, "one\ntwo\nthree\n")
    found, log, said = go(cluster, tries=3)
    assert (found, log, len(cluster.submitted)) == (code, "", 1)
    assert "--again" in said[0]
    cluster.ends.append(("SUCCEEDED", 0))
    assert go(cluster, again=True)[0] == 0
    assert [given["submission_id"][-3:] for given in cluster.submitted] == ["-a1", "-a2"]


def test_a_failure_is_tried_again_up_to_the_limit(go: Any) -> None:
    cluster = StandIn([("FAILED", 1), ("FAILED", 137), ("SUCCEEDED", 0)])
    assert go(cluster, tries=2)[0] == 137
    assert go(cluster)[0] == 0
    assert [given["submission_id"][-3:] for given in cluster.submitted] == ["-a1", "-a2", "-a3"]


def test_a_job_that_never_ran_says_of_which_kind_its_failure_is(go: Any) -> None:
    cluster = StandIn([("FAILED", None)])

    class Typed(StandIn):
        def get_job_info(self, job_id: str) -> Job:
            found = super().get_job_info(job_id)
            found.error_type = "RUNTIME_ENV_SETUP_FAILURE"
            return found

    code, _, said = go(Typed([("FAILED", None)]))
    assert (code, "RUNTIME_ENV_SETUP_FAILURE" in said[-1]) == (1, True)
    assert "its node is gone" in go(cluster)[2][-1]


def test_a_refused_configuration_is_not_tried_again(go: Any) -> None:
    cluster = StandIn([("FAILED", 2)])
    assert go(cluster, tries=5)[0] == 2


def test_a_job_under_way_is_followed_and_not_doubled(go: Any) -> None:
    wanted = Submission("score", day="d")
    cluster = StandIn([("RUNNING", None)])
    assert go(cluster, wanted, wait=False)[0] == 0
    running = cluster.jobs[f"{wanted.name}-a1"]

    class Ends(StandIn):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            yield "the log\n"
            running.status, running.driver_exit_code = "FAILED", 3

    other = Ends(jobs=cluster.jobs)
    code, log, said = go(other, wanted)
    assert (code, log, other.submitted) == (3, "the log\n", [])
    assert said == [f"{wanted.name}-a1 is under way already."]


def test_of_two_callers_at_once_the_second_follows_the_first(go: Any) -> None:
    wanted = Submission("score", day="d")

    class Late(StandIn):
        """Knows nothing of the job yet when it is asked, and has it when it is submitted."""

        def list_jobs(self) -> list[Job]:
            return []

    cluster = Late(jobs={f"{wanted.name}-a1": Job(f"{wanted.name}-a1", "SUCCEEDED", 0, None, ("theirs\n",))})
    assert go(cluster, wanted)[:2] == (0, "theirs\n")


def test_a_cluster_that_refuses_is_told_without_its_words(go: Any) -> None:
    class Refuses(StandIn):
        def submit_job(self, **given: Any) -> str:
            raise RuntimeError("DOE JANE")

    with pytest.raises(MedVisionError, match="refused") as caught:
        go(Refuses())
    assert "DOE" not in str(caught.value)


def test_a_broken_connection_repeats_no_line(go: Any) -> None:
    cluster = StandIn([("RUNNING", None)], breaks=1)

    class Ends(StandIn):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            async for text in super().tail_job_logs(job_id):
                yield text
            self.jobs[job_id].status = "SUCCEEDED"

    cluster = Ends([("RUNNING", None)], breaks=1)
    assert go(cluster)[:2] == (0, "one\ntwo\nthree\n")


def test_a_lost_head_is_waited_for_and_the_job_submitted_again(go: Any) -> None:
    """The head that comes back has a new memory: it does not know the job, and the name's first attempt is free."""
    cluster = StandIn([("RUNNING", None), ("SUCCEEDED", 0)], breaks=1, forgets=True)
    code, log, said = go(cluster, tries=2)
    assert (code, len(cluster.submitted)) == (0, 2)
    assert log == "one\none\ntwo\nthree\n"
    assert any("ended with its cluster; trying again" in line for line in said)
    cluster = StandIn([("RUNNING", None)], breaks=1, forgets=True)
    assert go(cluster)[0] == 1


def test_a_cluster_that_is_away_is_waited_for_and_then_given_up(go: Any) -> None:
    assert go(StandIn([("SUCCEEDED", 0)], away=3))[0] == 0
    with pytest.raises(MedVisionError, match="none has answered for 20 s"):
        go(StandIn([("SUCCEEDED", 0)], away=100))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_whoever_is_interrupted_stops_the_job(go: Any, kind: type[BaseException]) -> None:
    class Interrupted(StandIn):
        async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
            yield "a line\n"
            raise kind

    cluster = Interrupted([("RUNNING", None)])
    with pytest.raises(kind):
        go(cluster)
    assert cluster.stopped == list(cluster.jobs)


def test_nobody_answers_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from medvision_ray.cli import main

    command = ["submit", "score", "--address", "http://127.0.0.1:9", "--patience", "0", "--json"]
    assert main(command) == 1
    assert "none has answered" in json.loads(capsys.readouterr().out)["error"]
    assert main([*command, "--config", str(tmp_path / "absent.yaml")]) == 2


def test_options_of_the_job_stand_behind_two_dashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medvision_ray import submission
    from medvision_ray.cli import main

    cluster = StandIn([("FAILED", 3)])
    monkeypatch.setattr(submission, "connector", lambda address: cluster.connect)
    assert main(["submit", "score", "--day", "d", "--json", "--", "--max-hours", "6", "--json"]) == 3
    assert cluster.submitted[0]["entrypoint"] == "python -m medvision_ray.cli score --max-hours 6 --json"
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["one", "two", "three"]
    assert json.loads(lines[3])["job_exit_code"] == 3
