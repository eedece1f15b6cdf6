"""The phantom hospital: deterministic, valid files, honest masks, nights and splits apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import imagecodecs
import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from medvision_ray.demo import CLASSES, MODALITIES, PhantomArchive, draw_phantom, make_archive
from medvision_ray.demo.encode import Subject, ct_dicom, to_hounsfield, xray_dicom
from medvision_ray.errors import UsageError
from medvision_ray.learning.near_duplicates import hash_of_small, near_pairs

PATIENTS = 30
SOP_CLASSES = {
    ("DX", "Digital X-Ray Image Storage - For Presentation"),
    ("CR", "Computed Radiography Image Storage"),
    ("CT", "CT Image Storage"),
    ("MR", "MR Image Storage"),
    ("MR", "Enhanced MR Image Storage"),
}
NOBODY = Subject("PHANTOM^NOBODY", "PHANTOM-ID-X", "PHANTOM-ACC-X", 0, 0)


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> PhantomArchive:
    return make_archive(tmp_path_factory.mktemp("hospital"), patients=PATIENTS, seed=3)


@pytest.fixture(scope="module")
def labels(hospital: PhantomArchive) -> pd.DataFrame:
    return pd.read_csv(hospital.labels, keep_default_na=False)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def good_dicom(hospital: PhantomArchive) -> list[Path]:
    return [path for path in (hospital.folder / "archive").rglob("*.dcm") if path.parent.name != "incoming"]


def stored_pixels(path: Path) -> np.ndarray:
    data = pydicom.dcmread(path)
    if data.file_meta.TransferSyntaxUID.is_compressed:
        return imagecodecs.jpegls_decode(next(pydicom.encaps.generate_frames(data.PixelData)))
    return data.pixel_array


def test_same_seed_writes_the_same_bytes_and_another_seed_other_ones(tmp_path: Path) -> None:
    archives = [make_archive(tmp_path / str(i), patients=12, seed=seed) for i, seed in enumerate((1, 1, 2))]
    first, again, other = (digests(archive.folder) for archive in archives)
    assert first == again
    assert first.keys() == other.keys()
    film = "archive/night-1/case-000/film-1.dcm"
    assert first[film] != other[film]
    uids = [pydicom.dcmread(archive.folder / film).SOPInstanceUID for archive in archives]
    assert uids[0] != uids[2]


def test_counts_are_those_of_the_files(hospital: PhantomArchive, labels: pd.DataFrame) -> None:
    for night, count in ((hospital.night_1, hospital.night_1_objects), (hospital.night_2, hospital.night_2_objects)):
        assert sum(path.is_file() for path in Path(night).rglob("*")) == count
    assert hospital.night_1_objects == 20 * 5 + 6
    assert hospital.night_2_objects == 10 * 5
    assert len(labels) == hospital.labelled == 100
    assert (labels["mask"] != "").sum() == hospital.masked == 80
    assert sum(path.suffix == ".png" for path in (hospital.folder / "masks").rglob("*")) == hospital.masked


def test_every_good_object_of_the_first_night_is_labelled(hospital: PhantomArchive, labels: pd.DataFrame) -> None:
    night = Path(hospital.night_1)
    files = {str(path.relative_to(hospital.folder)) for path in night.rglob("*") if path.is_file()}
    broken = {str((night / name).relative_to(hospital.folder)) for name in hospital.broken}
    assert broken < files
    assert set(labels["image"]) == files - broken


def test_patients_do_not_cross_nights_and_have_one_study(hospital: PhantomArchive) -> None:
    nights: dict[str, set[str]] = {}
    studies: dict[str, set[str]] = {}
    for path in good_dicom(hospital):
        data = pydicom.dcmread(path, stop_before_pixels=True)
        nights.setdefault(data.PatientID, set()).add(path.relative_to(hospital.folder).parts[1])
        studies.setdefault(data.PatientID, set()).add(data.StudyInstanceUID)
    assert len(nights) == PATIENTS
    assert all(len(seen) == 1 for seen in nights.values())
    assert all(len(seen) == 1 for seen in studies.values())


def test_splits_are_by_patient_and_every_split_has_every_class(labels: pd.DataFrame) -> None:
    assert (labels.groupby("patient_id")["split"].nunique() == 1).all()
    assert (labels.groupby("patient_id")["label"].nunique() == 1).all()
    assert set(labels.groupby(["split", "label"]).size().index) == {
        (split, label) for split in ("train", "val", "test") for label in CLASSES
    }


def test_dicom_objects_are_readable_and_unique(hospital: PhantomArchive) -> None:
    uids = set()
    for path in good_dicom(hospital):
        data = pydicom.dcmread(path)
        uids.add(data.SOPInstanceUID)
        assert pydicom.uid.UID(data.SOPInstanceUID).is_valid
        assert (data.Modality, data.SOPClassUID.name) in SOP_CLASSES
        assert data.PatientName in hospital.identifiers
        assert data.PatientID in hospital.identifiers
        frames = int(data.get("NumberOfFrames", 1))
        expected = (frames, data.Rows, data.Columns) if frames > 1 else (data.Rows, data.Columns)
        assert stored_pixels(path).shape == expected
    assert len(uids) == len(good_dicom(hospital))


def test_half_of_the_films_are_monochrome1(hospital: PhantomArchive) -> None:
    films = [pydicom.dcmread(path, stop_before_pixels=True) for path in good_dicom(hospital) if "film" in path.name]
    inverted = sum(film.PhotometricInterpretation == "MONOCHROME1" for film in films)
    assert abs(inverted / len(films) - 0.5) <= 0.1


@pytest.mark.parametrize("digital", [True, False])
def test_both_polarities_display_the_same_picture(digital: bool, tmp_path: Path) -> None:
    picture, _ = draw_phantom(np.random.default_rng(0), "DX", "nodule", 64)
    shown = []
    for inverted in (False, True):
        path = tmp_path / f"{inverted}.dcm"
        path.write_bytes(xray_dicom(NOBODY, 0, picture, digital=digital, inverted=inverted))
        data = pydicom.dcmread(path)
        values = apply_voi_lut(data.pixel_array, data).astype(float)
        shown.append((4095 - values if inverted else values) / 4095)
    np.testing.assert_allclose(shown[0], picture, atol=1e-3)
    np.testing.assert_allclose(shown[1], shown[0], atol=1e-3)


@pytest.mark.parametrize(("signed", "intercept"), [(True, 0), (False, -1024)])
def test_ct_holds_hounsfield_units(signed: bool, intercept: int, tmp_path: Path) -> None:
    picture, _ = draw_phantom(np.random.default_rng(0), "CT", "nodule", 64)
    path = tmp_path / "ct.dcm"
    path.write_bytes(ct_dicom(NOBODY, 0, picture, signed=signed, compressed=False))
    data = pydicom.dcmread(path)
    assert data.RescaleIntercept == intercept
    assert data.PixelRepresentation == int(signed)
    hounsfield = apply_modality_lut(data.pixel_array, data)
    np.testing.assert_array_equal(hounsfield, to_hounsfield(picture))
    assert hounsfield.min() < -900
    shown = np.clip((hounsfield + 160.0) / 400.0, 0.0, 1.0)
    np.testing.assert_allclose(shown[picture >= 0.05], picture[picture >= 0.05], atol=2e-3)


def test_jpegls_slices_are_lossless_hounsfield() -> None:
    picture, _ = draw_phantom(np.random.default_rng(1), "CT", "cavity", 64)
    data = pydicom.dcmread(pydicom.filebase.DicomBytesIO(ct_dicom(NOBODY, 0, picture, signed=False, compressed=True)))
    stored = imagecodecs.jpegls_decode(next(pydicom.encaps.generate_frames(data.PixelData)))
    np.testing.assert_array_equal(stored.astype(int) - 1024, to_hounsfield(picture))


def test_masks_lie_on_their_images_grid(hospital: PhantomArchive, labels: pd.DataFrame) -> None:
    for row in labels[labels["mask"] != ""].itertuples():
        image, mask = hospital.folder / row.image, cv2.imread(str(hospital.folder / row.mask), cv2.IMREAD_UNCHANGED)
        dicom = image.suffix == ".dcm"
        shape = (stored_pixels(image) if dicom else cv2.imread(str(image), cv2.IMREAD_UNCHANGED)).shape
        assert mask.shape == shape
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == {0, 255}


def test_objects_without_a_mask_are_those_of_several_frames(hospital: PhantomArchive, labels: pd.DataFrame) -> None:
    kinds = set()
    for name in labels.loc[labels["mask"] == "", "image"]:
        path = hospital.folder / name
        kinds.add(path.name)
        if path.suffix == ".dcm":
            assert pydicom.dcmread(path).pixel_array.shape == (3, 256, 256)
        else:
            volume = nibabel.load(path)
            assert volume.shape[:2] == (256, 256)
            assert 3 <= volume.shape[2] <= 5
            assert "".join(nibabel.aff2axcodes(volume.affine)) == "LPS"
    assert kinds == {"head.nii.gz", "head-series.dcm"}


def test_rasters_have_8_and_16_bits_and_jpeg(hospital: PhantomArchive) -> None:
    kinds = {
        (path.suffix, cv2.imread(str(path), cv2.IMREAD_UNCHANGED).dtype.name)
        for path in (hospital.folder / "archive").rglob("capture.*")
    }
    assert kinds == {(".png", "uint8"), (".png", "uint16"), (".jpg", "uint8")}


def test_broken_objects_are_broken_each_in_its_way(hospital: PhantomArchive) -> None:
    incoming = Path(hospital.night_1) / "incoming"
    assert (incoming / "empty.dcm").stat().st_size == 0
    with pytest.raises(pydicom.errors.InvalidDicomError):
        pydicom.dcmread(incoming / "letter.dcm")
    cut = pydicom.dcmread(incoming / "cut-off.dcm")
    assert 0 < len(cut.PixelData) < cut.Rows * cut.Columns * 2
    absurd = pydicom.dcmread(incoming / "absurd-size.dcm")
    assert (absurd.Rows, absurd.Columns, len(absurd.PixelData)) == (65535, 65535, 64)
    assert "PixelData" not in pydicom.dcmread(incoming / "no-pixels.dcm")
    assert (incoming / "referral.pdf").read_bytes().startswith(b"%PDF")
    assert len(hospital.broken) == 6


def test_no_path_holds_an_identifier(hospital: PhantomArchive) -> None:
    for path in hospital.folder.rglob("*"):
        assert not any(text.lower() in str(path.relative_to(hospital.folder)).lower() for text in hospital.identifiers)


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize("modality", MODALITIES)
def test_lesion_has_its_size_and_its_look(modality: str, label: str) -> None:
    for seed in range(4):
        image, mask = draw_phantom(np.random.default_rng(seed), modality, label, 128)
        assert image.dtype == np.float32
        assert image.shape == mask.shape == (128, 128)
        assert image.min() >= 0.0
        assert image.max() <= 1.0
        rows, columns = np.nonzero(mask)
        for extent in (np.ptp(rows) + 1, np.ptp(columns) + 1):
            assert 0.06 * 128 <= extent <= 0.26 * 128
        centre = image[int(rows.mean()) - 1 : int(rows.mean()) + 2, int(columns.mean()) - 1 : int(columns.mean()) + 2]
        assert (centre.mean() < 0.2) == (label == "cavity")
        ring = cv2.dilate(mask.astype(np.uint8), np.ones((15, 15))).astype(bool) & ~mask
        assert image[mask].max() > image[ring].mean() + 0.3


def test_frames_of_a_volume_share_the_lesion_and_differ_in_noise() -> None:
    middle, mask = draw_phantom(np.random.default_rng(5), "MR", "nodule", 128)
    beside, smaller = draw_phantom(np.random.default_rng(5), "MR", "nodule", 128, frame=-1)
    assert smaller.sum() < mask.sum()
    assert not (smaller & ~mask).any()
    assert 0.005 < np.abs(middle - beside)[~mask].mean() < 0.05


def test_unknown_modality_or_label_is_refused() -> None:
    for modality, label in (("US", "nodule"), ("CT", "tumour")):
        with pytest.raises(ValueError, match="Expected a modality"):
            draw_phantom(np.random.default_rng(0), modality, label, 64)


def test_a_folder_with_an_archive_is_refused(hospital: PhantomArchive) -> None:
    with pytest.raises(UsageError, match="remove it first"):
        make_archive(hospital.folder)


@pytest.mark.parametrize("modality", MODALITIES)
def test_no_two_patients_look_nearly_the_same_to_the_guard_of_a_training(modality: str) -> None:
    pictures = [
        draw_phantom(np.random.default_rng([7, number]), modality, CLASSES[number % 3], 128)[0] for number in range(60)
    ]
    small = [cv2.resize((255 * one).astype(np.uint8), (32, 32), interpolation=cv2.INTER_AREA) for one in pictures]
    hashes = [hash_of_small(one) for one in small]
    assert near_pairs(hashes, ["train", "test"] * 30) == []
