"""Metrics: closed labels, nothing without Ray, and dashboards and alerts that name what there is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from medvision_ray import monitoring
from medvision_ray.config import JOBS, RayConfig
from medvision_ray.ending import STATUS
from medvision_ray.fingerprint import Drift, FeatureDrift
from medvision_ray.imaging.errors import ErrorCode, Stage
from medvision_ray.scoring.summary import RunSummary

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "medvision.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
METRICS = {metric.exported: metric for metric in monitoring.METRICS}
OF_RAY = {"NodeAddress", "WorkerId", "SessionName", "Version"}
VALUES = {
    "verb": set(monitoring.VERBS),
    "state": {*monitoring.PROGRESS_STATES, *monitoring.RUN_STATES},
    "status": {*monitoring.STATUSES, monitoring.SCORED},
    "stage": set(monitoring.STAGES),
    "feature": set(monitoring._features()),
}


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    rules = [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]
    return [target["expr"] for panel in panels for target in panel["targets"]] + [rule["expr"] for rule in rules]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, dict[str, str]]]:
    """What is recorded while Ray seems to be connected."""
    found: list[tuple[str, float, dict[str, str]]] = []

    class Kept:
        def __init__(self, metric: monitoring.Metric) -> None:
            self.metric = metric

        def inc(self, value: float, labels: dict[str, str]) -> None:
            assert set(labels) == set(self.metric.labels)
            found.append((self.metric.name, value, labels))

        set = inc

    monkeypatch.setattr(monitoring, "connected", lambda: True)
    monkeypatch.setattr(monitoring, "_made", Kept)
    return found


def test_every_job_that_runs_on_ray_and_ends_has_its_verb() -> None:
    """A server has Ray Serve's own metrics and does not end by itself."""
    assert {verb for verb, job in JOBS.items() if "ray" in job.model_fields} - {"serve"} <= set(monitoring.VERBS)


def test_nothing_is_recorded_and_ray_not_imported_where_it_is_not_connected() -> None:
    code = (
        "import sys\nfrom medvision_ray import monitoring as m\n"
        "m.record_block({'scored': 1}, {'read': 0.1})\nm.record_progress(1, 1, 0)\nm.record_run('score', 'done', {})\n"
        "from medvision_ray.config import RayConfig\nassert m.record_end(RayConfig(), 'score', 'done', {})\n"
        "print('ray' in sys.modules)"
    )
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False"


def test_a_block_is_recorded_by_status_code_and_stage(recorded: list[Any]) -> None:
    monitoring.record_block(
        {"scored": 5, "corrupt": 2}, {"read": 0.5, "predict": 1.5}, bytes_read=99, frames=12, batches=3
    )
    values = {(name, *sorted(labels.values())): value for name, value, labels in recorded}
    assert values.pop(("medvision_peak_memory_bytes", "score")) > 1 << 20
    assert values == {
        ("medvision_objects", "none", "score", "scored"): 5,
        ("medvision_objects", "corrupt", "failed", "score"): 2,
        ("medvision_stage_seconds", "read", "score"): 0.5,
        ("medvision_stage_seconds", "predict", "score"): 1.5,
        ("medvision_read_bytes", "score"): 99,
        ("medvision_frames", "score"): 12,
        ("medvision_batches", "score"): 3,
    }


def test_labels_take_values_of_closed_sets_alone(recorded: list[Any]) -> None:
    name = "s3://archive/DOE^JANE"
    monitoring.record_block({name: 1}, {name: 1.0}, verb=name)
    monitoring.record_progress(3, 2, 1, verb=name)
    monitoring.record_run(name, name, {"seconds": {name: 1.0}, "scored": 1, name: 4})
    assert recorded
    assert "DOE" not in str(recorded)
    assert {"other"} == {labels["verb"] for _, _, labels in recorded}


def test_a_run_is_recorded_with_its_counts_seconds_and_time(recorded: list[Any]) -> None:
    monitoring.record_progress(10, 7, 2)
    monitoring.record_run("score", "over_budget", {"scored": 7, "failed": 2, "seconds": {"list": 1.5}, "run_key": "x"})
    found = {(name, *sorted(labels.values())): value for name, value, labels in recorded}
    assert found[("medvision_run_progress_objects", "score", "total")] == 10
    assert found[("medvision_run_progress_objects", "done", "score")] == 7
    assert found[("medvision_last_run_objects", "failed", "score")] == 2
    assert found[("medvision_last_run_seconds", "list", "score")] == 1.5
    assert found[("medvision_last_end_timestamp_seconds", "over_budget", "score")] > 1.7e9


