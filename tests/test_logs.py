"""Lines of text and of JSON, and what they never hold."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from medvision_ray import cli
from medvision_ray.bundle import Bundle
from medvision_ray.config import LoggingConfig
from medvision_ray.errors import UsageError
from medvision_ray.logs import DEBUG_WARNING, Log, open_log, silent

NAME = "DOE^JANE"


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_text_is_a_time_and_the_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    Log()("3 of 9 objects", event="progress", done=3, total=9)
    line = capsys.readouterr().err
    assert line.startswith("[ ")
    assert line.endswith(" s] 3 of 9 objects\n")


def test_a_json_line_has_time_level_event_message_job_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("json")
    log.configure("score")
    log("3 of 9", event="progress", run_key="score-1", done=3, total=9, failed=1, rate=1.23456, seconds_left=4.0)
    (line,) = lines(capsys)
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.utcoffset() == timedelta(0)
    assert abs(datetime.now(timezone.utc) - moment) < timedelta(minutes=5)
    assert line == {
        **{"level": "info", "event": "progress", "message": "3 of 9", "job": "score", "run_key": "score-1"},
        **{"done": 3, "total": 9, "failed": 1, "rate": 1.235, "seconds_left": 4.0},
    }


def test_the_run_key_stays_on_later_lines_and_the_last_counts_are_known_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = Log("json")
    log("frozen", run_key="score-1", model_id="m-1")
    log("going", event="progress", done=3, total=9, failed=1)
    log.warning("look")
    log.end("score", "stopped", 143, {})
    *_, warned, end = lines(capsys)
    assert (warned["run_key"], warned["model_id"], "done" in warned) == ("score-1", "m-1", False)
    assert (end["event"], end["level"], end["exit_code"], end["status"]) == ("end", "error", 143, "stopped")
    assert (end["run_key"], end["done"], end["total"], end["failed"]) == ("score-1", 3, 9, 1)


def test_a_finished_run_ends_with_its_own_counts(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("json")
    log.end("score", "done", 0, {"run_key": "score-2", "scored": 7, "failed": 0, "bundle": NAME})
    (end,) = lines(capsys)
    assert (end["run_key"], end["scored"], end["failed"], end["level"]) == ("score-2", 7, 0, "info")
    assert NAME not in json.dumps(end)


def test_a_sentence_of_several_lines_is_one_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    Log("json").error("refused:\n  - a\n  - b \u2028 c")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_numbers_that_json_has_not_become_null(capsys: pytest.CaptureFixture[str]) -> None:
    Log("json")("x", rate=float("nan"), seconds_left=float("inf"))
    (line,) = lines(capsys)
    assert (line["rate"], line["seconds_left"]) == (None, None)


@pytest.mark.parametrize(("level", "expected"), [("info", 3), ("warning", 2), ("error", 1)])
def test_the_level_leaves_out_what_is_less_severe(
    level: str, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    log = Log()
    log.configure("score", LoggingConfig.model_validate({"level": level}))
    log("a")
    log.warning("b")
    log.error("c")
    assert len(capsys.readouterr().err.splitlines()) == expected


def test_the_last_line_comes_whatever_the_level(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("json")
    log.configure("score", LoggingConfig(level="error"))
    log.end("score", "done", 0, {})
    assert lines(capsys)[0]["event"] == "end"


def test_a_format_from_the_command_line_wins_over_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("text")
    log.configure("score", LoggingConfig(format="json"))
    log("a")
    assert capsys.readouterr().err.startswith("[")


def test_the_format_comes_from_the_environment_where_no_option_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDVISION_LOG_FORMAT", "json")
    open_log(None, debug=False)("a")
    assert lines(capsys)[0]["message"] == "a"
    open_log("text", debug=False)("a")
    assert capsys.readouterr().err.startswith("[")
    monkeypatch.setenv("MEDVISION_LOG_FORMAT", NAME)
    with pytest.raises(UsageError, match="text, json") as refused:
        open_log(None, debug=False)
    assert NAME not in str(refused.value)


def test_debug_output_begins_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEDVISION_DEBUG", "1")
    assert open_log(None, debug=False).debug
    assert DEBUG_WARNING in capsys.readouterr().err


@pytest.mark.parametrize("root", ["s3://archive/in", "/data/in/"])
def test_an_address_below_the_archive_is_cut_off(root: str) -> None:
    log = Log()
    log.cut_below(root)
    place = root.rstrip("/")
    assert log.cut(f"Expected a folder at {place}/DOE JANE/1, 2.dcm, but there is none.\nNext line.") == (
        f"Expected a folder at {place}/...\nNext line."
    )
    assert log.cut(f"Nothing below {place}.") == f"Nothing below {place}."


def test_tables_below_the_archive_are_named_in_full_but_nothing_that_only_begins_like_them() -> None:
    log = Log()
    log.cut_below("/data", ["/data/out", "/data", "/"])
    assert log.cut("in /data/out/tables/runs") == "in /data/out/tables/runs"
    assert log.cut("in /data/outpatients/DOE") == "in /data/..."
    assert log.cut("in /data/out patients/DOE") == "in /data/..."
    assert log.cut("/data/out/tables and /data/DOE") == "/data/out/tables and /data/..."


def test_output_above_the_archive_spares_nothing() -> None:
    log = Log()
    log.cut_below("/data/archive", ["/data"])
    assert log.cut("at /data/archive/DOE JANE") == "at /data/archive/..."


def test_a_reader_that_went_away_does_not_end_the_job() -> None:
    log = Log()
    log.stream = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - every write fails
    log("a" * 100_000)


def test_silent_takes_what_a_reporter_takes(capsys: pytest.CaptureFixture[str]) -> None:
    silent("a", event="progress", done=1)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_unexpected_error_of_a_verb_is_told_by_kind_and_place_without_its_text(
    form: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(uri: str) -> None:
        patient = NAME
        raise ValueError(f"{patient} in {uri}/DOE") from KeyError(NAME)

    monkeypatch.setattr("medvision_ray.bundle.load_bundle", broken)
    assert cli.main(["bundle", "show", bundle.uri, "--log-format", form, "--json"]) == 1
    out, err = capsys.readouterr()
    assert "DOE" not in out + err
    assert "ValueError from KeyError" in err
    assert "test_logs.py" in err
    assert "broken" in err
    assert json.loads(out)["exit_code"] == 1
    if form == "json":
        told, end = (json.loads(line) for line in err.splitlines())
        assert (told["event"], told["kind"], end["exit_code"]) == ("defect", "ValueError from KeyError", 1)
        assert told["places"][-1].endswith("broken")


def test_debug_shows_the_text_of_an_unexpected_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(uri: str) -> None:
        raise ValueError(NAME)

    monkeypatch.setattr("medvision_ray.bundle.load_bundle", broken)
    assert cli.main(["bundle", "show", bundle.uri, "--debug"]) == 1
    err = capsys.readouterr().err
    assert NAME in err
    assert err.startswith("medvision: " + DEBUG_WARNING)


def test_a_refused_configuration_names_each_key_and_what_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--set", "archive.uri=3", "--set", "archive.limmit=1", "--set", "logging.level=loud"]
    assert cli.main(["inventory", *wrong, "--log-format", "json"]) == 2
    refused, end = lines(capsys)
    assert {item["key"]: item["expected"] for item in refused["problems"]} == {
        "archive.uri": "text",
        "archive.limmit": "a known option",
        "logging.level": "'info', 'warning' or 'error'",
    }
    assert (refused["level"], end["exit_code"], end["status"]) == ("error", 2, "refused")


def test_a_refused_command_line_is_a_json_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inventory", "--log-format", "json", "--wrong"]) == 2
    refused, end = lines(capsys)
    assert "--wrong" in refused["message"]
    assert end["exit_code"] == 2


def test_a_folder_of_the_archive_is_not_named_when_it_cannot_be_listed(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inventory", "--set", f"archive.uri={tmp_path}", "--set", "archive.prefix=[DOE_JANE]"]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path) in err
    assert "DOE_JANE" not in err
