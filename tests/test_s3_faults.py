"""Each fault of an object store against each storage call: the right answer, or the right code at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from s3_proxy import Fault, S3Proxy

from medvision_ray import listing, retry, s3, storage, tables
from medvision_ray.errors import StorageError

DATA = bytes(range(256)) * 1500
ON_THE_WAY_BACK = ("reset_half_way", "short_read", "short_chunked", "stall_half_way")
TRANSIENT = ("slow_down", "internal_error", "request_timeout", "reset", "lost_answer", "stall")


@pytest.fixture(scope="module")
def endpoint(s3_endpoint: str) -> Iterator[S3Proxy]:
    with S3Proxy(s3_endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(s3: str, endpoint: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> S3Proxy:
    """Stands between this process and the bucket of the `s3` fixture; pauses and patience are short."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.endpoint)
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr("medvision_ray.s3._SILENCE_SECONDS", 1.5)
    endpoint.play()
    return endpoint


def some(kind: str, *operations: str) -> Fault:
    """Two calls fail, or one where each costs the whole patience."""
    return Fault(kind, operations, total=1 if kind.startswith("stall") else 2, seconds=30)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits are recorded and not waited for."""
    found: list[float] = []
    monkeypatch.setattr(retry, "time", SimpleNamespace(sleep=found.append, monotonic=time.monotonic))
    return found


def problem_of(call: Callable[[], object]) -> StorageError:
    with pytest.raises(StorageError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("kind", [*TRANSIENT, *ON_THE_WAY_BACK, "wrong_bytes"])
def test_a_read_gets_through_what_passes(s3: str, proxy: S3Proxy, kind: str) -> None:
    storage.write_bytes(f"{s3}/x", DATA)
    proxy.play(some(kind, "GET"))
    assert storage.read_bytes(f"{s3}/x") == DATA
    assert proxy.struck[kind] == some(kind).total


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_write_gets_through_what_passes(s3: str, proxy: S3Proxy, kind: str) -> None:
    proxy.play(some(kind, "PUT"))
    storage.write_bytes(f"{s3}/x", DATA)
    assert proxy.struck[kind] == some(kind).total
    assert storage.read_bytes(f"{s3}/x") == DATA


@pytest.mark.parametrize("kind", [*TRANSIENT, *ON_THE_WAY_BACK])
def test_a_listing_gets_through_what_passes(
    s3: str, proxy: S3Proxy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    for number in range(8):
        storage.write_bytes(f"{s3}/p/{number}", b"1")
    proxy.play(some(kind, "LIST"))
    assert [item.path for item in listing.list_objects(f"{s3}/p")] == [str(number) for number in range(8)]
    assert proxy.struck[kind] == some(kind).total


@pytest.mark.parametrize("kind", ["slow_down", "internal_error", "reset", "lost_answer"])
def test_every_other_call_gets_through_what_passes(s3: str, proxy: S3Proxy, kind: str) -> None:
    for name in ("run/a", "run/b/c", "run2/d"):
        storage.write_bytes(f"{s3}/{name}", b"1")
    faults = [Fault(kind, (operation,), total=1) for operation in ("HEAD", "LIST", "DELETE")]
    proxy.play(*faults)
    assert listing.stat_object(f"{s3}/run/a").size == 1
    proxy.play(*faults)
    assert storage.exists(f"{s3}/run")
    proxy.play(*faults)
    storage.delete_object(f"{s3}/run/a")
    proxy.play(*faults)
    storage.delete_tree(f"{s3}/run")
    assert proxy.struck[kind] == 2
    proxy.play()
    assert [item.path for item in listing.list_objects(s3)] == ["run2/d"]


@pytest.mark.parametrize(
    ("kind", "code", "reads"),
    [
        ("access_denied", "access_denied", 1),
        ("deleted", "not_found", 1),
        ("changed", "changed_while_reading", 1),
        ("changed_half_way", "changed_while_reading", 2),
    ],
)
def test_what_will_not_pass_is_told_at_once(s3: str, proxy: S3Proxy, kind: str, code: str, reads: int) -> None:
    storage.write_bytes(f"{s3}/x", DATA)
    etag = listing.stat_object(f"{s3}/x").etag
    proxy.play(Fault(kind, ("GET",), total=1))
    problem = problem_of(lambda: storage.read_bytes(f"{s3}/x", etag=etag))
    assert (problem.code, problem.transient) == (code, False)
    assert (proxy.struck[kind], proxy.requests["GET"]) == (1, reads)


def test_another_version_is_refused_of_a_store_without_if_match(
    s3: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3}/x", DATA)
    client = storage.s3_client()
    ask = client.get_object
    monkeypatch.setattr(client, "get_object", lambda **request: ask(**{**request, "IfMatch": "*"}))
    assert problem_of(lambda: storage.read_bytes(f"{s3}/x", etag="0" * 32)).code == "changed_while_reading"


@pytest.mark.parametrize("kind", ["expired_token", "invalid_access_key", "signature", "skewed"])
def test_refused_credentials_have_a_code_of_their_own(s3: str, proxy: S3Proxy, kind: str) -> None:
    proxy.play(Fault(kind))
    assert problem_of(lambda: storage.read_bytes(f"{s3}/x")).code == "credentials"


@pytest.mark.parametrize(
    "call",
    [
        lambda place: storage.write_bytes(place, b""),
        lambda place: storage.create_exclusive(place, b""),
        lambda place: list(listing.list_objects(place)),
        listing.stat_object,  # HEAD: the answer has no body that could name the reason
        storage.exists,
        storage.delete_object,
        storage.delete_tree,
    ],
)
def test_every_call_tells_refused_credentials(
    s3: str, proxy: S3Proxy, call: Callable[[str], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "CREDENTIAL_ATTEMPTS", 1)
    proxy.play(Fault("expired_token"))
    assert problem_of(lambda: call(f"{s3}/x")).code == "credentials"


def test_refused_credentials_are_given_up_after_few_tries(s3: str, proxy: S3Proxy) -> None:
    proxy.play(Fault("expired_token"))
    problem_of(lambda: storage.read_bytes(f"{s3}/x"))
    assert proxy.requests["GET"] == retry.CREDENTIAL_ATTEMPTS


def test_renewed_credentials_are_picked_up_by_a_running_process(
    s3: str, proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_bytes(f"{s3}/x", DATA)
    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text("[default]\naws_access_key_id = OLD\naws_secret_access_key = old\n")
    storage._s3_client.cache_clear()
    assert storage.read_bytes(f"{s3}/x") == DATA
    proxy.play(Fault("expired_token", access_key="OLD"))
    file.write_text("[default]\naws_access_key_id = NEW\naws_secret_access_key = new\n")
    assert storage.read_bytes(f"{s3}/x") == DATA
    assert (proxy.struck["expired_token"], proxy.requests["GET"]) == (1, 2)
    storage._s3_client.cache_clear()


def test_an_unreachable_store_is_transient(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # discard: nobody listens
    problem = problem_of(lambda: storage.read_bytes("s3://bucket/x"))
    assert (problem.code, problem.transient) == ("read_error", True)


@pytest.mark.parametrize("kind", ["internal_error", "reset", "short_read"])
def test_there_is_one_layer_of_retries_and_it_ends(s3: str, proxy: S3Proxy, kind: str) -> None:
    storage.write_bytes(f"{s3}/x", DATA)
    proxy.play(Fault(kind, ("GET",)))
    problem = problem_of(lambda: storage.read_bytes(f"{s3}/x"))
    assert (problem.code, problem.transient) == ("read_error", True)
    assert proxy.requests["GET"] == retry.ATTEMPTS


def test_retries_end_in_time(s3: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_LAST_START_SECONDS", 0.0)
    proxy.play(Fault("slow_down"))
    assert problem_of(lambda: storage.read_bytes(f"{s3}/x")).transient
    assert proxy.requests["GET"] == 1


def test_a_body_that_trickles_is_given_up(s3: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/x", bytes(100_000))
    monkeypatch.setattr("medvision_ray.s3._READ_SECONDS", -0.2)
    monkeypatch.setattr("medvision_ray.s3._CHUNK_BYTES", 4096)
    proxy.play(Fault("trickle", ("GET",), total=2))
    assert storage.read_bytes(f"{s3}/x") == bytes(100_000)
    assert (proxy.struck["trickle"], proxy.requests["GET"]) == (2, 3)


def test_the_store_is_left_alone_as_long_as_it_asks(s3: str, proxy: S3Proxy, pauses: list[float]) -> None:
    storage.write_bytes(f"{s3}/x", DATA)
    proxy.play(Fault("slow_down", total=2, retry_after=3))
    assert storage.read_bytes(f"{s3}/x") == DATA
    assert len(pauses) == 2
    assert min(pauses) >= 3


def test_pauses_are_drawn_from_nothing_to_a_bound_that_doubles(
    s3: str, proxy: S3Proxy, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(retry, "random", SimpleNamespace(uniform=lambda _low, high: high))
    proxy.play(Fault("slow_down"))
    problem_of(lambda: storage.read_bytes(f"{s3}/x"))
    assert pauses == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10])


def test_many_readers_get_through_a_store_that_throttles(
    s3: str, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.1)
    for number in range(60):
        storage.write_bytes(f"{s3}/{number}", bytes([number]))
    proxy.play(Fault("slow_down", ("GET",), rate=40))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: storage.read_bytes(f"{s3}/{number}"), range(60)))
    assert found == [bytes([number]) for number in range(60)]
    assert proxy.struck["slow_down"] > 0


@pytest.mark.parametrize("kind", ["lost_answer", "reset"])
def test_a_conditional_put_whose_answer_was_lost_is_ours(s3: str, proxy: S3Proxy, kind: str) -> None:
    proxy.play(Fault(kind, ("PUT",), total=1))
    assert storage.create_exclusive(f"{s3}/x", b"ours")
    assert proxy.struck[kind] == 1
    assert storage.read_bytes(f"{s3}/x") == b"ours"


def test_a_conditional_put_that_met_another_writer_is_not_ours(s3: str, proxy: S3Proxy) -> None:
    storage.write_bytes(f"{s3}/x", b"theirs")
    proxy.play(Fault("reset", ("PUT",), total=1))
    assert not storage.create_exclusive(f"{s3}/x", b"ours")
    assert proxy.struck["reset"] == 1
    assert storage.read_bytes(f"{s3}/x") == b"theirs"


@pytest.mark.parametrize("kind", ["short_read", "short_chunked", "reset_half_way", "internal_error"])
def test_pyarrow_gets_through_too_and_takes_no_part_for_the_whole(s3: str, proxy: S3Proxy, kind: str) -> None:
    storage.write_bytes(f"{s3}/x", DATA)
    files, path = storage.filesystem(f"{s3}/x")
    proxy.play(Fault(kind, ("GET",), total=1))
    with files.open_input_file(path) as stream:
        assert stream.read() == DATA
    assert proxy.struck[kind] == 1


def test_the_seed_and_nothing_else_chooses_what_is_struck() -> None:
    keys = [f"b/{number}" for number in range(200)]
    fault = Fault("reset", share=0.3)
    with S3Proxy("http://127.0.0.1:9", seed=1) as one, S3Proxy("http://127.0.0.1:9", seed=2) as other:
        assert one.struck_keys(fault, keys) == one.struck_keys(fault, keys[::-1])
        assert one.struck_keys(fault, keys) != other.struck_keys(fault, keys)
        assert 30 < len(one.struck_keys(fault, keys)) < 90


def test_bytes_are_compared_with_the_length_that_was_announced() -> None:
    body = SimpleNamespace(read=iter([b"abc", b""]).__next__)
    shorter = SimpleNamespace(read=lambda _size: body.read())
    assert problem_of(lambda: s3._whole(shorter, 4, "s3://b/x")).transient


def _rows() -> list[pa.RecordBatch]:
    row = {"run_key": "one", "model_id": "m", "metric": "auc", "value": 0.5}
    return pa.Table.from_pylist([row], schema=tables.METRICS).to_batches()


def _committed(output: str) -> list[str]:
    found = tables.read(output, "metrics", ["run_key"])
    return found["run_key"].to_pylist() if found is not None else []


@pytest.mark.parametrize("stage", ["first", "later"])
@pytest.mark.parametrize(
    "fault",
    [
        Fault("lost_answer", ("PUT",), keys=r"_delta_log/\d+\.json", total=2),
        Fault("reset", ("PUT",), keys=r"_delta_log/\d+\.json", total=2),
        Fault("lost_answer", ("PUT",), keys=r"\.parquet", total=2),
        Fault("request_timeout", ("PUT", "MULTIPART"), total=2),
        Fault("slow_down", total=3),
        Fault("short_read", ("GET", "LIST"), total=3),
        Fault("reset_half_way", ("GET", "LIST"), total=3),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.keys[-4:]}",
)
def test_a_commit_is_made_once_whatever_the_store_does(s3: str, proxy: S3Proxy, stage: str, fault: Fault) -> None:
    if stage == "later":
        other = pa.Table.from_pylist([{"run_key": "zero"}], schema=tables.METRICS)
        tables.commit(s3, "metrics", tables.METRICS, other.to_batches(), "zero")
    proxy.play(fault)
    tables.commit(s3, "metrics", tables.METRICS, _rows, "one")
    assert proxy.struck[fault.kind] > 0
    proxy.play()
    assert sorted(_committed(s3)) == (["one", "zero"] if stage == "later" else ["one"])
    assert not tables.commit(s3, "metrics", tables.METRICS, _rows, "one")


@pytest.mark.parametrize("kind", ["reset", "short_read", "reset_half_way", "internal_error"])
def test_a_table_is_read_whatever_passes(s3: str, proxy: S3Proxy, kind: str) -> None:
    tables.commit(s3, "metrics", tables.METRICS, _rows, "one")
    proxy.play(Fault(kind, ("GET",), first=1, total=4))
    assert _committed(s3) == ["one"]
    assert proxy.struck[kind] > 0


@pytest.mark.parametrize(
    ("kind", "code"),
    [("expired_token", "credentials"), ("signature", "credentials"), ("access_denied", "access_denied")],
)
def test_a_table_that_is_refused_tells_why(s3: str, proxy: S3Proxy, kind: str, code: str) -> None:
    tables.commit(s3, "metrics", tables.METRICS, _rows, "one")
    proxy.play(Fault(kind))
    assert problem_of(lambda: tables.read(s3, "metrics")).code == code
    assert problem_of(lambda: tables.commit(s3, "metrics", tables.METRICS, _rows, "two")).code == code
    proxy.play(Fault(kind, ("PUT",)))
    assert problem_of(lambda: tables.commit(s3, "metrics", tables.METRICS, _rows, "two")).code == code
