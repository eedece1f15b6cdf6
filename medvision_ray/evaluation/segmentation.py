"""Segmentation metrics from pixel counts per image: Dice and IoU with missed and spurious masks beside them.

Dice and IoU are means over the images whose true mask is not empty, and a mask that was missed
counts 0: dropping it would make a model look better the more it misses. An image whose true mask is
empty has no Dice; what was drawn there counts as spurious.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medvision_ray.evaluation.intervals import Key, Statistic, divide, plain_means, weighted_means
from medvision_ray.evaluation.mask_detail import MaskDetail
from medvision_ray.evaluation.samples import EvaluationSamples

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MaskView:
    """The images whose true mask is known, and the groups over which they are averaged.

    Attributes:
        patients: shape `(n,)`.
        groups: `all` first, then the names of the classes, G in all.
        members: shape `(n, G)`, the image is in the group: its true class, or a finding it has.
        overlap: shape `(n,)`, pixels.
        predicted_area: shape `(n,)`, pixels.
        true_area: shape `(n,)`, pixels; may be 0.
        detail: outlines and lesions of these images, where they were measured.
    """

    patients: NDArray[np.str_]
    groups: tuple[str, ...]
    members: Bools
    overlap: Floats
    predicted_area: Floats
    true_area: Floats
    detail: MaskDetail | None = None

    @property
    def marked(self) -> Bools:
        """Shape `(n,)`: the true mask is not empty."""
        return np.asarray(self.true_area > 0)

    def take(self, rows: Bools) -> MaskView:
        """The view of some images; the groups stay."""
        return MaskView(
            patients=self.patients[rows],
            groups=self.groups,
            members=self.members[rows],
            overlap=self.overlap[rows],
            predicted_area=self.predicted_area[rows],
            true_area=self.true_area[rows],
            detail=None if self.detail is None else self.detail.take(rows),
        )


def mask_view(samples: EvaluationSamples) -> MaskView | None:
    """The images of `samples` whose true mask is known; None where there is none."""
    if samples.overlap is None or samples.predicted_area is None or samples.true_area is None:
        return None
    known = ~np.isnan(samples.true_area)
    if not known.any():
        return None
    every = np.ones((samples.n, 1), dtype=np.bool_)
    return MaskView(
        patients=samples.patients[known],
        groups=("all", *samples.classes),
        members=np.concatenate([every, samples.truth() == 1], axis=1)[known],
        overlap=samples.overlap[known].astype(np.float64),
        predicted_area=samples.predicted_area[known].astype(np.float64),
        true_area=samples.true_area[known].astype(np.float64),
        detail=None if samples.detail is None else samples.detail.take(known),
    )


def dice_per_image(overlap: Floats, predicted_area: Floats, true_area: Floats) -> Floats:
    """Dice coefficient 2 |A and B| / (|A| + |B|) of each image (Dice 1945), shape `(n,)`; NaN where both are empty.

    Examples:
        >>> dice_per_image(np.array([6.0, 0.0]), np.array([8.0, 0.0]), np.array([10.0, 5.0])).round(4)
        array([0.6667, 0.    ])
    """
    return divide(2 * overlap, predicted_area + true_area)


def iou_per_image(overlap: Floats, predicted_area: Floats, true_area: Floats) -> Floats:
    """Intersection over union |A and B| / |A or B| of each image (Jaccard 1912), shape `(n,)`; NaN where both are empty.

    Examples:
        >>> iou_per_image(np.array([6.0, 0.0]), np.array([8.0, 0.0]), np.array([10.0, 5.0]))
        array([0.5, 0. ])
    """
    return divide(overlap, predicted_area + true_area - overlap)


def plain_overlaps(view: MaskView) -> dict[Key, float]:
    """Mean Dice and IoU of each group; NaN where a group has no image with a true mask."""
    values, members = _columns(view)
    return dict(zip(_keys(view), map(float, plain_means(values, members)), strict=True))


def weighted_overlaps(view: MaskView) -> Statistic:
    """The means of `plain_overlaps` as a function of weights of shape `(resamples, n)`."""
    values, members = _columns(view)
    keys = _keys(view)

    def statistic(weights: Floats) -> Mapping[Key, Floats]:
        return dict(zip(keys, weighted_means(weights, values, members).T, strict=True))

    return statistic


def overlap_members(view: MaskView) -> tuple[list[Key], Bools]:
    """The keys of `plain_overlaps`, and which images each is a mean over, shape `(n, 2 G)`."""
    return _keys(view), _columns(view)[1]


def mask_counts(view: MaskView) -> dict[Key, tuple[Bools, Bools]]:
    """What is counted, and among which images, each shape `(n,)`.

    Returns:
        Per group: `mask_images` (true mask not empty) and, among them, `missed_masks` (no pixel of
        it was found, whether nothing was drawn or only elsewhere); `empty_mask_images` (true mask
        known to be empty) and, among them, `spurious_masks` (something was drawn).
    """
    counts: dict[Key, tuple[Bools, Bools]] = {}
    for group, member in zip(view.groups, view.members.T, strict=True):
        marked, empty = member & view.marked, member & ~view.marked
        counts[group, "mask_images"] = marked, marked
        counts[group, "missed_masks"] = marked & (view.overlap == 0), marked
        counts[group, "empty_mask_images"] = empty, empty
        counts[group, "spurious_masks"] = empty & (view.predicted_area > 0), empty
    return counts


def _columns(view: MaskView) -> tuple[Floats, Bools]:
    """Dice of each group, then IoU of each group: values and members, shape `(n, 2 G)`."""
    areas = (view.overlap, view.predicted_area, view.true_area)
    members = view.members & view.marked[:, None]
    columns = [
        np.repeat(values[:, None], len(view.groups), axis=1)
        for values in (dice_per_image(*areas), iou_per_image(*areas))
    ]
    return np.concatenate(columns, axis=1), np.concatenate([members, members], axis=1)


def _keys(view: MaskView) -> list[Key]:
    return [(group, metric) for metric in ("dice", "iou") for group in view.groups]
