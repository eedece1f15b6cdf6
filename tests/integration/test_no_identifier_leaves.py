"""Identifiers are planted wherever an archive can hold them, a whole job is run, and everything that it left is searched.

The run fails with as many codes as files and a decoder that misbehaves can provoke. The decoder is wrapped
from outside, by a `sitecustomize` on PYTHONPATH; the product has no hook for this.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import imagecodecs
import nibabel
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from pydicom import dcmread
from pydicom.datadict import DicomDictionary
from pydicom.encaps import encapsulate
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element

from medvision_ray import monitoring, tables
from medvision_ray.archive.inventory import list_archive
from medvision_ray.bundle import Bundle
from medvision_ray.config import ArchiveConfig, DecodeConfig, PrivacyConfig, ReportJob, ScoringConfig, build_job
from medvision_ray.demo import encode
from medvision_ray.demo.encode import Subject
from medvision_ray.imaging.errors import ErrorCode
from medvision_ray.privacy import Pseudonymiser, load_pseudonymiser
from medvision_ray.reporting.collect import build_report
from medvision_ray.scoring.settings import WorkerSettings
from medvision_ray.scoring.worker import ScoringWorker
from medvision_ray.verification import verify

pytestmark = [pytest.mark.integration, pytest.mark.core, pytest.mark.timeout(600)]

FAMILY, GIVEN, NUMBER, BORN = "Quixworth", "Zeldalyn", "7731900442", "19310719"
IDENTIFIERS = (FAMILY, GIVEN, NUMBER, BORN)
NAME = f"{FAMILY}^{GIVEN}"
PICTURE = np.linspace(0, 1, 96 * 96, dtype=np.float32).reshape(96, 96)
SUBJECT = Subject(NAME, NUMBER, f"ACC{NUMBER}", 1, 0)
TEXT_VRS = ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
LONG_VRS = ("UC", "UR", "UT", "UN")
# What decoding needs; everything else that is text gets an identifier.
_NEEDED = (
    "SOPClassUID Modality SpecificCharacterSet PhotometricInterpretation NumberOfFrames PixelSpacing ImagerPixelSpacing "
    "NominalScannedPixelSpacing RescaleIntercept RescaleSlope WindowCenter WindowWidth VOILUTFunction PresentationLUTShape"
)
NEEDED = frozenset(_NEEDED.split())
SERIES: dict[str, list[dict[str, Any]]] = {
    "missing_position": [{}, {}, {"keep": {"ImagePositionPatient": NAME}}, {}],
    "mixed_frames_of_reference": [{}, {}, {}, {"keep": {"FrameOfReferenceUID": f"1.2.{NUMBER}"}}],
    "mixed_sizes": [{}, {"edit": {"Rows": 32, "Columns": 128}}, {}, {}],
    "mixed_orientation": [{}, {}, {"keep": {"ImageOrientationPatient": "0\\1\\0\\0\\0\\-1"}}, {}],
    "duplicate_position": [{}, {}, {"keep": {"ImagePositionPatient": "0\\0\\1"}}, {}],
    "gantry_tilt": [{"keep": {"ImagePositionPatient": f"0\\{place}\\{place}"}} for place in range(4)],
    "slice_gap": [{}, {}, {}, {"keep": {"ImagePositionPatient": "0\\0\\5"}}],
}
"""What differs in each of four slices for a series to get the code."""
SITECUSTOMIZE = f"""
import importlib.abc, importlib.machinery, sys

def suffer(kind):
    import ctypes, time
    if kind == "segv":
        ctypes.string_at(0)
    if kind == "hang":
        time.sleep(600)
    raise {{"memory": MemoryError, "error": ValueError}}[kind]("{NAME} {NUMBER}")

def poisoned(decode):
    def wrapped(data, *arguments, **options):
        if data.startswith(b"POISON:"):
            suffer(data.decode().split(":")[1])
        return decode(data, *arguments, **options)
    return wrapped

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "medvision_ray.scoring.objects":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            module.decode = poisoned(module.decode)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


def planted(vr: str) -> bytes:
    """An identifier in the form that a VR asks for."""
    value = {"PN": NAME, "DA": BORN, "DT": BORN, "AS": BORN, "IS": NUMBER, "DS": NUMBER, "UI": f"1.2.{NUMBER}"}.get(vr)
    return (value or f"{FAMILY} {GIVEN} {NUMBER} {BORN}").encode()


