"""What is refused before anything of Ray is started."""

from __future__ import annotations

import socket

import pytest

from medvision_ray.bundle import Bundle
from medvision_ray.config.serving import HttpConfig, ServeJob
from medvision_ray.errors import UsageError
from medvision_ray.serving.serve import serving


def test_a_port_that_is_taken_is_named(bundle: Bundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        job = ServeJob(bundles=(bundle.uri,), http=HttpConfig(port=port))
        with pytest.raises(UsageError, match=rf"port {port} .* Address already in use"), serving(job):
            pass


def test_an_address_of_another_machine_is_named(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVISION_SERVE_TOKEN", "a-token-of-a-test-0123456")
    job = ServeJob(bundles=(bundle.uri,), http=HttpConfig(host="198.51.100.7", allow_http=True))
    with pytest.raises(UsageError, match=r"Expected to listen on 198\.51\.100\.7, port 8000"), serving(job):
        pass
