"""What libraries write to standard error comes as lines of ours, without its text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NAME = "DOE^JANE"
START = """
import logging, os, sys, threading, warnings
from medvision_ray.foreign import only_ours
from medvision_ray.logs import Log
log = Log({form!r}, debug={debug})
with only_ours(log):
"""


def errors_of(body: str, tmp_path: Path, form: str = "json", *, debug: bool = False) -> list[str]:
    """Lines on standard error of a program that does `body` inside `only_ours`."""
    script = tmp_path / "program.py"
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    script.write_text(START.format(form=form, debug=debug) + indented)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120)
    return done.stderr.splitlines()


def told(body: str, tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in errors_of(body, tmp_path)]


def test_the_text_of_a_log_record_is_given_where_it_is_a_constant_of_the_source(tmp_path: Path) -> None:
    (line,) = told(f"logging.getLogger('codec').warning('Lost node %s', '{NAME}')", tmp_path)
    assert line["message"] == 'Warning of codec (program.py:7): "Lost node %s"'
    assert (line["level"], line["event"], line["source"]) == ("warning", "foreign", "codec")


@pytest.mark.parametrize(
    "call",
    [
        "logging.getLogger('codec').error(f'Cannot read {name}')",
        "logging.getLogger('codec').error('Cannot read ' + name)",
        "logging.getLogger('codec').error(name)",
        "logging.getLogger('codec').error('%s', ValueError(name))",
        "try:\n    raise ValueError(name)\nexcept ValueError:\n    logging.getLogger('codec').exception('failed')",
        "logging.getLogger('codec').error(ValueError(name))",
    ],
)
def test_no_text_that_was_put_together_is_repeated(call: str, tmp_path: Path) -> None:
    (line,) = told(f"name = '^'.join(['DOE', 'JANE'])\n{call}", tmp_path)
    assert "DOE" not in json.dumps(line)
    assert line["level"] == "error"
    assert line["place"].startswith("program.py:")


def test_info_of_libraries_is_left_out(tmp_path: Path) -> None:
    assert not told("logging.getLogger('codec').info('hello')", tmp_path)


def test_a_python_warning_is_told_by_its_kind_and_place(tmp_path: Path) -> None:
    (line,) = told(f"warnings.warn('bad value for {NAME}', UserWarning)", tmp_path)
    assert line["message"] == "Warning of UserWarning (program.py:7); its text is withheld, --debug shows it"


def test_an_exception_that_ends_a_thread_is_told_without_its_text(tmp_path: Path) -> None:
    body = f"def work():\n    raise KeyError('{NAME}')\nthread = threading.Thread(target=work)\nthread.start()\nthread.join()"
    (line,) = told(body, tmp_path)
    assert "DOE" not in json.dumps(line)
    assert (line["event"], line["kind"], line["level"]) == ("defect", "KeyError", "error")
    assert line["places"][-1] == "program.py:8 work"


def test_an_exception_in_a_destructor_is_told_without_its_text(tmp_path: Path) -> None:
    body = f"class Held:\n    def __del__(self):\n        raise ValueError('{NAME}')\nheld = Held()\ndel held"
    (line,) = told(body, tmp_path)
    assert "DOE" not in json.dumps(line)
    assert line["kind"] == "ValueError"


@pytest.mark.parametrize(
    "write",
    [
        f"os.write(2, b'libpng: cannot read {NAME}\\n')",
        f"os.write(2, b'no end of line {NAME}')",
        f"sys.stderr.write('cannot read {NAME}\\n')",
        f"import subprocess; subprocess.run(['sh', '-c', 'echo {NAME} >&2'])",
    ],
)
def test_what_is_written_past_python_is_told_without_its_text(write: str, tmp_path: Path) -> None:
    (line,) = told(write, tmp_path)
    assert "DOE" not in json.dumps(line)
    assert (line["source"], line["place"]) == ("a library", "1 line")


def test_rays_own_lines_are_told_with_level_and_place_and_its_infos_left_out(tmp_path: Path) -> None:
    body = "\n".join(
        f"os.write(2, {line!r})"
        for line in (
            f"2026-11-24 03:53:33,717\tWARNING executor.py:85 -- {NAME}\n".encode(),
            f"2026-11-24 03:53:33,717\tINFO usage_lib.py:448 -- {NAME}\n".encode(),
            f"[2026-11-24 03:47:25,127 E 66 66] gcs_client.cc:210: {NAME}\n".encode(),
            f"[2026-11-24 03:47:25,127 I 66 66] logging.cc:303: {NAME}\n".encode(),
        )
    )
    found = told(body, tmp_path)
    assert [(line["level"], line["source"], line["place"]) for line in found] == [
        ("warning", "ray", "executor.py:85"),
        ("error", "ray", "gcs_client.cc:210"),
    ]
    assert "DOE" not in json.dumps(found)


def test_a_flood_is_told_and_not_waited_for(tmp_path: Path) -> None:
    body = f"for _ in range(2000): os.write(2, b'{NAME}' * 200 + b'\\n')\nlog('alive')"
    found = told(body, tmp_path)
    assert len(found) < 2001
    assert [line for line in found if line["message"] == "alive"]
    assert "DOE" not in json.dumps(found)


def test_text_format_withholds_as_well(tmp_path: Path) -> None:
    body = f"os.write(2, b'{NAME}\\n')\nlogging.getLogger('codec').error('{NAME}'.lower())\nlog('ours')"
    found = errors_of(body, tmp_path, "text")
    assert len(found) == 3
    assert "doe" not in "".join(found).lower()
    assert [line for line in found if line.endswith(" s] ours")]


def test_debug_shows_texts(tmp_path: Path) -> None:
    body = f"os.write(2, b'{NAME} native\\n')\nlogging.getLogger('codec').error('{NAME}'.lower())"
    found = "".join(errors_of(body, tmp_path, debug=True))
    assert f"{NAME} native" in found
    assert NAME.lower() in found


def test_everything_is_as_before_afterwards(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        START.format(form="text", debug=False)
        + "    log('inside')\nos.write(2, b'native after\\n')\nsys.stderr.write('python after\\n')\nlog('log after')\n"
        + "assert not logging.getLogger().handlers\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=120)
    first, *rest, last = done.stderr.splitlines()
    assert first.endswith("inside")
    assert rest == ["native after", "python after"]
    assert last.endswith("log after")
