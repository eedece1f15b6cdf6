"""HD95 and surface Dice against MONAI and against the definition written out."""

from __future__ import annotations

import numpy as np
import pytest

from medvision_ray.evaluation.surfaces import surface_agreement


def blobs(seed: int, shape: tuple[int, int] = (40, 50)) -> tuple[np.ndarray, np.ndarray]:
    """Two different masks of discs, some of them cut by the border."""
    generator = np.random.default_rng(seed)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    masks = []
    for _ in range(2):
        mask = np.zeros(shape, dtype=bool)
        for _ in range(generator.integers(1, 4)):
            centre = generator.integers(0, shape[0]), generator.integers(0, shape[1])
            mask |= (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= generator.integers(0, 81)
        masks.append(mask)
    return masks[0], masks[1]


def surface_points(mask: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Centres of the pixels with a 4-neighbour that is not in the mask, in the unit of spacing."""
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inside) * np.array(spacing)


def by_definition(
    truth: np.ndarray, predicted: np.ndarray, spacing: tuple[float, float], tolerance: float
) -> tuple[float, float]:
    one, other = surface_points(truth, spacing), surface_points(predicted, spacing)
    distances = np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1))
    there, back = distances.min(axis=1), distances.min(axis=0)
    hd95 = max(np.percentile(there, 95), np.percentile(back, 95))
    return hd95, ((there <= tolerance).sum() + (back <= tolerance).sum()) / (there.size + back.size)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.5, 0.5), (0.7, 1.9)])
def test_every_distance_between_surfaces_taken_one_by_one_gives_the_same(spacing: tuple[float, float]) -> None:
    for seed in range(20):
        truth, predicted = blobs(seed)
        ours = surface_agreement(truth, predicted, spacing, 2.0)
        assert ours == pytest.approx(by_definition(truth, predicted, spacing, 2.0), abs=1e-9)


def test_monai_gives_the_same() -> None:
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.metrics")
    spacing, tolerance = (0.7, 1.9), 2.0
    pairs = [blobs(seed) for seed in range(12)]
    truth, predicted = (torch.tensor(np.stack(masks))[:, None].float() for masks in zip(*pairs, strict=True))
    options = {"include_background": True, "spacing": list(spacing)}
    hd95 = monai.compute_hausdorff_distance(predicted, truth, percentile=95, **options)
    dice = monai.compute_surface_dice(predicted, truth, [tolerance], **options)
    ours = np.array([surface_agreement(one, other, spacing, tolerance) for one, other in pairs])
    np.testing.assert_allclose(ours[:, 0], hd95[:, 0], atol=1e-5)
    np.testing.assert_allclose(ours[:, 1], dice[:, 0], atol=1e-6)


def test_where_nothing_was_drawn_the_worst_case_counts() -> None:
    truth = np.zeros((30, 40), dtype=bool)
    truth[5, 5] = True
    assert surface_agreement(truth, np.zeros_like(truth), (1.0, 1.0), 2.0) == (50.0, 0.0)
    assert surface_agreement(truth, np.zeros_like(truth), (0.5, 0.5), 2.0) == (25.0, 0.0)
    for seed in range(10):
        drawn, _ = blobs(seed, (30, 40))
        assert surface_agreement(truth, drawn, (1.0, 1.0), 2.0)[0] < 50.0


def test_an_empty_true_mask_has_neither() -> None:
    empty, drawn = np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool)
    assert np.isnan(surface_agreement(empty, drawn, (1.0, 1.0), 2.0)).all()


def test_equal_masks_agree_wholly() -> None:
    truth, _ = blobs(3)
    assert surface_agreement(truth, truth, (0.5, 2.0), 0.0) == (0.0, 1.0)
