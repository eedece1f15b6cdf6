"""A real server that keeps its answers and speaks TLS: what waits at a stop is in the tables."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from pathlib import Path

import httpx2 as httpx
import pytest

from medvision_ray import tables
from medvision_ray.bundle import Bundle
from medvision_ray.config import PrivacyConfig, RayConfig
from medvision_ray.config.serving import HttpConfig, RecordConfig, ScaleConfig, ServeJob
from medvision_ray.demo.archive import PhantomArchive
from medvision_ray.serving.serve import serving
from medvision_ray.verification import verify

x509 = pytest.importorskip("cryptography.x509")
pytestmark = pytest.mark.integration
TOKEN = "token-of-the-record-test-0123456"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/dicom"}


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key."""
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a server")])
    now = datetime.datetime.now(datetime.timezone.utc)
    place = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(place, critical=False)
    builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
    certificate = builder.not_valid_after(now + datetime.timedelta(hours=1)).sign(key, hashes.SHA256())
    folder = tmp_path_factory.mktemp("tls")
    pem = serialization.Encoding.PEM
    (folder / "tls.crt").write_bytes(certificate.public_bytes(pem))
    form = serialization.PrivateFormat.PKCS8
    (folder / "tls.key").write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    return folder / "tls.crt", folder / "tls.key"


def test_a_stop_writes_what_waits(
    bundle: Bundle, phantom: PhantomArchive, tmp_path: Path, pem: tuple[Path, Path]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = tmp_path / "token"
    token.write_text(TOKEN)
    http = HttpConfig(port=port, token_file=str(token), tls_certificate=str(pem[0]), tls_key=str(pem[1]))
    output = str(tmp_path / "kept")
    job = ServeJob(
        bundles=(bundle.uri,),
        http=http,
        scale=ScaleConfig(cpus=0.5, decoders=1),
        record=RecordConfig(output=output, every_seconds=3600),
        privacy=PrivacyConfig(demo_key=True),
        ray=RayConfig(num_cpus=2, object_store_bytes=200 << 20),
    )
    contents = [data for path in sorted(Path(phantom.night_1).rglob("*.dcm")) if len(data := path.read_bytes()) > 9999]
    trust = ssl.create_default_context(cafile=str(pem[0]))
    with serving(job) as address, httpx.Client(base_url=address, verify=trust, timeout=60) as client:
        assert address.startswith("https://")
        answers = [client.post("/v1/predict", content=data, headers=HEADERS) for data in contents[:8]]
        cut = client.post("/v1/predict", content=contents[0][:5000], headers=HEADERS)
        assert "medvision_serve_record_waiting 9.0" in client.get("/metrics", headers=HEADERS).text
        with pytest.raises(httpx.TransportError):
            httpx.get(address.replace("https", "http") + "/healthz", timeout=10)
        assert tables.read(output, "predictions") is None
    assert [answer.status_code for answer in answers] == [200] * 8
    assert cut.status_code == 422
    rows = tables.read(output, "predictions", ["uri", "predicted_probability"])
    assert rows is not None
    kept = {row["uri"]: row["predicted_probability"] for row in rows.to_pylist()}
    given = [answer.json() for answer in answers]
    assert kept == {f"api://{answer['request_id']}": answer["predicted_probability"] for answer in given}
    failures = tables.read(output, "failures", ["uri", "error_code"])
    assert failures is not None
    assert failures.to_pylist() == [{"uri": f"api://{cut.json()['request_id']}", "error_code": cut.json()["code"]}]
    assert verify(output).findings == []
