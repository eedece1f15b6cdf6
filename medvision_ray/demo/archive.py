"""Write a phantom hospital: two nights of images, labels for the first, and what goes wrong in one."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medvision_ray.demo import encode
from medvision_ray.demo.encode import Subject
from medvision_ray.demo.phantom import CLASSES, FloatImage, draw_phantom
from medvision_ray.errors import UsageError

_FIRST_NAMES = (
    "ALICE",
    "BORIS",
    "CLARA",
    "DIEGO",
    "ELENA",
    "FARID",
    "GRETA",
    "HUGO",
    "INGRID",
    "JONAS",
    "KEIKO",
    "LARS",
)
_SIZE, _LARGE_SIZE = 256, 512
_LARGE_EVERY = 17
_FEWEST_PATIENTS = 12
_COLUMNS = ("image", "mask", "label", "patient_id", "split")


@dataclass(frozen=True)
class PhantomArchive:
    """What `make_archive` wrote.

    Attributes:
        folder: holds `archive/`, `masks/` and `labels.csv`.
        night_1: address of the first night's folder, an absolute path.
        night_2: address of the second night's folder; nothing in it is labelled.
        labels: the label table of the first night.
        night_1_objects: objects of the first night, the broken ones among them.
        night_2_objects: objects of the second night.
        labelled: rows of the label table.
        masked: rows of it that name a mask.
        patients: patients of both nights.
        broken: paths below `night_1` of the objects that can't be scored.
        identifiers: every name, identifier and accession number that was planted.
    """

    folder: Path
    night_1: str
    night_2: str
    labels: Path
    night_1_objects: int
    night_2_objects: int
    labelled: int
    masked: int
    patients: int
    broken: tuple[str, ...]
    identifiers: tuple[str, ...]


@dataclass(frozen=True)
class _Object:
    """One image file: where it goes, its bytes, and its mask where it has a single frame."""

    name: str
    data: bytes
    mask: NDArray[np.bool_] | None


def make_archive(folder: Path, *, patients: int = 60, seed: int = 0) -> PhantomArchive:
    """Write a phantom hospital archive: five objects a patient, and six broken ones.

    Two thirds of the patients came in the first night, the rest in the second; none in both. The
    first night is labelled and split by patient (about 0.6 train, 0.15 val, 0.25 test, each class
    spread evenly). Objects of several frames have a class but no mask.

    Args:
        folder: made where it is absent; must not hold an archive yet.
        patients: at least 12, so that no split is empty; from 30 on every split has every class.
        seed: the same seed writes the same bytes.

    Raises:
        UsageError: fewer than 12 patients, or `folder` already holds an archive.
    """
    if patients < _FEWEST_PATIENTS:
        raise UsageError(
            f"Expected at least {_FEWEST_PATIENTS} phantom patients, or a split is empty, but got {patients}."
        )
    folder = folder.resolve()
    if (folder / "archive").exists():
        raise UsageError(f"Expected a folder without an archive, but {folder / 'archive'} exists: remove it first.")
    in_night_1 = round(patients * 2 / 3)
    rows: list[dict[str, str]] = []
    counts = [0, 0]
    subjects = [_subject(number, seed) for number in range(patients)]
    for subject in subjects:
        night = int(subject.number >= in_night_1)
        for item in _draw_patient(subject):
            image = f"archive/night-{night + 1}/case-{subject.number:03d}/{item.name}"
            _write(folder / image, item.data)
            counts[night] += 1
            if night == 0:
                rows.append(_label_row(folder, image, item, subject, in_night_1))
    broken = _break_things(subjects[0])
    for name, data in broken.items():
        _write(folder / "archive/night-1" / name, data)
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, _COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return PhantomArchive(
        folder=folder,
        night_1=str(folder / "archive/night-1"),
        night_2=str(folder / "archive/night-2"),
        labels=folder / "labels.csv",
        night_1_objects=counts[0] + len(broken),
        night_2_objects=counts[1],
        labelled=len(rows),
        masked=sum(bool(row["mask"]) for row in rows),
        patients=patients,
        broken=tuple(broken),
        identifiers=_identifiers(subjects),
    )


def _subject(number: int, seed: int) -> Subject:
    name = f"PHANTOM^{_FIRST_NAMES[number % len(_FIRST_NAMES)]}"
    return Subject(name, f"PHANTOM-ID-{number:04d}", f"PHANTOM-ACC-{number:04d}", number, seed)


def _identifiers(subjects: list[Subject]) -> tuple[str, ...]:
    planted = {text for subject in subjects for text in (subject.name, subject.patient_id, subject.accession)}
    return (*sorted(planted), "PHANTOM^DOCTOR", "PHANTOM HOSPITAL")


def _label_of(subject: Subject) -> str:
    return CLASSES[subject.number % len(CLASSES)]


def _split_of(number: int, labelled_patients: int) -> str:
    """The split of a patient; classes go round by number, so blocks of numbers hold them evenly."""
    position = (number + 0.5) / labelled_patients
    if position < 0.6:
        return "train"
    return "val" if position < 0.75 else "test"


def _label_row(folder: Path, image: str, item: _Object, subject: Subject, labelled_patients: int) -> dict[str, str]:
    mask = ""
    if item.mask is not None:
        mask = f"masks/case-{subject.number:03d}/{item.name.split('.')[0]}.png"
        _write(folder / mask, encode.png(item.mask))
    return {
        "image": image,
        "mask": mask,
        "label": _label_of(subject),
        "patient_id": subject.patient_id,
        "split": _split_of(subject.number, labelled_patients),
    }


def _draw_patient(subject: Subject) -> Iterator[_Object]:
    """Five objects of one patient: a film, a film or MR slice, a CT slice, an MR volume, a raster picture."""
    number = subject.number
    # Kinds go round by groups of patients, so that none of them goes with one class.
    turn = number // len(CLASSES)
    odd = bool(turn % 2)

    film, mask = _draw(subject, 0, "DX")
    yield _Object("film-1.dcm", encode.xray_dicom(subject, 0, film, digital=True, inverted=odd), mask)
    if turn % 4 < 2:
        film, mask = _draw(subject, 1, "DX")
        data = encode.xray_dicom(subject, 1, film, digital=False, inverted=not odd)
        yield _Object("film-2.dcm", data, mask)
    else:
        head, mask = _draw(subject, 1, "MR")
        yield _Object("head.dcm", encode.mr_dicom(subject, 1, head), mask)
    chest, mask = _draw(subject, 2, "CT")
    data = encode.ct_dicom(subject, 2, chest, signed=odd, compressed=not odd and turn % 3 == 0)
    yield _Object("chest.dcm", data, mask)
    if odd:
        data = encode.multiframe_dicom(subject, 3, _draw_frames(subject, 3, range(-1, 2)))
        yield _Object("head-series.dcm", data, None)
    else:
        reach = 1 + turn // 2 % 2
        yield _Object("head.nii.gz", encode.nifti(subject, _draw_frames(subject, 3, range(-reach, reach + 1))), None)
    yield _raster(subject, turn)


def _raster(subject: Subject, turn: int) -> _Object:
    kind = turn % 3
    picture, mask = _draw(subject, 4, ("DX", "MR", "CT")[kind])
    if kind == 2:
        return _Object("capture.jpg", encode.jpeg(picture), mask)
    return _Object("capture.png", encode.png(picture, bits=8 if kind == 0 else 16), mask)


def _draw(subject: Subject, index: int, modality: str, frame: int = 0) -> tuple[FloatImage, NDArray[np.bool_]]:
    rng = np.random.default_rng([subject.seed, subject.number, index])
    large = (5 * subject.number + index) % _LARGE_EVERY == 0
    size = _LARGE_SIZE if large and modality != "MR" else _SIZE
    return draw_phantom(rng, modality, _label_of(subject), size, frame=frame)


def _draw_frames(subject: Subject, index: int, frames: range) -> FloatImage:
    return np.stack([_draw(subject, index, "MR", frame)[0] for frame in frames])


def _break_things(subject: Subject) -> dict[str, bytes]:
    """Six objects that can't be scored, by path below the first night."""
    film, _ = _draw(subject, 5, "DX")
    whole = encode.xray_dicom(subject, 5, film, digital=True, inverted=False)
    letter = f"Dear colleague,\nplease find the films of {subject.name} enclosed.\n"
    return {
        "incoming/empty.dcm": b"",
        "incoming/cut-off.dcm": whole[: len(whole) * 6 // 10],
        "incoming/letter.dcm": letter.encode(),
        "incoming/absurd-size.dcm": encode.absurd_dicom(subject, 6),
        "incoming/referral.pdf": b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF\n",
        "incoming/no-pixels.dcm": encode.pixelless_dicom(subject, 7),
    }


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