def test_a_shifted_night_is_recorded_by_feature_and_no_class_is_named(recorded: list[Any]) -> None:
    features = tuple(
        FeatureDrift(name, psi, None, psi > 0.25, 60, 30)
        for name, psi in (("kvp", 0.4), ("p_DOE", 0.3), ("p_JANE", 0.6), ("height", 0.01), ("s3://DOE", 0.2))
    )
    drift = Drift(True, shifted=("p_JANE", "kvp", "p_DOE"), features=features)
    summary = RunSummary("r", "score", "m", "a", 60, 0, 0, 60, 0, drift=drift)
    monitoring.record_run("score", "done", json.loads(json.dumps(asdict(summary))))  # as it reaches the child process
    found = {
        (name, labels.get("feature")): value for name, value, labels in recorded if "drift" in name or "shift" in name
    }
    assert found == {
        ("medvision_last_run_drift_psi", "kvp"): 0.4,
        ("medvision_last_run_drift_psi", "score"): 0.6,
        ("medvision_last_run_drift_psi", "height"): 0.01,
        ("medvision_last_run_drift_psi", "other"): 0.2,
        ("medvision_last_run_shifted_features", None): 3,
    }
    assert not re.search("DOE|JANE", str(recorded))


def test_a_night_that_was_not_judged_tells_no_drift(recorded: list[Any]) -> None:
    for drift in (None, Drift(False, "too few images")):
        monitoring.record_run("score", "done", asdict(RunSummary("r", "score", "m", "a", 1, 0, 0, 1, 0, drift=drift)))
    assert recorded
    assert not [name for name, _, _ in recorded if "drift" in name or "shift" in name]


def test_the_end_of_a_run_carries_its_drift_to_the_child_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def run(*_: Any, **options: Any) -> Any:
        sent.append(json.loads(options["input"]))
        return subprocess.CompletedProcess((), 0)

    monkeypatch.setattr(monitoring.subprocess, "run", run)
    summary = RunSummary("r", "score", "m", "a", 1, 0, 0, 1, 0, drift=Drift(True, shifted=("kvp",)))
    assert monitoring.record_end(RayConfig(address="127.0.0.1:1"), "score", "done", asdict(summary))
    assert sent[0]["result"]["drift"]["shifted"] == ["kvp"]


def test_every_stage_code_status_and_count_of_the_package_has_a_label() -> None:
    assert {stage.value for stage in Stage} <= set(monitoring.STAGES)
    assert set(STATUS.values()) == set(monitoring.STATUSES)
    assert {code.value for code in ErrorCode} == set(monitoring._codes())
    assert set(monitoring.RUN_STATES) <= set(RunSummary.__dataclass_fields__)


def test_a_cluster_that_is_gone_costs_a_bounded_time_and_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitoring, "_CONNECT_SECONDS", 0.2)
    assert monitoring.record_end(RayConfig(address="127.0.0.1:1"), "score", "done", {}) is False


@pytest.mark.parametrize("expression", expressions())
def test_dashboard_and_alerts_name_metrics_labels_and_values_that_there_are(expression: str) -> None:
    names = set(re.findall(r"\bray_\w+", expression))
    assert names
    assert names <= set(METRICS)
    allowed = {label for name in names for label in METRICS[name].labels}
    for labels in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in labels.split(",")} <= allowed | OF_RAY
    for name, inside in re.findall(r"\b(ray_\w+)\{([^}]*)\}", expression):
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', inside):
            assert label in METRICS[name].labels
            assert values == "$verb" or set(values.split("|")) <= VALUES[label]


def test_every_metric_is_on_the_dashboard() -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    assert not [name for name in METRICS if name not in text]


def test_alerts_are_about_no_run_failures_and_a_collapsed_rate() -> None:
    rules = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} >= {
        "MedvisionNoRunFinished",
        "MedvisionFailureShareHigh",
        "MedvisionRateCollapsed",
        "MedvisionImagesShifted",
    }
    for rule in rules:
        assert {"expr", "labels", "annotations"} <= set(rule)
        assert not set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) - {"verb", "status"}