def element(tag: int, vr: str, value: bytes) -> bytes:
    """One element, explicit VR little endian (DICOM PS3.5 7.1.2); no library in between that would refuse the value."""
    value += (b"\0" if vr in ("UI", "UN") else b" ") * (len(value) % 2)
    head = (tag >> 16).to_bytes(2, "little") + (tag & 0xFFFF).to_bytes(2, "little") + vr.encode()
    if vr in LONG_VRS or vr == "SQ":
        return head + b"\0\0" + len(value).to_bytes(4, "little") + value
    return head + len(value).to_bytes(2, "little") + value


def plant(data: bytes, **kept: str) -> bytes:
    """The object with an identifier in every text element of the dictionary that decoding does not need.

    Args:
        kept: elements with a value of their own.
    """
    dataset = dcmread(io.BytesIO(data))
    elements: dict[int, bytes] = {}
    for item in dataset:
        sink = DicomBytesIO()
        sink.is_little_endian, sink.is_implicit_VR = True, False
        write_data_element(sink, item)
        elements[int(item.tag)] = sink.getvalue()
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        if vr in TEXT_VRS and keyword not in NEEDED and 0x0008 <= tag >> 16 < 0x5000 and tag & 0xFFFF:
            elements[tag] = element(tag, vr, planted(vr))
    elements[0x00090010] = element(0x00090010, "LO", planted("LO"))
    for place, vr in enumerate((*TEXT_VRS, "UN")):
        elements[0x00091001 + place] = element(0x00091001 + place, vr, planted(vr))
    inside = element(0x00080104, "LO", planted("LO")) + element(0x0040A123, "PN", planted("PN"))
    item = b"\xfe\xff\x00\xe0" + len(inside).to_bytes(4, "little") + inside
    elements[0x00400275] = element(0x00400275, "SQ", item)
    for keyword, text in kept.items():
        tag = next(tag for tag, entry in DicomDictionary.items() if entry[4] == keyword)
        elements[tag] = element(tag, DicomDictionary[tag][0], text.encode())
    return data[: -len(body_of(data))] + b"".join(elements[tag] for tag in sorted(elements))


def body_of(data: bytes) -> bytes:
    """Without preamble and file meta group."""
    return data[144 + int.from_bytes(data[140:144], "little") :]


def edited(data: bytes, **values: Any) -> bytes:
    """The object with elements set; before anything is planted."""
    dataset = dcmread(io.BytesIO(data))
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    sink = io.BytesIO()
    dataset.save_as(sink, enforce_file_format=True)
    return sink.getvalue()


