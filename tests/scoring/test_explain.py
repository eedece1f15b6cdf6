"""Grad-CAM against the same worked out otherwise, and against maps that cannot be right."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from skimage.draw import polygon2mask
from torch import Tensor, nn

from medvision_ray.bundle import Bundle
from medvision_ray.config import ModelConfig, PreprocessConfig
from medvision_ray.errors import MedVisionError
from medvision_ray.imaging.grid import fit
from medvision_ray.learning.mask_pooling import MaskGuidedHead
from medvision_ray.learning.model import HybridCNN, build_model
from medvision_ray.scoring.explain import grad_cam, mask_outlines, to_source
from medvision_ray.scoring.folding import fold_batch_norms
from medvision_ray.scoring.predictor import Predictor

SIDE = 64


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(seed: int = 0, **options: object) -> HybridCNN:
    torch.manual_seed(seed)
    config = ModelConfig.model_validate(
        {"encoder": "tu-resnet10t", "decoder_channels": (16, 16, 8, 8, 8), "classification": True, **options}
    )
    return build_model(config, PreprocessConfig(size=(SIDE, SIDE)), 3, for_training=False).eval()


def linear_of(model: HybridCNN) -> nn.Linear:
    """The layer that gives the logits."""
    assert model.classification_head is not None
    return next(part for part in model.classification_head.modules() if isinstance(part, nn.Linear))


def frames(count: int = 3, seed: int = 1) -> np.ndarray:
    """Smooth random pictures."""
    coarse = np.random.default_rng(seed).random((count, 8, 8)).astype(np.float32) * 255
    return np.stack([cv2.resize(each, (SIDE, SIDE)).astype(np.uint8) for each in coarse])[:, None]


def by_finite_differences(model: HybridCNN, picture: np.ndarray, index: int) -> np.ndarray:
    """The map without autograd, in float64: how far the logit falls when the features of a place go.

    The heads are linear in the features, so that is what a place adds. The mask that guides the pooling stays as it is:
    it is an input of the head, not a part of what it explains.
    """
    model = model.double()
    head = model.classification_head
    assert head is not None
    with torch.no_grad():
        features = model.encode(torch.from_numpy(picture[None]))
        mask_logits = model.score_features(features).mask_logits
        rows, columns = features[-1].shape[2:]

        def logit(deepest: Tensor) -> Tensor:
            if isinstance(head, MaskGuidedHead):
                found: Tensor = head([*features[:-1], deepest], mask_logits)[0, index]
            else:
                found = head(deepest)[0, index]
            return found

        coarse = torch.zeros(rows, columns, dtype=torch.float64)
        for row, column in np.ndindex(rows, columns):
            without = features[-1].clone()
            without[:, :, row, column] = 0
            coarse[row, column] = logit(features[-1]) - logit(without)
        coarse = coarse.clamp(min=0)
        grown = F.interpolate(coarse[None, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0, 0].numpy()
    return grown / grown.max() if grown.max() > 0 else grown


@pytest.mark.parametrize("options", [{}, {"pooling": "mask_guided"}, {"segmentation": False}])
def test_the_map_is_what_each_place_adds_to_the_logit(options: dict[str, object]) -> None:
    pictures = frames(2)
    model, exact = network(**options), network(**options)
    found = 0
    for index in range(3):
        maps = grad_cam(model, pictures, index)
        assert maps.shape == (2, SIDE, SIDE)
        assert maps.dtype == np.float32
        for place, picture in enumerate(pictures):
            np.testing.assert_allclose(maps[place], by_finite_differences(exact, picture, index), atol=1e-4)
            found += maps[place].max() == 1
    assert found >= 2


def test_of_a_plain_head_it_is_grad_cam_and_the_class_activation_map() -> None:
    """After an average pooling and a linear layer Grad-CAM is CAM (Selvaraju 2017, section 3.1)."""
    model, pictures = network(segmentation=False), frames()
    with torch.no_grad():
        deepest = model.encode(torch.from_numpy(pictures))[-1]
        coarse = torch.einsum("k,nkhw->nhw", linear_of(model).weight[2], deepest).clamp(min=0)
        grown = F.interpolate(coarse[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    expected = grown / grown.amax(dim=(1, 2), keepdim=True)
    np.testing.assert_allclose(grad_cam(model, pictures, 2), expected.numpy(), atol=1e-5)


class _Corner(nn.Module):
    """Features that see the upper left quarter of the picture alone."""

    def forward(self, x: Tensor) -> list[Tensor]:
        seen = torch.zeros_like(x)
        seen[..., : SIDE // 2, : SIDE // 2] = x[..., : SIDE // 2, : SIDE // 2].clamp(min=0)
        return [x, F.avg_pool2d(seen, 8).expand(-1, 4, -1, -1)]


class _Average(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        mean = features.mean(dim=(2, 3))
        return torch.stack([mean.sum(dim=1), -mean.sum(dim=1)], dim=1)


def corner_model() -> HybridCNN:
    model = network(segmentation=False)
    model.encoder, model.classification_head = _Corner(), _Average()
    return model


def test_a_model_that_looks_at_one_corner_has_its_map_there() -> None:
    picture = np.zeros((1, 1, SIDE, SIDE), np.uint8)
    picture[..., 8:16, 8:16] = 255
    picture[..., 40:60, 30:60] = 255
    for_it, against_it = (grad_cam(corner_model(), picture, index)[0] for index in (0, 1))
    assert np.unravel_index(for_it.argmax(), for_it.shape) in {(r, c) for r in range(8, 16) for c in range(8, 16)}
    assert for_it.max() == 1
    assert for_it[SIDE // 2 + 8 :].max() == for_it[:, SIDE // 2 + 8 :].max() == 0
    assert against_it.max() == 0  # nothing there speaks for the other class


def test_a_mirrored_view_is_turned_back() -> None:
    plain, flipped = network(segmentation=False), network(segmentation=False, test_time_flips=("horizontal",))
    pictures = frames()
    with torch.no_grad():
        raw = []
        for seen in (pictures, pictures[..., ::-1].copy()):
            deepest = plain.encode(torch.from_numpy(seen))[-1]
            raw.append(torch.einsum("k,nkhw->nhw", linear_of(plain).weight[0], deepest))
        mean = ((raw[0] + raw[1].flip(-1)) / 2).clamp(min=0)
        grown = F.interpolate(mean[:, None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[:, 0]
    expected = grown / grown.amax(dim=(1, 2), keepdim=True)
    np.testing.assert_allclose(grad_cam(flipped, pictures, 0), expected.numpy(), atol=1e-5)


def pictures_with_a_square(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise, every second picture with a bright square of 14 pixels: pixels, labels, and where the squares are."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(80, 20, (count, 1, SIDE, SIDE))
    labels, places = np.arange(count) % 2, np.zeros((count, SIDE, SIDE), bool)
    for index in np.flatnonzero(labels):
        top, left = rng.integers(0, SIDE - 14, 2)
        places[index, top : top + 14, left : left + 14] = True
    pixels[:, 0][places] += 70
    return pixels.clip(0, 255).astype(np.uint8), labels, places


@pytest.fixture(scope="module")
def learnt() -> HybridCNN:
    """A network that has learnt to see the squares; its deepest features are 8 x 8."""
    model = network(segmentation=False, decoder_channels=(16, 16, 8)).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(20):
        pixels, labels, _ = pictures_with_a_square(24, step)
        loss = F.cross_entropy(model(torch.from_numpy(pixels)).logits, torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def share_inside(maps: np.ndarray, places: np.ndarray) -> float:
    """Share of the maps whose strongest place is in a square: the pointing game (Zhang et al. 2016)."""
    return float(np.mean([where.flat[each.argmax()] for each, where in zip(maps, places, strict=True)]))


def test_the_map_points_at_what_was_learnt_and_goes_with_it(learnt: HybridCNN) -> None:
    """A map that stays when what was learnt is replaced shows the picture and not the model (Adebayo et al. 2018)."""
    pixels, labels, places = pictures_with_a_square(48, 1000)
    pixels, places = pixels[labels == 1], places[labels == 1]
    before = grad_cam(learnt, pixels, 1)
    assert share_inside(before, places) > 0.9
    assert share_inside(grad_cam(learnt, pixels, 0), places) < 0.2  # the square does not speak for "no square"
    random = copy.deepcopy(learnt)
    torch.manual_seed(9)
    for layer in random.encoder.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    after = grad_cam(random, pixels, 1)
    assert share_inside(after, places) < 0.5
    alike = [spearmanr(one.ravel(), other.ravel())[0] for one, other in zip(before, after, strict=True) if other.any()]
    assert not alike or np.mean(alike) < 0.5


def test_a_folded_network_has_the_maps_of_the_trained_one() -> None:
    model, pictures = network(pooling="mask_guided"), frames()
    folded = fold_batch_norms(model, torch.from_numpy(pictures[:1])).network
    assert folded is not model
    np.testing.assert_allclose(grad_cam(folded, pictures, 1), grad_cam(model, pictures, 1), atol=1e-3)


@pytest.mark.parametrize("guarded", [torch.inference_mode, torch.no_grad])
def test_the_predictor_explains_what_it_predicts(bundle: Bundle, guarded: type[torch.no_grad]) -> None:
    predictor, pictures = Predictor(bundle, "float32", "cpu"), frames(10)
    before = predictor.predict(pictures)
    assert before.probabilities is not None
    with guarded():
        maps = predictor.explain(pictures)
    np.testing.assert_array_equal(maps, predictor.explain(pictures, before.probabilities.argmax(axis=1)))
    np.testing.assert_allclose(maps, grad_cam(bundle.build_model(), pictures), atol=1e-3)
    after = predictor.predict(pictures)
    assert after.probabilities is not None
    np.testing.assert_array_equal(after.probabilities, before.probabilities)


def test_several_networks_are_explained_together() -> None:
    one, other, pictures = network(0), network(1), frames()
    both = grad_cam(nn.ModuleList([one, other]), pictures, 0)
    mean = (grad_cam(one, pictures, 0) + grad_cam(other, pictures, 0)) / 2
    np.testing.assert_allclose(both, mean / mean.max(axis=(1, 2), keepdims=True), atol=1e-6)


def test_no_input_is_no_map() -> None:
    assert grad_cam(network(), np.empty((0, 1, SIDE, SIDE), np.uint8)).shape == (0, SIDE, SIDE)


@pytest.mark.parametrize("classes", [3, -1, np.array([0, 1, 7])])
def test_a_class_that_is_not_there_is_refused(classes: int | np.ndarray) -> None:
    with pytest.raises(MedVisionError, match="3 classes"):
        grad_cam(network(), frames(), classes)


def test_a_model_without_classes_is_refused() -> None:
    with pytest.raises(MedVisionError, match="classification head"):
        grad_cam(network(classification=False), frames())


@pytest.mark.parametrize("shape", [(100, 40), (30, 90), (64, 64)])
def test_a_map_goes_back_to_the_images_own_grid(shape: tuple[int, int]) -> None:
    transform = fit(shape, (SIDE, SIDE), keep_aspect=True)
    row, column = shape[0] * 3 // 4, shape[1] // 4
    image = np.zeros(shape, np.uint8)
    image[row - 3 : row + 3, column - 3 : column + 3] = 1
    placed = transform.mask_to_model(image).astype(np.float32)
    placed[: transform.top] = placed[:, : transform.left] = 1  # padding, which is no part of the image
    back = to_source(placed, transform)
    assert back.shape == shape
    assert (back.min(), back.max()) == (0, 1)
    middle = np.average(np.indices(shape).reshape(2, -1), axis=1, weights=back.ravel())
    np.testing.assert_allclose(middle, (row, column), atol=2)
    with pytest.raises(ValueError, match="shape"):
        to_source(np.zeros((3, 3), np.float32), transform)


def drawn(outlines: Sequence[Sequence[tuple[int, int]]], shape: tuple[int, int]) -> np.ndarray:
    """Filled by scikit-image, outline by outline, holes taken out by parity; the outlines' own pixels are inside."""
    inside, edge = np.zeros(shape, bool), np.zeros(shape, np.uint8)
    for outline in outlines:
        if len(outline) > 2:
            inside ^= polygon2mask(shape, [(row, column) for column, row in outline])
        cv2.polylines(edge, [np.array(outline, np.int32)], True, 1)
    return inside | (edge > 0)


def test_outlines_enclose_the_mask_and_its_holes() -> None:
    mask = np.zeros((50, 70), bool)
    mask[5:30, 10:40] = True
    mask[12:20, 18:30] = False
    mask[40, 60] = True
    outlines = mask_outlines(mask)
    assert len(outlines) == 3
    assert [(60, 40)] in outlines
    np.testing.assert_array_equal(drawn(outlines, mask.shape), mask)
    assert mask_outlines(np.zeros((4, 4), bool)) == []
