"""The plan: by hand for simple cases, against recorded whole runs, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medvision_ray import planning
from medvision_ray.cli import main
from medvision_ray.cli_cluster import GPU_NAMES, MODEL_NAMES
from medvision_ray.errors import UsageError
from medvision_ray.planning import Site, plan

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks/results"


def recorded(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def simple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round numbers: 0.01 s decode, 0.03 s predict, nothing else; half of the cores' time is of use."""
    for name, value in {
        "FORMATS": {"a": planning.Format(0.01, 1.0), "b": planning.Format(0.05, 3.0)},
        "MODELS": {"hybrid": planning.Model(0.03, 1000.0)},
        "GPUS": {"h100": 1.0},
        **{"EFFICIENCY": 0.5, "OVERHEAD_CPU_SECONDS": 0.0, "STARTUP_SECONDS": 0.0, "NODE_SECONDS": 0.0},
        **{"LIST_SECONDS": 0.0, "PUBLISH_SECONDS": 0.0, "DRIVER_BYTES": 1.0, "ROW_BYTES": 100.0, "BLOCK_ROWS": 10},
    }.items():
        monkeypatch.setattr(planning, name, value)


SITE = Site(cores=8, network_bytes=1e9, cpu_price=1.0, gpu_price=2.0, head_price=0.5, get_price=0.0, put_price=0.0)


@pytest.mark.usefixtures("simple")
def test_hours_for_given_nodes() -> None:
    # 8 cores at half use are 4; 0.04 s an image: 100 images/s a node, 200 with two; 720,000 images take an hour.
    found = plan(720_000, {"a": 1.0}, nodes=2, site=SITE)
    assert found.images_per_second == pytest.approx(200)
    assert found.hours == pytest.approx(1.0)
    assert found.dollars == pytest.approx(2 * 1.0 + 0.5)
    assert (found.bottleneck, found.runs, found.gpu_nodes) == ("predict", 1, 0)
    assert found.gets_per_second == pytest.approx(200)
    assert found.puts_per_second == pytest.approx(2 * 200 / 10)
    assert found.table_gigabytes == pytest.approx(0.072)
    assert found.warnings == ()


@pytest.mark.usefixtures("simple")
def test_nodes_for_given_hours_and_a_mix() -> None:
    # Half a, half b: 0.03 s decode and 0.03 s predict, 66.7 images/s a node; 720,000 in half an hour need 400 images/s.
    found = plan(720_000, {"a": 0.5, "b": 0.5}, hours=0.5, prefixes=4, site=SITE)
    assert found.cpu_nodes == 6
    assert found.images_per_second == pytest.approx(400)
    assert found.gets_per_second == pytest.approx(100)


@pytest.mark.usefixtures("simple")
def test_a_gpu_takes_the_forward_pass_off_the_cores() -> None:
    # 0.01 s: 400 images/s a node; five nodes feed 2,000 images/s to two GPUs of 1,000.
    found = plan(7_200_000, {"a": 1.0}, gpu="h100", nodes=5, site=SITE)
    assert (found.images_per_second, found.gpu_nodes) == (pytest.approx(2000), 2)
    assert found.dollars == pytest.approx(5 * 1.0 + 2 * 2.0 + 0.5)
    assert found.bottleneck in ("decode", "gpu")


@pytest.mark.usefixtures("simple")
def test_each_bottleneck_can_be_one() -> None:
    assert plan(1e6, {"b": 1.0}, nodes=1, site=SITE).bottleneck == "decode"
    slow = Site(cores=8, network_bytes=10e6)  # 10 images of 1 MB a second
    found = plan(36_000, {"a": 1.0}, nodes=1, site=slow)
    assert (found.bottleneck, found.hours) == ("network", pytest.approx(1.0))
    found = plan(1e6, {"a": 1.0}, nodes=1000, site=SITE)
    assert (found.bottleneck, found.images_per_second) == ("requests", 5500)
    assert "5,500 GET" in found.warnings[0]
    assert plan(1e6, {"a": 1.0}, nodes=1000, prefixes=100, site=SITE).images_per_second == pytest.approx(100_000)


@pytest.mark.usefixtures("simple")
def test_the_driver_can_be_the_bottleneck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PUBLISH_SECONDS", 0.001)
    found = plan(3_600_000, {"a": 1.0}, nodes=1000, prefixes=1000, site=SITE)
    assert found.bottleneck == "driver"
    assert any("partition the archive" in line for line in found.warnings)
    with pytest.raises(UsageError, match=r"more than 1\.0 hours"):
        plan(3_600_000, {"a": 1.0}, hours=0.9, site=SITE)


@pytest.mark.usefixtures("simple")
def test_hours_that_the_store_forbids_are_told() -> None:
    found = plan(3_600_000, {"a": 1.0}, hours=0.1, site=SITE)  # 10,000 images/s, of which one prefix gives 5,500
    assert found.hours > 0.1
    assert any("cannot be kept" in line for line in found.warnings)


@pytest.mark.usefixtures("simple")
def test_a_run_fits_into_half_of_the_heads_memory() -> None:
    assert plan(1000, {"a": 1.0}, nodes=1, site=Site(driver_bytes=500.0)).runs == 4
    assert plan(1000, {"a": 1.0}, nodes=1, site=Site(driver_bytes=2000.0)).runs == 1


@pytest.mark.usefixtures("simple")
def test_requests_are_paid() -> None:
    site = Site(cpu_price=0.0, gpu_price=0.0, head_price=0.0, get_price=0.4, put_price=5.0)
    # 1,000 GET, 1 LIST, 2 PUT for each of 100 blocks.
    assert plan(1000, {"a": 1.0}, nodes=1, site=site).dollars == pytest.approx(0.4 + (1 + 200) / 1000 * 5.0)


