"""`make test-serve`: requests made from the OpenAPI document, and 2,000 damaged files; nothing but answers and refusals."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from mutate import make_case
from seed_files import strata_of

from medvision_ray.bundle import Bundle
from medvision_ray.config.serving import RequestLimits, ScaleConfig, ServeJob, ServingDecodeConfig
from medvision_ray.imaging.errors import ErrorCode
from medvision_ray.scoring.preparing import resident_bytes
from medvision_ray.serving.app import create_app
from medvision_ray.serving.local import LocalEngine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CASES = int(os.environ.get("MEDVISION_SERVE_CASES", "2000"))
TOKEN = "token-of-the-fuzz-test-012345"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/octet-stream"}
OWN_CODES = {"unsupported_format", "empty_file", "too_large"}


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[LocalEngine]:
    limits = ServingDecodeConfig(
        max_seconds=10, max_memory_bytes=1 << 30, max_decoded_bytes=256 << 20, max_bytes=8 << 20
    )
    settings = ServeJob(
        bundles=(bundle.uri,),
        scale=ScaleConfig(decoders=2),
        decode=limits,
        limits=RequestLimits(body_seconds=5, answer_seconds=30, expected_seconds=None),
    )
    engine = LocalEngine(settings)
    engine.start()
    engine.settings = settings  # type: ignore[attr-defined]
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine: LocalEngine) -> Iterator[str]:
    defects: list[str] = []
    app = create_app(
        engine,
        engine.settings,  # type: ignore[attr-defined]
        TOKEN,
        on_defect=lambda _, error: defects.append(repr(error)),
    )
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)
    assert defects == []


def test_damaged_files_are_answered_or_refused_and_memory_stays(
    address: str, engine: LocalEngine, corpora_dir: Path
) -> None:
    strata = strata_of(corpora_dir)
    known = {code.value for code in ErrorCode} | OWN_CODES
    seen: Counter[str] = Counter()
    memory: list[int] = []

    def send(number: int) -> tuple[int, int, Any]:
        response = http.post("/v1/predict", content=make_case(number, strata).data, headers=HEADERS)
        return number, response.status_code, response.json()

    with httpx.Client(base_url=address, timeout=60) as http, ThreadPoolExecutor(3) as pool:
        for start in range(0, CASES, 100):
            for number, status, body in pool.map(send, range(start, min(start + 100, CASES))):
                assert status in (200, 400, 413, 415, 422), f"case {number}: {status} {body}"
                code = "scored" if status == 200 else body["code"]
                assert status == 200 or code in known, f"case {number}: {body}"
                seen[code] += 1
            memory.append(resident_bytes())
        assert http.get("/readyz").status_code == 200
    half = len(memory) // 2
    print(f"{CASES} damaged files: {dict(seen.most_common())}; MB resident: {[size >> 20 for size in memory]}")
    assert seen["internal_error"] == 0
    assert seen["scored"] > CASES // 20
    assert max(memory[half:]) < max(memory[:half]) + (64 << 20)


def test_requests_out_of_the_openapi_document_are_answered_as_it_says(address: str) -> None:
    """Status, content type and schema of every answer are those documented, also to requests that break the document.

    Left out: that any bytes are an image (`positive_data_acceptance`).
    """
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"),
        *("--header", f"Authorization: Bearer {TOKEN}", "--checks", "all"),
        *("--exclude-checks", "positive_data_acceptance", "--max-examples", "60", "--seed", "1", "--no-color"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:]
