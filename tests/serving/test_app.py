"""The HTTP side with an engine of the test's own: routes, refusals, token, limits, documentation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from medvision_ray.config.serving import HttpConfig, RequestLimits, ServeJob, ServingDecodeConfig
from medvision_ray.errors import UsageError
from medvision_ray.imaging.errors import DecodeError, ErrorCode
from medvision_ray.serving import admission as admission_module
from medvision_ray.serving.admission import Admission
from medvision_ray.serving.answers import Answer, ImageFacts, ModelFacts, Timing
from medvision_ray.serving.app import create_app
from medvision_ray.serving.engine import PredictOptions
from medvision_ray.serving.problems import RequestError
from medvision_ray.serving.security import load_token

TOKEN = "a-token-of-the-tests-0123456789"
PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 64
HOME = "http://127.0.0.1:8000"


class Fake:
    """An engine that answers at once, or does what `then` does."""

    def __init__(self, then: Any = None) -> None:
        self.then = then
        self.seen: list[tuple[bytes, PredictOptions]] = []

    async def predict(self, data: bytes, options: PredictOptions) -> Answer:
        self.seen.append((data, options))
        if self.then is not None:
            await self.then()
        return Answer(
            request_id=options.request_id,
            model_id="m-0",
            preprocess_id="0" * 12,
            image=ImageFacts(
                height=1, width=1, frames=1, modality="OT", spacing_mm=None, spacing_source="none", format="png"
            ),
            predicted_label=None,
            predicted_probability=None,
            classes=[],
            key_frame=0,
            mask=None,
            frames=[],
            explanation=None,
            timing=Timing(decode_ms=1, preprocess_ms=1, predict_ms=1, total_ms=3),
        )

    async def isolated(self, task: str, data: bytes, options: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        return {}, b""

    async def models(self) -> list[ModelFacts]:
        return []

    async def card(self, model: str) -> str:
        if model != "m-0":
            raise RequestError(404, "unknown_model", "There is no such model.")
        return "# m-0\n"

    def ready(self) -> bool:
        return self.then is None


def settings(**more: Any) -> ServeJob:
    return ServeJob(bundles=("somewhere",), **more)


def client(app: FastAPI, base_url: str = HOME) -> TestClient:
    return TestClient(app, base_url=base_url, raise_server_exceptions=False)


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (body["status"], body["code"]) == (status, code)
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def test_raw_body_and_form_reach_the_engine_alike() -> None:
    engine = Fake()
    http = client(create_app(engine, settings()))
    raw = http.post("/v1/predict?mask=rle&model=m", content=PNG, headers={"Content-Type": "image/png"})
    form = http.post("/v1/predict", files={"file": ("Doe^Jane.png", PNG, "image/png")})
    assert (raw.status_code, form.status_code) == (200, 200)
    assert [data for data, _ in engine.seen] == [PNG, PNG]
    assert engine.seen[0][1].mask == "rle"
    assert engine.seen[0][1].model == "m"
    assert raw.json()["request_id"] == raw.headers["x-request-id"]


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (PNG, "text/plain", 415, "unsupported_media_type"),
        (PNG, "image/jpeg", 415, "content_type_mismatch"),
        (b"no image at all", "application/octet-stream", 415, "unsupported_format"),
        (b"", "image/png", 400, "empty_file"),
        (b"no form", "multipart/form-data; boundary=x", 400, "bad_form"),
        (b"no form", "multipart/form-data", 400, "bad_form"),
        (b"\0" * 2000, "image/png", 413, "too_large"),
    ],
)
def test_a_body_that_is_refused_says_why(body: bytes, kind: str, status: int, code: str) -> None:
    http = client(create_app(Fake(), settings(decode=ServingDecodeConfig(max_bytes=1000))))
    problem(http.post("/v1/predict", content=body, headers={"Content-Type": kind}), status, code)


def test_a_body_of_unknown_length_is_cut_off_at_the_limit() -> None:
    taken = 0

    def chunks() -> Any:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b"\0" * 1000

    http = client(create_app(Fake(), settings(decode=ServingDecodeConfig(max_bytes=10_000))))
    problem(http.post("/v1/predict", content=chunks(), headers={"Content-Type": "image/png"}), 413, "too_large")


def test_a_decode_error_is_422_with_the_code_of_the_failures_table() -> None:
    async def fail() -> None:
        raise DecodeError(ErrorCode.TRUNCATED, bytes=7)

    http = client(create_app(Fake(fail), settings()))
    body = problem(http.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"}), 422, "truncated")
    assert body["stage"] == "decode"
    assert 'medvision_serve_answers_total{code="truncated",status="422"} 1.0' in http.get("/metrics").text


def test_a_defect_is_told_without_its_text() -> None:
    told: list[tuple[str, Exception]] = []

    async def fail() -> None:
        raise KeyError("DOE^JANE")

    app = create_app(Fake(fail), settings(), on_defect=lambda request, error: told.append((request, error)))
    response = client(app).post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"})
    body = problem(response, 500, "internal_error")
    assert "DOE" not in response.text
    assert told[0][0] == body["request_id"]


def test_a_slow_answer_is_504() -> None:
    async def sleep() -> None:
        await asyncio.sleep(5)

    http = client(create_app(Fake(sleep), settings(limits=RequestLimits(answer_seconds=0.05))))
    problem(http.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"}), 504, "answer_timeout")


def test_a_body_that_arrives_too_slowly_is_408_and_frees_its_place() -> None:
    httpx = pytest.importorskip("httpx2")
    engine = Fake()
    app = create_app(engine, settings(limits=RequestLimits(body_seconds=0.05)))

    async def body() -> AsyncIterator[bytes]:
        yield PNG
        await asyncio.sleep(5)
        yield PNG

    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=HOME) as http:
            return await http.post("/v1/predict", content=body(), headers={"Content-Type": "image/png"})

    problem(asyncio.run(run()), 408, "body_timeout")
    assert engine.seen == []
    assert (app.state.admission.requests, app.state.admission.body_bytes) == (0, 0)


def test_only_so_many_requests_are_taken_on_and_the_rest_told_to_come_again() -> None:
    httpx = pytest.importorskip("httpx2")
    release = asyncio.Event()
    engine = Fake(release.wait)
    app = create_app(engine, settings(limits=RequestLimits(max_in_flight=2)))

    async def run() -> list[Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url=HOME) as http:
            send = [
                asyncio.create_task(http.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"}))
                for _ in range(6)
            ]
            while len(engine.seen) < 2 or sum(task.done() for task in send) < 4:
                await asyncio.sleep(0.01)
            release.set()
            return await asyncio.gather(*send)

    answers = asyncio.run(run())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    problem(refused, 429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert app.state.admission.requests == 0
    assert app.state.admission.body_bytes == 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that is set by hand: `clock.now += 1.0`."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(admission_module.time, "perf_counter", lambda: made.now)
    return made


def serve_batch(admission: Admission, clock: Any, requests: int, seconds: float, frames: int = 1) -> None:
    """So many requests are answered at once after so long; then nobody asks for an hour."""
    with contextlib.ExitStack() as stack:
        for _ in range(requests):
            stack.enter_context(admission.working())
        clock.now += seconds
        for _ in range(requests):
            admission.answered(frames)
    clock.now += 3600


@pytest.mark.parametrize("batch", [1, 5, 16])
def test_the_pace_is_that_of_answers_while_busy_whatever_the_batches(clock: Any, batch: int) -> None:
    admission = Admission(RequestLimits())
    assert admission.seconds_per_frame == 0
    for _ in range(10):
        serve_batch(admission, clock, batch, 0.1 * batch)
        assert admission.seconds_per_frame == pytest.approx(0.1, rel=0.3)
    for _ in range(-(-65 // batch)):
        serve_batch(admission, clock, batch, 0.2 * batch)
    assert admission.seconds_per_frame == pytest.approx(0.2, rel=0.3)


def test_as_many_are_taken_on_as_can_be_answered_in_time(clock: Any) -> None:
    """At 0.1 s each five in 0.55 s; and two whatever the pace."""
    admission = Admission(RequestLimits(max_in_flight=100, expected_seconds=0.55))
    assert taken(admission) == 100
    for _ in range(64):
        serve_batch(admission, clock, 1, 0.1)
    assert taken(admission) == 5
    with admission.admit(), admission.admit():
        assert admission.load == pytest.approx(2 / 5)
    serve_batch(admission, clock, 1, 20.0, frames=300)
    assert taken(admission) >= 5
    with admission.working():
        clock.now += 60  # a standstill shows while it lasts
        assert taken(admission) == 2
    assert taken(Admission(RequestLimits(max_in_flight=7, expected_seconds=None))) == 7


def taken(admission: Admission) -> int:
    """How many requests are taken on before one is refused."""
    with contextlib.ExitStack() as stack:
        with pytest.raises(RequestError) as caught:
            any(stack.enter_context(admission.admit()) is None for _ in range(1000))
        assert (caught.value.status, caught.value.code) == (429, "overloaded")
        assert admission.load == 1
        return admission.requests


def test_an_answer_counts_its_frames_for_the_pace() -> None:
    app = create_app(Fake(), settings())
    client(app).post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"})
    assert [frames for _, frames in app.state.admission._answers] == [0, 1]
    assert app.state.admission.seconds_per_frame > 0


def test_bodies_together_are_limited() -> None:
    http = client(create_app(Fake(), settings(limits=RequestLimits(max_body_bytes_in_flight=50))))
    problem(http.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"}), 429, "overloaded")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m-0/card", "/metrics"])
@pytest.mark.parametrize("header", [None, "Bearer wrong", f"Basic {TOKEN}", "Bearer \xff"])
def test_without_the_token_nothing_is_told(path: str, header: str | None) -> None:
    http = client(create_app(Fake(), settings(), TOKEN))
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = http.get(path, headers=headers)
    problem(response, 401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"
    assert http.get(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_without_the_token_no_body_is_read() -> None:
    engine = Fake()
    http = client(create_app(engine, settings(), TOKEN))
    problem(http.post("/v1/predict", content=PNG, headers={"Content-Type": "image/png"}), 401, "unauthorized")
    assert engine.seen == []


def test_without_a_token_a_foreign_host_name_is_refused() -> None:
    app = create_app(Fake(), settings())
    problem(client(app, "http://evil.example").get("/v1/models"), 400, "unknown_host")
    for host in ("http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000"):
        assert client(app, host).get("/v1/models").status_code == 200
    assert client(create_app(Fake(), settings(), TOKEN), "http://serve.example").get("/healthz").status_code == 200


def test_beyond_loopback_a_token_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("MEDVISION_SERVE_TOKEN", raising=False)
    beyond = HttpConfig(host="0.0.0.0", allow_http=True)
    assert load_token(HttpConfig()) is None
    with pytest.raises(UsageError, match="MEDVISION_SERVE_TOKEN"):
        load_token(beyond)
    monkeypatch.setenv("MEDVISION_SERVE_TOKEN", "short")
    with pytest.raises(UsageError, match="16"):
        load_token(beyond)
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert load_token(beyond.model_copy(update={"token_file": str(tmp_path / "token")})) == TOKEN


def test_beyond_loopback_plain_http_must_be_asked_for() -> None:
    with pytest.raises(ValueError, match="tls_certificate"):
        HttpConfig(host="0.0.0.0")
    with pytest.raises(ValueError, match="go together"):
        HttpConfig(tls_key="key.pem")


def test_states_models_and_card() -> None:
    http = client(create_app(Fake(), settings()))
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").status_code == 200
    problem(client(create_app(Fake(asyncio.Event().wait), settings())).get("/readyz"), 503, "starting")
    assert http.get("/v1/models").json() == {"models": []}
    card = http.get("/v1/models/m-0/card")
    assert card.headers["content-type"].startswith("text/markdown")
    problem(http.get("/v1/models/other/card"), 404, "unknown_model")


def test_unknown_paths_methods_and_values_are_problems_too() -> None:
    http = client(create_app(Fake(), settings()))
    problem(http.get("/v1/nothing"), 404, "not_found")
    wrong = http.get("/v1/predict")
    problem(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    problem(http.post("/v1/predict?mask=svg", content=PNG, headers={"Content-Type": "image/png"}), 400, "bad_request")


def test_every_field_of_the_openapi_document_is_described() -> None:
    document = create_app(Fake(), settings()).openapi()
    missing = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, item in schema.get("properties", {}).items()
        if not item.get("description")
    ]
    assert missing == []
    assert "HTTPValidationError" not in str(document)


def test_documentation_page_loads_nothing_from_elsewhere() -> None:
    http = client(create_app(Fake(), settings()))
    page = http.get("/docs")
    assert page.status_code == 200
    assert "/v1/predict" in page.text
    assert "mask_threshold" in page.text
    for text in (page.text, http.get("/").text):
        assert "http://" not in text
        assert "https://" not in text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "access-control-allow-origin" not in http.get("/", headers={"Origin": "http://evil.example"}).headers
