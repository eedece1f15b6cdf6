"""The display chain against values computed by hand from the standard's formulas, and table against float."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medvision_ray.config import DecodeConfig
from medvision_ray.imaging.decode import decode
from medvision_ray.imaging.display import (
    Bounds,
    _taken,
    frame_scalings,
    modality_values,
    percentile_bounds,
    show,
    unit_table,
    unit_values,
)
from medvision_ray.imaging.image import Display, LookupTable, MedicalImage, VoiFunction, Window


def table(first: int, values: list[int], bits: int) -> LookupTable:
    return LookupTable(first, np.array(values, np.uint16), bits)


@pytest.mark.parametrize(
    ("window", "stored", "expected"),
    [
        (Window(100, 101), [49, 50, 100, 150, 151], [0, 0.005, 0.505, 1, 1]),
        (Window(100, 100, VoiFunction.LINEAR_EXACT), [50, 75, 100, 150], [0, 0.25, 0.5, 1]),
        (Window(100, 100, VoiFunction.SIGMOID), [50, 100, 150], [1 / (1 + np.e**2), 0.5, 1 / (1 + np.e**-2)]),
        (Window(100, 1), [99, 100], [0, 1]),
    ],
)
def test_windows_follow_the_standard(window: Window, stored: list[int], expected: list[float]) -> None:
    shown = unit_values(np.array(stored, np.int16), Display(), window)
    np.testing.assert_allclose(shown, expected, atol=1e-12)


def test_the_linear_window_agrees_with_pydicom() -> None:
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    dataset.WindowCenter, dataset.WindowWidth = 40, 400
    stored = dataset.pixel_array
    display = Display(slope=float(dataset.RescaleSlope), intercept=float(dataset.RescaleIntercept))
    hounsfield = pydicom.pixels.apply_modality_lut(stored, dataset)
    reference = pydicom.pixels.apply_windowing(hounsfield, dataset)
    low, high = -1024 - 32768, -1024 + 32767  # pydicom's output range is that of the modality values
    np.testing.assert_allclose(
        unit_values(stored, display, Window(40, 400)), (reference - low) / (high - low), atol=1e-6
    )


def test_the_window_applies_to_rescaled_values() -> None:
    display = Display(slope=2, intercept=-1024)
    shown = unit_values(np.array([412, 512, 612]), display, Window(0, 400, VoiFunction.LINEAR_EXACT))
    np.testing.assert_allclose(shown, [0, 0.5, 1])


def test_inversion_comes_last_and_padding_stays_black() -> None:
    display = Display(invert=True, padding=(-5, 0))
    shown = unit_values(np.array([-5, 0, 25, 100]), display, Bounds(0, 100))
    np.testing.assert_allclose(shown, [0, 0, 0.75, 0])


def test_a_modality_lut_with_a_negative_first_value_maps_signed_input() -> None:
    display = Display(slope=7, modality_lut=table(-2, [10, 20, 30], 16))
    np.testing.assert_array_equal(
        modality_values(np.array([-9, -2, -1, 0, 9], np.int16), display), [10, 10, 20, 30, 30]
    )
    np.testing.assert_array_equal(modality_values(np.array([0, 1], np.uint16), display), [30, 30])


def test_a_voi_lut_maps_modality_values_and_clamps_outside() -> None:
    lut = table(100, [0, 1000, 4095], 12)
    shown = unit_values(np.array([0, 50, 50.4, 51, 999]), Display(slope=2), lut)
    np.testing.assert_allclose(shown, [0, 0, 1000 / 4095, 1, 1])


def test_a_voi_lut_that_uses_fewer_bits_than_declared_ends_at_its_maximum() -> None:
    assert unit_values(np.array([1]), Display(), table(0, [0, 4095], 16)).tolist() == [1.0]


def test_an_eight_bit_voi_lut_of_more_than_256_entries_does_not_wrap() -> None:
    lut = table(0, [index // 2 for index in range(512)], 8)
    assert unit_values(np.array([256]), Display(), lut)[0] == pytest.approx(128 / 255)


CHAINS = [
    (Display(slope=1.5, intercept=-1024), Window(40, 400)),
    (Display(invert=True, padding=(-2000, -1900)), Window(0, 900, VoiFunction.SIGMOID)),
    (Display(modality_lut=table(-50, list(range(0, 3000, 3)), 16)), Window(500, 700, VoiFunction.LINEAR_EXACT)),
    (Display(slope=-1.0, intercept=10), table(-100, list(range(0, 4096, 8)), 12)),
    (Display(), Bounds(-300.0, 811.0)),
]


@pytest.mark.parametrize(("display", "scaling"), CHAINS)
@pytest.mark.parametrize("kind", ["int16", "uint16", "uint8", "int8", "int32"])
def test_the_table_gives_what_the_float_chain_gives(display: Display, scaling: Any, kind: str) -> None:
    low, high = max(np.iinfo(kind).min, -2048), min(np.iinfo(kind).max, 3071)
    stored = np.random.default_rng(0).integers(low, high, (37, 41), endpoint=True).astype(kind)
    as_floats = show(stored.astype(np.float64), display, scaling)
    np.testing.assert_array_equal(show(stored, display, scaling), as_floats)


def test_the_table_covers_the_whole_signed_range() -> None:
    stored = np.array([[-32768, 0, 32767]], np.int16)
    assert show(stored, Display(), Bounds(-32768, 32767)).tolist() == [[0, 32768, 65535]]
    assert unit_table(Display(), -32768, 32767, Bounds(-32768, 32767)).shape == (65536,)


@pytest.mark.parametrize("kind", ["int16", "uint16", "uint8", "int32", "float32"])
def test_percentiles_leave_padding_out_and_span_all_frames(kind: str) -> None:
    stored = np.random.default_rng(1).integers(0, 120, (3, 50, 40)).astype(kind)
    stored[:, :10] = 7
    image = MedicalImage(stored, display=Display(slope=2, intercept=-9, padding=(7, 7)))
    kept = stored[stored != 7].astype(np.float64) * 2 - 9
    low, high = np.percentile(kept, [2, 98], method="inverted_cdf")
    assert percentile_bounds(image, (2, 98)) == Bounds(low, high)


def test_values_that_are_no_numbers_are_black() -> None:
    assert show(np.array([[np.nan, 1.0]]), Display(), Bounds(0, 1)).tolist() == [[0, 65535]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 70_000), (300, 500), (70_000, 1)])
def test_looking_up_a_few_rows_at_a_time_changes_nothing(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 65536, 4096).astype(np.uint16)
    indices = rng.integers(0, 4096, shape).astype(np.uint16)
    np.testing.assert_array_equal(_taken(table, indices), table[indices])


def lut(first: int, entries: list[int], bits: int) -> Sequence:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(entries), first, bits])
    item.add_new("LUTData", "US", entries)
    return Sequence([item])


WINDOW = {"WindowCenter": 100, "WindowWidth": 101}
# Stored 0, 50, 100, 125, 200 after each branch, worked out on paper.
BRANCHES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "LINEAR": (WINDOW, [0, 0.005, 0.505, 0.755, 1]),
    "LINEAR by name": ({**WINDOW, "VOILUTFunction": "LINEAR"}, [0, 0.005, 0.505, 0.755, 1]),
    "LINEAR_EXACT": (
        {"WindowCenter": 100, "WindowWidth": 100, "VOILUTFunction": "LINEAR_EXACT"},
        [0, 0, 0.5, 0.75, 1],
    ),
    "SIGMOID": (
        {"WindowCenter": 100, "WindowWidth": 100, "VOILUTFunction": "SIGMOID"},
        [1 / (1 + np.e**4), 1 / (1 + np.e**2), 0.5, 1 / (1 + np.e**-1), 1 / (1 + np.e**-4)],
    ),
    "LINEAR narrower than 1 is LINEAR_EXACT": (
        {"WindowCenter": 0.5, "WindowWidth": 0.5, "RescaleSlope": 0.005},
        [0, 0, 0.5, 0.75, 1],
    ),
    "rescale before the window": (
        {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 100, "WindowWidth": 201},
        [0, 0.0025, 0.5025, 0.7525, 1],
    ),
    "the first of several windows": ({"WindowCenter": [100, 7], "WindowWidth": [101, 3]}, [0, 0.005, 0.505, 0.755, 1]),
    "VOI LUT": ({"VOILUTSequence": lut(50, [0, *[2] * 50, *[3] * 26, 4], 8)}, [0, 0, 0.5, 0.75, 1]),
    "VOI LUT before window": (
        {"VOILUTSequence": lut(50, [0, *[2] * 50, *[3] * 26, 4], 8), **WINDOW},
        [0, 0, 0.5, 0.75, 1],
    ),
    "VOI LUT after rescale": (
        {"RescaleIntercept": 50, "VOILUTSequence": lut(100, [0, *[2] * 50, *[3] * 26, 4], 8)},
        [0, 0, 0.5, 0.75, 1],
    ),
    "modality LUT": (
        {"ModalityLUTSequence": lut(0, [50, *[100] * 100, 150], 16), **WINDOW},
        [0.005, 0.505, 0.505, 1, 1],
    ),
    "modality LUT before rescale": (
        {"ModalityLUTSequence": lut(0, [50, *[100] * 100, 150], 16), "RescaleSlope": 9, **WINDOW},
        [0.005, 0.505, 0.505, 1, 1],
    ),
    "MONOCHROME1": ({**WINDOW, "PhotometricInterpretation": "MONOCHROME1"}, [1, 0.995, 0.495, 0.245, 0]),
    "INVERSE": ({**WINDOW, "PresentationLUTShape": "INVERSE"}, [1, 0.995, 0.495, 0.245, 0]),
    "MONOCHROME1 with INVERSE inverts once": (
        {**WINDOW, "PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
        [1, 0.995, 0.495, 0.245, 0],
    ),
    "padding is black": ({**WINDOW, "PixelPaddingValue": 200}, [0, 0.005, 0.505, 0.755, 0]),
    "padding is black after inversion": (
        {**WINDOW, "PixelPaddingValue": 0, "PixelPaddingRangeLimit": 50, "PresentationLUTShape": "INVERSE"},
        [0, 0, 0.495, 0.245, 0],
    ),
    "no window: the range without padding": ({"PixelPaddingValue": 200}, [0, 0.4, 0.8, 1, 0]),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_file_is_shown_as_its_branch_says(branch: str) -> None:
    attributes, expected = BRANCHES[branch]
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm"))
    for keyword in ("RescaleSlope", "RescaleIntercept", "PixelPaddingValue"):
        del dataset[keyword]
    dataset.Modality, dataset.PixelRepresentation = "DX", 0
    dataset.Rows, dataset.Columns = 1, 5
    dataset.PixelData = np.array([0, 50, 100, 125, 200], "<u2").tobytes()
    for keyword, value in {"RescaleSlope": 1, "RescaleIntercept": 0, **attributes}.items():
        if keyword.startswith("PixelPadding"):
            dataset.add_new(keyword, "US", value)
        else:
            setattr(dataset, keyword, value)
    out = BytesIO()
    dataset.save_as(out)
    image = decode(out.getvalue(), DecodeConfig())
    scaling = next(frame_scalings(image, True, (0, 100), None))
    np.testing.assert_allclose(unit_values(image.pixels[0, 0], image.display, scaling), expected, atol=1e-12)
