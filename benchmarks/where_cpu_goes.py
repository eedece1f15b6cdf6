"""Where the machine's CPU time goes while a night is scored: by process and by thread, in steady state.

Runs `medvision score` as a user does and, from the first written rows until nine tenths of the objects have theirs,
adds up the CPU-seconds of the command and of everything that it started, as the kernel counts them. What is left of
the cores was idle, taken by others on the machine, or stolen from it by its host. Beside it stands the CPU time an
image of the actors, and that of bare processes which decode, preprocess and predict and do nothing else
(`score_vs_dataloader.py`).

    python benchmarks/where_cpu_goes.py [--objects 3000] [--archive FOLDER ...] [--model "small CNN"]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from facts import descendants, machine, print_table, write_results
from score_vs_dataloader import ARCHIVES, BATCH, MODELS, limits, make_bundle, sample

_TICKS = os.sysconf("SC_CLK_TCK")
_DRIVER = "the command (driver)"
_LOOK_SECONDS = 0.1
_STEADY_PART = 0.9  # of the objects; then the last blocks begin, and actors run out of them


def processes_of(root: int) -> dict[int, str]:
    """Roles by process, of a process and its descendants."""
    return {pid: _DRIVER if pid == root else _role(command) for pid, command in descendants(root).items()}


def _role(command: str) -> str:
    if command.startswith("ray::"):
        name = command.split(maxsplit=1)[0].removeprefix("ray::").split("(")[0].split(".")[0]
        return "actors" if name.startswith(("MapWorker", "_MapWorker")) else f"ray worker {name}"
    for name in ("gcs_server", "raylet", "agent.py", "main.py", "log_monitor", "dashboard", "monitor.py"):
        if name in command.split(" -", maxsplit=1)[0] or f"/{name}" in command:
            return f"Ray's {Path(name).stem}"
    return "others of Ray's"


def thread_seconds(pids: dict[int, str]) -> dict[tuple[str, str], float]:
    """CPU-seconds so far by role and thread name."""
    used: dict[tuple[str, str], float] = defaultdict(float)
    for pid, role in pids.items():
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                name, fields = (task / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            except OSError:
                continue
            thread = "main thread" if task.name == str(pid) else name
            values = fields.split()
            used[role, thread] += (int(values[11]) + int(values[12])) / _TICKS
    return used


def cores() -> dict[str, float]:
    """CPU-seconds so far of the whole machine."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
    values = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return {name: int(value) / _TICKS for name, value in zip(names, values, strict=False)}


def account(bundle: str, folder: str, objects: int) -> dict[str, Any]:
    """One scoring run: its seconds in steady state, objects in them, and CPU-seconds by role and thread."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory() as output:
        settings = {"archive.uri": folder, "bundle": bundle, "output": output, "privacy.demo_key": "true"}
        settings |= {"scoring.batch_size": str(BATCH), "scoring.block_rows": "64"}
        settings |= {"ray.num_cpus": str(os.cpu_count())}
        command = [sys.executable, "-m", "medvision_ray.cli", "score"]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        rows: dict[str, int] = {}  # of files that are there: looking costs time that the actors would have

        def done() -> int:
            files = {path.name: path for path in Path(output).glob("runs/*/rows/*.parquet") if path.name not in rows}
            rows.update({name: pq.read_metadata(path).num_rows for name, path in files.items()})
            return sum(rows.values())

        def wait_for(count: int) -> int:
            while (now := done()) < count:
                if process.poll() is not None:
                    raise SystemExit("the run ended before it was in steady state; ask for more --objects")
                time.sleep(_LOOK_SECONDS)
            return now

        first = wait_for(objects // 10)
        before, all_before, begun = thread_seconds(processes_of(process.pid)), cores(), time.monotonic()
        last = wait_for(int(_STEADY_PART * objects))
        after, all_after, ended = thread_seconds(processes_of(process.pid)), cores(), time.monotonic()
        process.wait()
    used = {key: value - before.get(key, 0.0) for key, value in after.items()}
    roles: dict[str, float] = defaultdict(float)
    for (role, _), value in used.items():
        roles[role] += value
    whole = {name: all_after[name] - value for name, value in all_before.items()}
    busy = whole["user"] + whole["nice"] + whole["system"] + whole["irq"] + whole["softirq"]
    return {
        "seconds": ended - begun,
        "images": last - first,
        "roles": dict(sorted(roles.items(), key=lambda item: -item[1])),
        "threads": {
            f"{role}: {thread}": value
            for (role, thread), value in sorted(used.items(), key=lambda item: -item[1])
            if value >= 0.005 * (ended - begun)
        },
        "others": busy - sum(used.values()),
        "idle": whole["idle"] + whole["iowait"],
        "stolen": whole["steal"],
    }


def main() -> None:
    """Account for each model and archive, write and print shares of the machine."""
    data = Path(os.environ.get("MEDVISION_DATA", "../shared/data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", action="append", help="a folder of images; default: those of MEDVISION_DATA")
    parser.add_argument("--model", action="append", choices=tuple(MODELS))
    parser.add_argument("--objects", type=int, default=3000)
    options = parser.parse_args()
    cases: dict[str, Any] = {}
    for archive in options.archive or [str(data / name) for name in ARCHIVES]:
        for model in options.model or MODELS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                bundle = make_bundle(model, folder)
                listing = sample(archive, options.objects, folder)
                found = account(bundle, str(folder / "archive"), options.objects)
                bare = limits(bundle, listing)
            found["bare_cpu_per_image"] = bare["cpu_per_image"]
            found["actors_cpu_per_image"] = found["roles"]["actors"] / found["images"]
            cases[f"{Path(archive).name}, {model}"] = found
            _print(f"{Path(archive).name}, {model}", found)
    write_results("where_cpu_goes", {"objects": options.objects, "cases": cases, "machine": machine("ray", "torch")})


def _print(case: str, found: dict[str, Any]) -> None:
    whole = found["seconds"] * (os.cpu_count() or 1)
    sys.stdout.write(
        f"\n{case}: {found['images'] / found['seconds']:.1f} images/s; CPU ms an image: actors "
        f"{1000 * found['actors_cpu_per_image']:.2f}, bare {1000 * found['bare_cpu_per_image']:.2f}\n"
    )
    spent = {
        **found["roles"],
        "others on the machine": found["others"],
        "idle": found["idle"],
        "stolen": found["stolen"],
    }
    print_table(
        ("what", "share of the machine"),
        [(name, f"{value / whole:.1%}") for name, value in spent.items()]
        + [(f"  {name}", f"{value / whole:.1%}") for name, value in found["threads"].items()],
    )


if __name__ == "__main__":
    main()
