"""Everything that runs are disturbed on: S3 on loopback, a Ray cluster, and the forge of its processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from kills.cluster import LocalCluster, prepare_environment
from kills.forge import Forge
from kills.store import Store
from medvision_ray import storage


@dataclass(frozen=True)
class Stage:
    """What is there until the block of `stage` ends."""

    store: Store
    cluster: LocalCluster
    forge: Forge


@contextmanager
def stage(**settings: str) -> Iterator[Stage]:
    """Have S3, a cluster and a forge inside the block; this process and all it starts use that S3.

    Args:
        settings: of Ray, beside those of `prepare_environment`.
    """
    short = tempfile.mkdtemp(prefix="kills-")  # a socket's path holds 107 characters at most
    with pytest.MonkeyPatch.context() as patch:
        store = Store()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            patch.setenv(name, "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        storage._filesystem.cache_clear()
        prepare_environment(Path(short), settings)
        forge = Forge(Path(short))
        cluster = LocalCluster(forge.workers, Path(short))
        try:
            yield Stage(store, cluster, forge)
        finally:
            cluster.stop()
            forge.stop()
            store.stop()
            shutil.rmtree(short, ignore_errors=True)