def test_twice_the_nodes_is_twice_the_speed_and_more_images_are_more_hours() -> None:
    mix = planning.parse_mix("ct=0.7,cr-rle=0.3")
    one, two = (plan(5e6, mix, nodes=nodes, prefixes=64) for nodes in (10, 20))
    assert two.images_per_second == pytest.approx(2 * one.images_per_second)
    assert plan(1e7, mix, nodes=10, prefixes=64).hours > one.hours
    for hours in (6.0, 12.0, 24.0):
        assert plan(5e6, mix, hours=hours, prefixes=64).hours <= hours


@pytest.mark.parametrize(("case", "model"), [("small CNN", "small"), ("MobileNetV2 hybrid", "hybrid")])
def test_the_plan_agrees_with_a_whole_run_that_no_constant_was_taken_from(case: str, model: str) -> None:
    """The constants are of chest X-rays and of single decoders; the run is of CT slices, on 2 cores, within 20 %."""
    measured = recorded("score_vs_dataloader")["cases"][f"chest_ct_dicom, {case}"]["medians"]["project"]
    planned = plan(1e6, {"ct": 1.0}, model=model, nodes=1, site=Site(cores=2)).images_per_second
    assert planned == pytest.approx(measured["images_per_second"], rel=0.2)


def test_each_constant_is_what_was_recorded() -> None:
    decode = recorded("decode")["cases"]
    for name, case in {
        **{"ct": "ct 512 uncompressed", "cr": "cr 2k uncompressed", "cr-jpeg-lossless": "cr 2k jpeg lossless"},
        **{"cr-jpeg-ls": "cr 2k jpeg-ls", "cr-rle": "cr 2k rle", "cr-jpeg-2000": "cr 2k jpeg 2000"},
        **{"jpeg": "jpeg 1k", "png-16": "png 16 bit 2k", "nifti-gz": "nifti gz 256^3"},
    }.items():
        rate = decode[case]["input"]["images_per_cpu_second"]["this project"]
        assert planning.FORMATS[name].cpu_seconds == pytest.approx(1 / rate)
    scored = recorded("score_vs_dataloader")["cases"]
    gpu = recorded("gpu")["predictor"]
    ratios = []
    for name, case in (("small", "small CNN"), ("hybrid", "MobileNetV2 hybrid")):
        about = scored[f"chest_xray, {case}"]
        assert planning.MODELS[name].cpu_seconds == about["medians"]["limit"]["cpu_per_image"]
        assert planning.MODELS[name].h100_images_per_second == gpu[case]["bf16"]["256"]["predictor"]
        ratios.append(about["ratio_to_limit"])
    assert pytest.approx(sum(ratios) / 2, abs=0.01) == planning.EFFICIENCY
    largest = recorded("scale")["sizes"]["100000"]
    own = (largest["ms_per_image"] - largest["pool_ms_per_image"]) * 2 / 1000
    assert pytest.approx(own, rel=0.02) == planning.OVERHEAD_CPU_SECONDS
    assert pytest.approx(largest["publish_seconds"] / 1e5, rel=0.01) == planning.PUBLISH_SECONDS
    nothing = recorded("nothing_new")
    listed = nothing["medians"]["parquet"]
    assert pytest.approx(listed["list_seconds"] / nothing["objects"]) == planning.LIST_SECONDS
    assert pytest.approx(listed["peak_bytes"] / nothing["objects"], abs=1) == planning.DRIVER_BYTES
    assert pytest.approx(recorded("startup")["medians"]["first scored image"], abs=0.5) == planning.STARTUP_SECONDS
    tables = recorded("tables")
    assert tables["publish_megabytes"] * 1e6 / tables["options"]["rows"] == pytest.approx(planning.ROW_BYTES)


@pytest.mark.parametrize("mix", ["", "ct=0", "ct=-1", "ct=x", "xray=1", "ct=nan", "ct=inf"])
def test_a_wrong_mix_is_refused(mix: str) -> None:
    with pytest.raises(UsageError, match="Expected --mix"):
        planning.parse_mix(mix)


def test_shares_are_scaled() -> None:
    assert planning.parse_mix("ct=3, cr=1") == {"ct": 0.75, "cr": 0.25}


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--images", "50e6", "--mix", "ct=0.8,cr-rle=0.2", "--hours", "24", "--prefixes", "256"]) == 0
    out = capsys.readouterr().out
    assert "CPU nodes" in out
    assert "bottleneck: predict" in out
    assert main(["plan", "--images", "1e6", "--nodes", "4", "--gpu", "l4", "--cpu-price", "0.3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_nodes"] >= 1
    for wrong in (["--nodes", "0"], ["--nodes", "4", "--cores", "-1"], ["--hours", "1", "--nodes", "4"]):
        assert main(["plan", "--images", "1e6", *wrong]) == 2
    assert main(["plan", "--images", "0", "--nodes", "4"]) == 2
    assert main(["plan", "--images", "nan", "--nodes", "4"]) == 2


def test_a_block_is_as_large_as_the_default() -> None:
    from medvision_ray.config import ScoreJob

    settings = ScoreJob.model_fields["scoring"].annotation
    assert settings.model_fields["block_rows"].default == planning.BLOCK_ROWS


def test_the_choices_are_those_that_there_are() -> None:
    assert tuple(planning.MODELS) == MODEL_NAMES
    assert tuple(planning.GPUS) == GPU_NAMES
