"""`medvision plan`: nodes, hours and money for an archive, out of what was measured of each stage.

Each constant names the recorded measurement that it is taken from (benchmarks/results/) or says that it is
assumed. Rates are of this package on 2 virtual cores of an AMD EPYC; another processor moves all of them.
docs/scaling.md has the model, what of it was never checked, and what breaks first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from medvision_ray.errors import UsageError


@dataclass(frozen=True)
class Format:
    """One kind of object.

    Attributes:
        cpu_seconds: from bytes to model input (decode.json, `input`, `images_per_cpu_second`, its inverse).
        megabytes: on the store; the benchmark's uncompressed size, and for compressed kinds an assumed ratio.
    """

    cpu_seconds: float
    megabytes: float


FORMATS: dict[str, Format] = {
    "ct": Format(1 / 236.36, 0.53),  # 512 x 512, uncompressed
    "cr": Format(1 / 37.44, 8.4),  # 2048 x 2048, uncompressed; so are the pixels of all `cr-`
    "cr-jpeg-lossless": Format(1 / 17.02, 3.8),  # assumed 2.2 : 1
    "cr-jpeg-ls": Format(1 / 9.15, 3.4),  # assumed 2.5 : 1
    "cr-rle": Format(1 / 28.16, 5.6),  # assumed 1.5 : 1
    "cr-jpeg-2000": Format(1 / 1.83, 3.4),  # assumed 2.5 : 1
    "jpeg": Format(1 / 144.88, 0.25),  # 1024 x 1024; assumed 4 : 1
    "png-16": Format(1 / 12.67, 5.0),  # 2048 x 2048, 16 bit; assumed 1.7 : 1
    "nifti-gz": Format(1 / 2.44, 16.0),  # 256 x 256 x 256; assumed 2 : 1
}


@dataclass(frozen=True)
class Model:
    """What a forward pass costs at 224 pixels.

    Attributes:
        cpu_seconds: an image on a core, float32 (score_vs_dataloader.json, `limit.cpu_per_image` of chest_xray, which
            holds a 6 kB JPEG's decode too).
        h100_images_per_second: bf16, batches of 256 (gpu.json, `predictor`).
    """

    cpu_seconds: float
    h100_images_per_second: float


MODELS = {"small": Model(0.0088, 20712.0), "hybrid": Model(0.0604, 8728.4)}
GPUS = {
    "h100": 1.0,
    # Assumed, not measured: the ratio of memory bandwidths, 300 to 3,350 GB/s, which bounds such networks.
    "l4": 300 / 3350,
}

EFFICIENCY = 0.92
"""Of whole runs against their stages alone: the mean of 0.805 and 1.031 (score_vs_dataloader.json, `ratio_to_limit`)."""
OVERHEAD_CPU_SECONDS = 0.00056
"""Ray's share of an image: (0.733 - 0.454) ms on 2 cores at 100,000 objects (scale.json)."""
STARTUP_SECONDS = 10.8
"""Command to first scored image (startup.json)."""
NODE_SECONDS = 180.0
"""Assumed: an instance boots, pulls the image and joins."""
LIST_SECONDS = 3.5e-6
"""An object of a Parquet inventory, on the driver (nothing_new.json, 3.5 s for a million)."""
PUBLISH_SECONDS = 3.152e-5
"""A row, on the driver (scale.json, 3.152 s for 100,000)."""
DRIVER_BYTES = 802.0
"""An object of the inventory, in the driver's memory at its peak (nothing_new.json; a million, the process itself in it)."""
ROW_BYTES = 200.0
"""A row in the tables, without mask (tables.json, 40 MB for 200,000)."""
BLOCK_ROWS = 256
"""Rows of a block (the default of `scoring.block_rows`): one file of rows and one record of progress each."""
GET_LIMIT, PUT_LIMIT = 5500.0, 3500.0
"""Requests a second that S3 promises for a prefix (its user guide)."""


@dataclass(frozen=True)
class Site:
    """The cluster and what it costs. Prices are list prices of us-east-1 from 2025 and are to be replaced by your own.

    Attributes:
        cores: virtual ones, of a CPU worker (m6i.4xlarge).
        network_bytes: a second, of a CPU worker; the type's baseline of 6.25 Gbit/s.
        driver_bytes: memory of the head (m6i.xlarge), of which half is the driver's.
        cpu_price: dollars an hour, a CPU worker.
        gpu_price: dollars an hour, a node of one GPU (g6.4xlarge).
        head_price: dollars an hour.
        get_price, put_price: dollars for 1,000 requests (LIST is priced as PUT).
        storage_price: dollars for a GB and month.
    """

    cores: int = 16
    network_bytes: float = 6.25e9 / 8
    driver_bytes: float = 16 * 2**30
    cpu_price: float = 0.768
    gpu_price: float = 1.3232
    head_price: float = 0.192
    get_price: float = 0.0004
    put_price: float = 0.005
    storage_price: float = 0.023


@dataclass(frozen=True)
class Plan:
    """What it takes.

    Attributes:
        cpu_nodes: CPU workers.
        gpu_nodes: nodes of one GPU.
        hours: from the command to the last commit.
        dollars: nodes, head and requests, once.
        bottleneck: what most of the time is spent on: `decode`, `predict`, `gpu`, `network`, `requests` or `driver`.
        images_per_second: of the scoring pass.
        gets_per_second: GET requests on the busiest prefix, where objects are spread evenly.
        puts_per_second: PUT requests of rows and progress, on the output's prefix.
        runs: parts (`archive.part`) that the archive is cut into, so that one fits into the driver's memory.
        table_gigabytes: added to the tables.
        warnings: sentences on what does not fit.
    """

    cpu_nodes: int
    gpu_nodes: int
    hours: float
    dollars: float
    bottleneck: str
    images_per_second: float
    gets_per_second: float
    puts_per_second: float
    runs: int
    table_gigabytes: float
    warnings: tuple[str, ...]


def parse_mix(text: str) -> dict[str, float]:
    """Shares of formats, `ct=0.7,cr-rle=0.3`; they are scaled to 1.

    Raises:
        UsageError: an unknown format or a share that is no positive number.
    """
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        if name not in FORMATS:
            raise UsageError(f"Expected --mix of {', '.join(FORMATS)}, but got {name!r}.")
        try:
            mix[name] = float(share or "1")
        except ValueError:
            mix[name] = -1.0
        if not 0 < mix[name] < math.inf:
            raise UsageError(f"Expected --mix NAME=SHARE with a positive number, but got {part.strip()!r}.")
    total = sum(mix.values())
    return {name: share / total for name, share in mix.items()}


def plan(
    images: float,
    mix: Mapping[str, float],
    *,
    model: str = "hybrid",
    gpu: str | None = None,
    hours: float | None = None,
    nodes: int | None = None,
    prefixes: int = 1,
    site: Site | None = None,
) -> Plan:
    """Plan one pass over an archive.

    Args:
        images: objects to score, more than 0.
        mix: share of each format, together 1.
        gpu: which GPU predicts; None predicts on the CPUs.
        hours: how long it may take; the nodes are found for it.
        nodes: how many CPU workers there are; the hours are found for it. One of the two is given.
        prefixes: prefixes of the archive that objects are spread over evenly.

    Raises:
        UsageError: a number is out of range, or so few hours that the driver alone takes longer.
    """
    site = site or Site()
    if not images >= 1 or prefixes < 1 or (hours is None) == (nodes is None) or (nodes is not None and nodes < 1):
        raise UsageError("Expected --images and --prefixes of at least 1, and either --hours or --nodes, above 0.")
    stages = _cpu_seconds(mix, model, gpu)
    node_rate, megabytes = site.cores * EFFICIENCY / sum(stages.values()), _mean(mix, "megabytes")
    network_rate = site.network_bytes / (megabytes * 1e6)
    runs = max(1, math.ceil(images * DRIVER_BYTES / (site.driver_bytes / 2)))
    driver = images * (runs * LIST_SECONDS + PUBLISH_SECONDS)  # each part lists the whole archive
    fixed = driver + runs * STARTUP_SECONDS + NODE_SECONDS
    ceiling = GET_LIMIT * prefixes
    if nodes is None:
        left = (hours or 0) * 3600 - fixed
        if left <= 0:
            raise UsageError(
                f"Expected more than {fixed / 3600:.1f} hours: so long the driver lists and publishes, with any number of nodes. "
                "Partition the archive into runs with outputs of their own (docs/scaling.md)."
            )
        nodes = math.ceil(images / left / min(node_rate, network_rate))
    rate = min(nodes * min(node_rate, network_rate), ceiling)
    gpu_rate = MODELS[model].h100_images_per_second * GPUS[gpu] if gpu else math.inf
    gpu_nodes = math.ceil(rate / gpu_rate) if gpu else 0
    spent = {name: images * seconds / (site.cores * EFFICIENCY * nodes) for name, seconds in stages.items()}
    spent.pop("overhead")
    spent.update(network=images / (nodes * network_rate), requests=images / ceiling, driver=driver)
    if gpu:
        spent["gpu"] = images / (gpu_nodes * gpu_rate)
    took = (fixed + images / rate) / 3600
    puts = 2 * rate / BLOCK_ROWS
    return Plan(
        cpu_nodes=nodes,
        gpu_nodes=gpu_nodes,
        hours=took,
        dollars=_dollars(site, images, nodes, gpu_nodes, took),
        bottleneck=max(spent, key=lambda name: spent[name]),
        images_per_second=rate,
        gets_per_second=rate / prefixes,
        puts_per_second=puts,
        runs=runs,
        table_gigabytes=images * ROW_BYTES / 1e9,
        warnings=(
            *_request_warnings(rate, ceiling, puts),
            *_time_warnings(driver, took, hours),
        ),
    )


def _cpu_seconds(mix: Mapping[str, float], model: str, gpu: str | None) -> dict[str, float]:
    """Core seconds of an image, by stage."""
    return {
        "decode": _mean(mix, "cpu_seconds"),
        "predict": 0.0 if gpu else MODELS[model].cpu_seconds,
        "overhead": OVERHEAD_CPU_SECONDS,
    }


def _mean(mix: Mapping[str, float], what: str) -> float:
    return sum(share * float(getattr(FORMATS[name], what)) for name, share in mix.items())


def _dollars(site: Site, images: float, nodes: int, gpu_nodes: int, hours: float) -> float:
    machines = (nodes * site.cpu_price + gpu_nodes * site.gpu_price + site.head_price) * hours
    lists, puts = images / 1000, 2 * images / BLOCK_ROWS
    return machines + images / 1000 * site.get_price + (lists + puts) / 1000 * site.put_price


def _request_warnings(rate: float, ceiling: float, puts: float) -> list[str]:
    found = []
    if rate >= ceiling:
        found.append(f"S3 answers at most {ceiling:,.0f} GET a second from these prefixes: more nodes would wait.")
    if puts > PUT_LIMIT:
        found.append(f"{puts:,.0f} PUT a second are above the {PUT_LIMIT:,.0f} of one prefix: larger blocks.")
    return found


def _time_warnings(driver: float, took: float, hours: float | None) -> list[str]:
    found = []
    if driver > 0.25 * took * 3600:
        found.append(
            f"The driver alone lists and publishes for {driver / 3600:.1f} h: partition the archive into runs."
        )
    if hours is not None and took > hours * 1.01:
        found.append(f"{hours:g} hours cannot be kept.")
    return found
