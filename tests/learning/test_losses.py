"""The masked multi-task loss against hand-computed values and torch's own losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from medvision_ray.config import LossConfig
from medvision_ray.learning.losses import MultiTaskLoss, balanced_class_weights, mask_loss
from medvision_ray.learning.model import HybridCNN, HybridOutput

NAN = float("nan")
NONE = torch.zeros(4, dtype=torch.bool)


def single(logits: Tensor, labels: list[int], weights: Tensor | None = None, **options: object) -> Tensor:
    loss = MultiTaskLoss(LossConfig.model_validate(options), weights, multi_label=False)
    return loss(HybridOutput(logits, None), torch.tensor(labels), None, None, NONE[: len(labels)]).classification


def test_single_label_is_torchs_weighted_cross_entropy_of_the_labelled_samples() -> None:
    logits, weights = torch.randn(4, 3), torch.tensor([0.5, 1.0, 2.0])
    got = single(logits, [2, -1, 0, -1], weights, label_smoothing=0.1)
    kept = logits[[0, 2]]
    torch.testing.assert_close(got, F.cross_entropy(kept, torch.tensor([2, 0]), weights, label_smoothing=0.1))


def test_single_label_by_hand() -> None:
    got = single(torch.tensor([[0.0, 0.0], [5.0, 5.0]]), [0, 1])
    assert got.item() == pytest.approx(math.log(2))


def test_an_unlabelled_sample_gets_no_gradient_from_the_classes() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    single(logits, [1, -1]).backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().sum() == 0


def test_blank_findings_add_nothing_and_the_rest_is_torchs_bce() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    targets = torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, 1.0]])
    weights = torch.tensor([2.0, 3.0, 4.0])
    loss = MultiTaskLoss(LossConfig(), weights, multi_label=True)
    got = loss(HybridOutput(logits, None), torch.tensor([-1, -1]), targets, None, NONE[:2]).classification
    known = ~targets.isnan()
    expected = F.binary_cross_entropy_with_logits(logits[known], targets[known], pos_weight=weights.expand(2, 3)[known])
    torch.testing.assert_close(got, expected)
    got.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~known] == 0).all()


def findings(logits: Tensor, targets: Tensor, weights: Tensor | None = None, **options: object) -> Tensor:
    loss = MultiTaskLoss(LossConfig.model_validate(options), weights, multi_label=True)
    none = torch.full((len(logits),), -1)
    return loss(
        HybridOutput(logits, None), none, targets, None, torch.zeros(len(logits), dtype=torch.bool)
    ).classification


def test_asymmetric_loss_is_timms_over_what_is_known() -> None:
    logits = 4 * torch.randn(6, 3)
    targets = torch.randint(0, 2, (6, 3)).float()
    for gammas, margin in (((0.0, 4.0), 0.05), ((1.0, 2.0), 0.2), ((0.0, 0.0), 0.0)):
        theirs = AsymmetricLossMultiLabel(gamma_neg=gammas[1], gamma_pos=gammas[0], clip=margin)
        # One finding at a time: what it does with several depends on timm's version.
        terms = torch.stack(
            [theirs(x.view(1, 1), y.view(1, 1)) for x, y in zip(logits.ravel(), targets.ravel(), strict=True)]
        )
        options = {"classification": "asymmetric", "asymmetric_gammas": gammas, "asymmetric_margin": margin}
        torch.testing.assert_close(findings(logits, targets, **options), terms.mean())
        known = targets.clone()
        known[0] = NAN
        torch.testing.assert_close(findings(logits, known, **options), terms[3:].mean())


def test_focal_loss_of_findings_is_torchvisions_and_weights_count_positives() -> None:
    logits, targets = torch.randn(4, 2), torch.tensor([[1.0, 0.0], [0.0, NAN], [1.0, 1.0], [NAN, NAN]])
    weights = torch.tensor([3.0, 0.5])
    got = findings(logits, targets, weights, classification="focal", focal_gamma=1.5)
    known = ~targets.isnan()
    terms = sigmoid_focal_loss(logits[known], targets[known], alpha=-1, gamma=1.5)
    each = torch.where(targets[known] == 1, weights.expand(4, 2)[known], torch.tensor(1.0))
    torch.testing.assert_close(got, (terms * each).mean())


def test_weights_of_asymmetric_loss_count_positives() -> None:
    logits, targets = torch.randn(5, 2), torch.ones(5, 2)
    plain = [findings(logits[:, [k]], targets[:, [k]], classification="asymmetric") for k in (0, 1)]
    got = findings(logits, targets, torch.tensor([2.0, 4.0]), classification="asymmetric")
    torch.testing.assert_close(got, (2 * plain[0] + 4 * plain[1]) / 2)


def test_focal_loss_of_classes_is_by_hand_and_unlabelled_images_add_nothing() -> None:
    logits = torch.randn(4, 3)
    weights = torch.tensor([1.0, 2.0, 3.0])
    got = single(logits, [2, -1, 0, 1], weights, classification="focal", focal_gamma=2.0)
    true = logits[[0, 2, 3]].softmax(dim=1)[torch.arange(3), torch.tensor([2, 0, 1])]
    each = weights[[2, 0, 1]]
    torch.testing.assert_close(got, (each * (1 - true) ** 2 * -true.log()).sum() / each.sum())


@pytest.mark.parametrize("loss", ["focal", "asymmetric"])
@pytest.mark.parametrize("gammas", [(0.0, 0.5), (0.5, 1.0)])
def test_saturated_and_blank_findings_have_finite_gradients(loss: str, gammas: tuple[float, float]) -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0, 40.0]], requires_grad=True)
    for targets in ([1.0, 0.0, NAN, 0.0], [0.0, 1.0, NAN, 1.0], [NAN] * 4):
        options = {"classification": loss, "asymmetric_gammas": gammas, "focal_gamma": 1.0}
        got = findings(logits, torch.tensor([targets]), **options)
        assert torch.isfinite(got)
        (gradient,) = torch.autograd.grad(got, logits)
        assert torch.isfinite(gradient).all()
        assert gradient[0, 2] == 0


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_focal_classes_saturated_have_finite_gradients(loss: str) -> None:
    logits = torch.tensor([[300.0, -300.0], [0.0, 0.0], [-300.0, 300.0]], requires_grad=True)
    got = single(logits, [0, -1, 0], classification=loss)
    got.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[1].any()


def test_mask_loss_by_hand() -> None:
    # One image of two pixels, probabilities 0.5 and 0.5, truth 1 and 0:
    # entropy log 2; Dice (2 * 0.5 + 1) / (1 + 1 + 1) = 2 / 3.
    got = mask_loss(torch.zeros(1, 1, 2), torch.tensor([[[1, 0]]], dtype=torch.uint8), torch.tensor([True]))
    assert got.item() == pytest.approx(math.log(2) + 1 / 3)


def test_images_without_a_mask_add_nothing_and_get_no_gradient() -> None:
    logits = torch.randn(3, 8, 8, requires_grad=True)
    masks = torch.randint(0, 2, (3, 8, 8), dtype=torch.uint8)
    has_mask = torch.tensor([True, False, True])
    got = mask_loss(logits, masks, has_mask)
    alone = [mask_loss(logits[i : i + 1], masks[i : i + 1], has_mask[:1]) for i in (0, 2)]
    torch.testing.assert_close(got, torch.stack(alone).mean())
    got.backward()
    assert logits.grad is not None
    assert logits.grad[1].abs().sum() == 0
    assert logits.grad[0].abs().sum() > 0


def test_masks_of_0_and_255_are_masks_of_0_and_1() -> None:
    logits, masks = torch.randn(1, 8, 8), torch.randint(0, 2, (1, 8, 8), dtype=torch.uint8)
    has_mask = torch.tensor([True])
    torch.testing.assert_close(mask_loss(logits, masks * 255, has_mask), mask_loss(logits, masks, has_mask))


def test_the_mask_loss_gradient_is_the_numeric_gradient() -> None:
    masks = torch.randint(0, 2, (2, 3, 3), dtype=torch.uint8)
    has_mask = torch.tensor([True, True])
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mask_loss(x, masks, has_mask), (logits,))


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    config = LossConfig(classification_weight=0.5, segmentation_weight=3.0)
    output = HybridOutput(torch.randn(2, 3), torch.randn(2, 8, 8))
    masks = torch.ones(2, 8, 8, dtype=torch.uint8)
    parts = MultiTaskLoss(config, None, False)(output, torch.tensor([0, 1]), None, masks, torch.tensor([True, True]))
    torch.testing.assert_close(parts.total, 0.5 * parts.classification + 3.0 * parts.segmentation)


@pytest.mark.parametrize(
    ("multi_label", "loss"),
    [(False, "cross_entropy"), (False, "focal"), (True, "cross_entropy"), (True, "focal"), (True, "asymmetric")],
)
def test_a_batch_without_labels_and_masks_has_zero_loss_and_zero_gradients_everywhere(
    multi_label: bool, loss: Any, small_model: Callable[..., HybridCNN]
) -> None:
    model = small_model()
    output = model(torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8))
    targets = torch.full((2, 3), NAN) if multi_label else None
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    config = LossConfig(classification=loss)
    parts = MultiTaskLoss(config, None, multi_label)(output, torch.tensor([-1, -1]), targets, masks, NONE[:2])
    assert [part.item() for part in parts] == [0.0, 0.0, 0.0]
    parts.total.backward()
    gradients = [value.grad for value in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_missing_mask_tensor_keeps_the_decoder_in_the_graph() -> None:
    mask_logits = torch.randn(2, 8, 8, requires_grad=True)
    output = HybridOutput(None, mask_logits)
    MultiTaskLoss(LossConfig(), None, False)(output, torch.tensor([-1, -1]), None, None, NONE[:2]).total.backward()
    assert mask_logits.grad is not None
    assert not mask_logits.grad.any()


def test_bfloat16_outputs_under_autocast_are_computed_in_float32() -> None:
    output = HybridOutput(torch.randn(2, 3).bfloat16(), torch.randn(2, 8, 8).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = torch.ones(2, 8, 8, dtype=torch.uint8)
        parts = MultiTaskLoss(LossConfig(), None, False)(output, torch.tensor([0, 1]), None, masks, ~NONE[:2])
    assert {part.dtype for part in parts} == {torch.float32}
    assert output.logits is not None
    torch.testing.assert_close(parts.classification, F.cross_entropy(output.logits.float(), torch.tensor([0, 1])))


def test_balanced_weights_are_scikit_learns() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    got = balanced_class_weights(torch.tensor([*labels.tolist(), -1, -1]), 3)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_balanced_weights_of_findings_are_negatives_over_positives() -> None:
    targets = torch.tensor([[1.0, 0.0, NAN], [0.0, 0.0, 1.0], [0.0, NAN, 1.0], [0.0, 0.0, 0.0]])
    assert balanced_class_weights(targets, 3).tolist() == [3.0, 1.0, 0.5]


def test_a_finding_that_is_never_known_to_be_absent_keeps_its_loss() -> None:
    targets = torch.tensor([[1.0, NAN], [1.0, 0.0], [NAN, 0.0]])  # always there; never there
    assert balanced_class_weights(targets, 2).tolist() == [1.0, 1.0]