def objects() -> dict[str, tuple[bytes, str | None]]:
    """Content of each object by the last part of its name, and the code that it must get."""
    film = encode.xray_dicom(SUBJECT, 0, PICTURE, digital=True, inverted=False)
    slice_ = encode.ct_dicom(SUBJECT, 1, PICTURE, signed=False, compressed=True)
    code = imagecodecs.jpegls_encode(np.zeros((96, 96), np.uint16))
    damaged = code[:60] + NAME.encode() * 20 + code[-2:]
    volume = nibabel.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
    series = nibabel.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4))
    for image in (volume, series):
        for field in ("descrip", "aux_file", "intent_name", "db_name"):
            image.header[field] = f"{FAMILY} {NUMBER}"[: image.header[field].dtype.itemsize].encode()
        comment = f"{NAME} {NUMBER} {BORN}".encode()
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", comment))
    long_syntax = f"1.2.840.10008.1.2.{NUMBER}"
    picture = cv2_png_with_text()
    deflated = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflated.compress(body_of(plant(film)) + bytes(64 << 20)) + deflated.flush()
    bomb_head = encode_meta("1.2.840.10008.1.2.1.99")
    return {
        "film.dcm": (plant(film), None),
        "film of another modality.dcm": (
            plant(film, Modality=FAMILY.upper()[:9], SpecificCharacterSet="ISO_IR 192"),
            None,
        ),
        "slice.dcm": (plant(slice_), None),
        "volume.nii.gz": (gzip.compress(volume.to_bytes()), None),
        "picture.png": (picture, None),
        "empty.dcm": (b"", "empty_file"),
        "letter.dcm": (f"Dear colleague, {NAME}, born {BORN}, number {NUMBER}".encode(), "unsupported_format"),
        "report.dcm": (plant(film, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33")[:4000], "not_an_image"),
        "slide.dcm": (plant(film, SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6"), "unsupported_shape"),
        "series.nii": (series.to_bytes(), "unsupported_shape"),
        "pixelless.dcm": (plant(encode.pixelless_dicom(SUBJECT, 2)), "no_pixels"),
        "raw.dcm": (plant(film, PresentationIntentType="FOR PROCESSING"), "for_processing"),
        "photometric.dcm": (plant(film, PhotometricInterpretation=FAMILY.upper()), "bad_header"),
        "frames.dcm": (plant(film, NumberOfFrames=NAME), "bad_header"),
        "absurd.dcm": (plant(encode.absurd_dicom(SUBJECT, 3)), "bad_dimensions"),
        "large.dcm": (plant(edited(film, Rows=3000, Columns=3000)), "too_large"),
        "mismatch.dcm": (plant(edited(slice_, Rows=64, Columns=64)), "dimension_mismatch"),
        "cut-off.dcm": (plant(film)[:-2000], "truncated"),
        "damaged.dcm": (plant(edited(slice_, PixelData=encapsulate([damaged]))), "corrupt"),
        "syntax.dcm": (
            encode_meta(long_syntax) + body_of(plant(film)),
            "unsupported_encoding",
        ),
        "bomb.dcm": (bomb_head + bomb, "decompression_bomb"),
        "segv": (b"POISON:segv:", "worker_crash"),
        "hang": (b"POISON:hang:", "timeout"),
        "memory": (b"POISON:memory:", "out_of_memory"),
        "error": (b"POISON:error:", "internal_error"),
    }


def encode_meta(syntax: str) -> bytes:
    """A preamble and the smallest file meta group with this transfer syntax, which is not looked at further."""
    body = element(0x00020002, "UI", b"1.2.840.10008.5.1.4.1.1.1.1") + element(0x00020010, "UI", syntax.encode())
    body += element(0x00020016, "AE", planted("AE")[:16])
    return bytes(128) + b"DICM" + element(0x00020000, "UL", len(body).to_bytes(4, "little")) + body


def cv2_png_with_text() -> bytes:
    """A PNG with a text chunk."""
    data = encode.png(PICTURE)
    text = b"tEXtComment\0" + NAME.encode() + NUMBER.encode()
    chunk = (len(text) - 4).to_bytes(4, "big") + text + zlib.crc32(text).to_bytes(4, "big")
    return data[:33] + chunk + data[33:]


@dataclass
class Run:
    """What a job left behind, and what it was asked."""

    archive: Path
    output: Path
    said: dict[str, str]
    codes: dict[str, str | None]
    code: int
    names: Pseudonymiser


@pytest.fixture(scope="module")
def run(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = tmp_path_factory.mktemp("planted")
    archive, output = place / "archive", place / "output"
    folder = archive / f"{FAMILY} {GIVEN} {BORN}"
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    codes: dict[str, str | None] = {}
    for number, (name, (data, code)) in enumerate(objects().items()):
        path = folder / f"{NUMBER}-{number:02d}-{name}"
        path.write_bytes(data)
        rows.append({"uri": str(path), "etag": "", "size": None})
        codes[str(path)] = code
    # Listed, and not as listed when it is read: gone, another version, a folder.
    for name, code in (("gone.dcm", "not_found"), ("changed.dcm", "changed_while_reading")):
        path = folder / f"{NUMBER}-{name}"
        rows.append(
            {
                "uri": str(path),
                "etag": "1-1" if name == "changed.dcm" else "",
                "size": 1 if name == "changed.dcm" else None,
            }
        )
        codes[str(path)] = code
    (folder / f"{NUMBER}-changed.dcm").write_bytes(plant(encode.mr_dicom(SUBJECT, 4, PICTURE)))
    pacsv.write_csv(pa.Table.from_pylist(rows), place / "list.csv")
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (place / "key").write_text("q7Jm2xVt9LrYw4KsN8bHd3PzG6cFa5Tu")
    (place / "tell.py").write_text(f"import sys; open({str(place / 'told.json')!r}, 'w').write(sys.stdin.read())")
    settings = {
        **{"archive.uri": archive, "archive.list_file": place / "list.csv", "bundle": bundle.uri, "output": output},
        **{"privacy.key_file": place / "key", "privacy.uri": "hash", "privacy.study_date": "shift"},
        **{
            "decode.isolation": "process",
            "decode.for_processing": "refuse",
            "decode.max_seconds": 3,
            "decode.max_decoded_bytes": 8 << 20,
        },
        **{"decode.max_bytes": 1 << 27, "ray.num_cpus": 2, "scoring.precision": "float32", "scoring.actors": 1},
        **{
            "on_finish.command": json.dumps([sys.executable, str(place / "tell.py")]),
            "budget.max_failure_fraction": 1.0,
        },
    }
    command = [sys.executable, "-m", "medvision_ray.cli", "score"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place / "site"), *filter(None, sys.path)])}

    def medvision(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    done = medvision("--log-format", "json", "--json")
    said = {"stdout": done.stdout, "stderr": done.stderr, "told": (place / "told.json").read_text()}
    again = medvision("--dry-run", "--retry-failed", "--log-format", "text")
    said["preview"] = again.stdout + again.stderr
    return Run(
        archive,
        output,
        said,
        codes,
        done.returncode,
        load_pseudonymiser(PrivacyConfig(key_file=str(place / "key"), uri="hash")),
    )


def rows_of(run: Run) -> list[dict[str, Any]]:
    found = []
    for name in ("predictions", "failures"):
        table = tables.read(str(run.output), name)
        found += table.to_pylist() if table is not None else []
    return found


def forms_of(identifier: str) -> list[bytes]:
    """How an identifier may hide: other encodings, base64 at each of its three offsets, hexadecimal, plain hashes."""
    plain = [identifier, identifier.upper(), identifier.lower()]
    found = [text.encode(code) for text in plain for code in ("utf-8", "utf-16-le", "utf-16-be")]
    for text in plain:
        raw = text.encode()
        found += [base64.b64encode(b"x" * start + raw)[start and 4 : (len(raw) + start) // 3 * 4] for start in range(3)]
        found += [raw.hex().encode(), raw.hex().upper().encode(), quote(text).encode(), raw[::-1]]
        found += [hashlib.new(kind, raw).hexdigest()[:16].encode() for kind in ("md5", "sha1", "sha256")]
    return [form for form in dict.fromkeys(found) if len(form) >= 7]


FORMS = {identifier: forms_of(identifier) for identifier in (*IDENTIFIERS, NAME)}


def assert_clean(data: bytes, where: str) -> None:
    for identifier, forms in FORMS.items():
        for text in (data, data.lower()):
            assert not [form for form in forms if form in text], f"{identifier} is in {where}"


def test_the_search_finds_what_is_hidden_in_any_form() -> None:
    for hidden in (
        f"x{FAMILY.swapcase()}".encode(),
        base64.b64encode(f"ab{NAME}cd".encode()),
        base64.b64encode(f"a{NAME}".encode()),
        f"..{NUMBER}".encode("utf-16-le"),
        NUMBER.encode().hex().encode(),
        hashlib.sha256(NUMBER.encode()).hexdigest().encode(),
    ):
        with pytest.raises(AssertionError):
            assert_clean(hidden, "a test")


def test_identifiers_were_planted_in_every_object() -> None:
    for name, (data, _) in objects().items():
        if name in ("empty.dcm", "bomb.dcm") or data.startswith(b"POISON"):
            continue
        plain = gzip.decompress(data) if name.endswith(".gz") else data
        assert any(text.encode() in plain for text in IDENTIFIERS), name
    assert len([1 for text in (NAME, NUMBER, BORN) if text.encode() in objects()["film.dcm"][0]]) == 3


def test_every_object_has_its_row_and_its_code(run: Run) -> None:
    assert run.code == 0, run.said["stderr"][-3000:]
    expected = {run.names.address(uri): code for uri, code in run.codes.items()}
    assert {row["uri"]: row.get("error_code") for row in rows_of(run)} == expected


def test_as_many_codes_as_a_local_archive_can_give(run: Run) -> None:
    seen = {code for code in run.codes.values() if code} | set(SERIES)
    # Nothing is refused to root, who runs this in CI, and a disk that fails to read cannot be had.
    assert {code.value for code in ErrorCode} - seen == {"access_denied", "read_error"}


@pytest.mark.parametrize("code", SERIES)
def test_a_refused_series_holds_no_identifier(
    code: str, bundle: Bundle, tmp_path: Path, phantom_series: Callable[..., list[bytes]]
) -> None:
    """Through the function that makes rows, each slice with identifiers everywhere."""
    members = []
    for number, (part, differs) in enumerate(zip(phantom_series(4), SERIES[code], strict=True)):
        place = tmp_path / f"{FAMILY}-{NUMBER}-{number}.dcm"
        kept = {
            "ImagePositionPatient": f"0\\0\\{number}",
            "ImageOrientationPatient": "1\\0\\0\\0\\1\\0",
            "FrameOfReferenceUID": "1.2.3",
        }
        place.write_bytes(plant(edited(part, **differs.get("edit", {})), **{**kept, **differs.get("keep", {})}))
        assert NAME.encode() in place.read_bytes()
        members.append({"uri": str(place), "etag": "", "size": place.stat().st_size})
    entry = {"uri": f"{members[0]['uri']}#series", "etag": "", "size": 1, "members": members, "image_id": 1}
    names = Pseudonymiser(b"q7Jm2xVt9LrYw4KsN8bHd3PzG6cFa5Tu", PrivacyConfig(uri="hash"))
    settings = WorkerSettings(
        bundle.uri, str(tmp_path / "run"), ScoringConfig(precision="float32"), DecodeConfig(), names
    )
    ScoringWorker(settings)(pa.Table.from_pylist([entry]))
    [row] = written(tmp_path / "run")
    assert row["error_code"] == code
    assert_clean(repr(row).encode(), "the row of a series")


def written(folder: Path) -> list[dict[str, Any]]:
    """What workers wrote for a run."""
    return [row for path in sorted((folder / "rows").iterdir()) for row in pq.ParquetFile(path).read().to_pylist()]


def test_nothing_that_the_job_wrote_holds_an_identifier(run: Run) -> None:
    files = [path for path in run.output.rglob("*") if path.is_file()]
    assert any(path.suffix == ".parquet" for path in files)
    assert any(path.parent.name == "_delta_log" for path in files)
    for path in files:
        assert_clean(str(path.relative_to(run.output)).encode(), f"the name of {path.name}")
        assert_clean(path.read_bytes(), path.name)
        if path.suffix == ".parquet":
            for row in pq.ParquetFile(path).read().to_pylist():
                assert_clean(repr(row).encode(), f"a row of {path}")
                for value in row.values():
                    if isinstance(value, bytes):
                        assert_clean(value, f"bytes of {path}")
                        assert_clean(zlib.decompress(value), f"the mask of {path}")
    assert not (run.output / "runs").exists() or not [p for p in (run.output / "runs").rglob("*") if p.is_file()]


def test_nothing_that_the_job_said_or_told_holds_an_identifier(run: Run) -> None:
    assert [json.loads(line) for line in run.said["stderr"].splitlines()]
    for where, text in run.said.items():
        assert text
        assert_clean(text.encode(), where)


def test_the_allow_list_came_through_and_no_more(run: Run) -> None:
    rows = {row["uri"]: row for row in rows_of(run) if "predicted_label" in row}
    film = next(uri for uri in run.codes if uri.endswith("film.dcm"))
    row = rows[run.names.address(film)]
    assert (row["modality"], row["may_contain_text"]) == ("DX", True)  # the planted BurnedInAnnotation is not NO
    told = ("manufacturer", "manufacturer_model", "software", "body_part", "view", "patient_sex", "kvp")
    assert [row[name] for name in told] == [None] * len(told)
    assert row["study_date"] not in (None, date(1931, 7, 19))
    other = next(uri for uri in run.codes if uri.endswith("another modality.dcm"))
    assert rows[run.names.address(other)]["modality"] == "OT"


def test_what_is_done_and_what_failed_is_known_by_its_pseudonym(run: Run) -> None:
    failed = sum(code is not None for code in run.codes.values())
    facts = dict(line.split(": ", 1) for line in run.said["preview"].splitlines() if ": " in line)
    counts = [int(facts[name]) for name in ("to_score", "retried", "already_done")]
    assert counts == [failed, failed, len(run.codes) - failed]


def test_the_tables_are_proved_with_pseudonyms(run: Run) -> None:
    assert verify(str(run.output)).findings == []


def test_a_report_holds_no_identifier(run: Run, bundle: Bundle) -> None:
    place = run.output / "reports" / "a report.html"
    job = build_job(ReportJob, {"output": str(run.output), "bundle": bundle.uri, "file": str(place)}, "a test")
    build_report(job)
    assert_clean(place.read_bytes(), "the report")


def test_labels_of_metrics_hold_no_identifier(
    run: Run, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker tells the cluster's metrics of these objects, those that would kill it left out; in its own process."""
    told: list[Any] = []
    monkeypatch.setattr(monitoring, "record_block", lambda *args, **kwargs: told.append((args, kwargs)))
    listed = list_archive(ArchiveConfig(uri=str(run.archive)), run.names).objects
    block = listed.filter(
        pa.array([uri.endswith((".dcm", ".gz", ".nii", ".png")) for uri in listed["uri"].to_pylist()])
    )
    scoring = ScoringConfig(precision="float32")
    worker = ScoringWorker(WorkerSettings(bundle.uri, str(tmp_path), scoring, DecodeConfig(), run.names))
    worker(block)
    assert told
    assert_clean(repr(told).encode(), "metrics")
    rows = written(tmp_path)
    assert_clean(repr(rows).encode(), "rows of a worker")
    assert [row["image_id"] for row in rows] == block["image_id"].to_pylist()
