"""Fixtures that every test folder may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import settings

from medvision_ray import storage
from medvision_ray.bundle import Bundle, save_bundle
from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.demo.archive import PhantomArchive, make_archive
from medvision_ray.demo.encode import Subject, ct_dicom
from medvision_ray.demo.phantom import draw_phantom

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile("medvision", deadline=None)  # a busy machine is no failure
settings.load_profile("medvision")


def _folder(variable: str, default: str) -> Path:
    folder = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"{variable} names no folder and {default} is absent")
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real images with labels; see MEDVISION_DATA."""
    return _folder("MEDVISION_DATA", "../shared/data")


@pytest.fixture(scope="session")
def corpora_dir() -> Path:
    """Real and adversarial files; see MEDVISION_CORPORA."""
    return _folder("MEDVISION_CORPORA", "../shared/corpora")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A loopback S3 on a free port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    storage._filesystem.cache_clear()  # an earlier server may have had this port
    storage._s3_client.cache_clear()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an empty bucket of a loopback S3 that this process and its children use."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"archive-{os.urandom(4).hex()}"
    storage.s3_client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> str:
    """An empty place to write to: a local folder, then a prefix on S3."""
    if request.param == "local":
        folder: Path = request.getfixturevalue("tmp_path")
        return str(folder / "a store")
    return f"{request.getfixturevalue('s3')}/a store"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A small hybrid with random weights."""
    import torch

    from medvision_ray.learning.model import build_model

    torch.manual_seed(0)
    classes = ("cavity", "consolidation", "nodule")
    config = ModelConfig(encoder="tu-mobilenetv3_small_050", decoder_channels=(16, 16, 8, 8, 8))
    preprocess = PreprocessConfig(size=(64, 64))
    model = build_model(config, preprocess, len(classes))
    return save_bundle(
        str(tmp_path_factory.mktemp("bundle") / "random"),
        name="random",
        architecture=config,
        preprocess=preprocess,
        classes=classes,
        multi_label=False,
        thresholds=(),
        mask_threshold=0.5,
        trained={},
        metrics={},
        train_digest=(),
        model=model,
    )


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> PhantomArchive:
    """Twelve phantom patients and the six broken objects."""
    return make_archive(tmp_path_factory.mktemp("phantom"), patients=12)


@pytest.fixture(scope="session")
def phantom_series() -> Callable[..., list[bytes]]:
    """Make a series of single CT slices of one phantom patient: `phantom_series(slices, **where)`, lowest slice first."""

    def make(
        slices: int,
        *,
        size: int = 64,
        origin: tuple[float, float, float] = (-180.0, -150.0, 30.0),
        orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
        spacing: tuple[float, float] = (0.7, 0.9),
        step: tuple[float, float, float] | None = None,
        number: int = 1,
        series: int = 0,
    ) -> list[bytes]:
        across, down = np.array(orientation[:3], float), np.array(orientation[3:], float)
        shift = np.cross(across, down) * 2.5 if step is None else np.array(step)
        subject = Subject(f"PHANTOM^{number}", f"PID-{number}", f"ACC-{number}", number, seed=7)
        return [
            _placed(_slice(subject, series, index, size), np.array(origin) + index * shift, orientation, spacing)
            for index in range(slices)
        ]

    return make


def _slice(subject: Subject, series: int, index: int, size: int) -> pydicom.FileDataset:
    picture, _ = draw_phantom(np.random.default_rng([subject.number, series]), "CT", "nodule", size, frame=index)
    data = pydicom.dcmread(BytesIO(ct_dicom(subject, index, picture, signed=False, compressed=False)))
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = subject.uid("slice", series, index)
    data.SeriesInstanceUID, data.FrameOfReferenceUID = subject.uid("volume", series), subject.uid("space", series)
    data.SeriesNumber, data.InstanceNumber = series + 1, 100 - index  # against the order of places
    return data


def _placed(data: pydicom.FileDataset, origin: Any, orientation: Any, spacing: Any) -> bytes:
    data.ImagePositionPatient, data.ImageOrientationPatient = [round(float(x), 6) for x in origin], list(orientation)
    data.PixelSpacing = list(spacing)
    out = BytesIO()
    data.save_as(out)
    return out.getvalue()
