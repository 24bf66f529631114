"""Distillation by hand, against loops, and its unknown and absent classes."""

import math

import pytest
import torch

from explainer.errors import ConfigError, ShapeError
from explainer.losses.base import build_terms, total_loss
from explainer.losses.distillation import distillation_loss, map_distance
from tests.unit.losses.test_paper_losses import explanation

NAN = float("nan")


def test_distances_by_hand():
    s = torch.tensor([[[0.5, 1.0]]], dtype=torch.float64)
    t = torch.tensor([[[1.0, 0.75]]], dtype=torch.float64)
    assert map_distance(s, t, "mse").item() == pytest.approx((0.25 + 0.0625) / 2)
    assert map_distance(s, t, "dice").item() == pytest.approx(1 - 2 * (0.5 + 0.75) / (1.25 + 1 + 0.5625), abs=1e-6)
    assert map_distance(s, t, "jaccard").item() == pytest.approx(1 - (0.5 + 0.75) / (1 + 1), abs=1e-6)
    s = torch.tensor([[[0.5, 0.2]]], dtype=torch.float64)
    t = torch.tensor([[[1.0, 0.6]]], dtype=torch.float64)
    kl = 0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8)
    assert map_distance(s, t, "bce").item() == pytest.approx((math.log(2) + kl) / 2)


@pytest.mark.parametrize("kind", ["bce", "mse", "dice", "jaccard"])
def test_a_copy_has_distance_and_gradient_zero_and_a_step_away_is_worse(kind):
    t = torch.rand(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    s = t.clone().requires_grad_()
    distance = map_distance(s, t, kind)
    assert distance.abs().max() < 1e-9
    assert torch.autograd.grad(distance.sum(), s)[0].abs().max() < 1e-6
    (slope,) = torch.autograd.grad(map_distance(s + 0.05, t, kind).sum(), s)
    assert (map_distance(t + 0.05, t, kind) > 1e-5).all() and slope.sum() > 0


@pytest.mark.parametrize(
    ("kind", "values"), [("dice", (5 / 6, (12 / 13 + 8 / 9) / 2, 5 / 6)), ("jaccard", (3 / 4, (3 / 4 + 2 / 3) / 2, 3 / 4))]
)
def test_where_two_maps_disagree_dice_wants_grey_and_jaccard_a_decision(kind, values):
    maps = torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]], dtype=torch.float64)
    for grey, value in zip((0.0, 0.5, 1.0), values, strict=True):
        masks = torch.tensor([[[1.0, grey]]], dtype=torch.float64).expand(2, 1, 2)
        assert 1 - map_distance(masks, maps, kind).mean().item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("kind", ["bce", "dice", "jaccard"])
def test_hard_masks_keep_finite_gradients(kind):
    s = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]], requires_grad=True)
    (grad,) = torch.autograd.grad(map_distance(s, torch.tensor([[[1.0, 0.0, 0.0, 1.0]]]), kind).sum(), s)
    assert torch.isfinite(grad).all()
    zero = torch.zeros(1, 2, 2, requires_grad=True)
    assert map_distance(zero, torch.zeros(1, 2, 2), kind).item() == pytest.approx(0.0, abs=1e-6)


def test_unknown_maps_count_nowhere_and_absent_masks_go_to_zero():
    masks = torch.tensor([0.5, 0.4, 0.3, 0.2]).view(1, 4, 1, 1).repeat(1, 1, 2, 2).requires_grad_()
    teacher = torch.tensor([1.0, NAN, NAN, 0.6]).view(1, 4, 1, 1).repeat(1, 1, 2, 2)
    targets = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    # class 0 known, class 1 present and unknown, class 2 absent, class 3 absent with a map of its own
    value = distillation_loss(masks, targets, teacher, "mse", absent=2.0)
    assert value.item() == pytest.approx((0.25 + 0.16) / 2 + 2 * 0.09)
    (grad,) = torch.autograd.grad(value, masks)
    assert grad[0, 1].abs().max() == 0
    assert (grad[0, 0] < 0).all() and (grad[0, 2] > 0).all() and (grad[0, 3] < 0).all()
    assert distillation_loss(masks, targets, teacher, "mse", absent=0.0).item() == pytest.approx((0.25 + 0.16) / 2)
    one_pixel = teacher.clone()
    one_pixel[0, 0, 0, 0] = NAN
    assert distillation_loss(masks, targets, one_pixel, "mse", absent=0.0).item() == pytest.approx(0.16)


def test_nothing_known_is_zero_with_a_gradient():
    masks = torch.rand(2, 3, 2, 2, requires_grad=True)
    value = distillation_loss(masks, torch.ones(2, 3), torch.full((2, 3, 2, 2), NAN))
    assert value.item() == 0 and torch.autograd.grad(value, masks)[0].abs().max() == 0


@pytest.mark.parametrize("kind", ["dice", "jaccard"])
def test_ratios_of_overlap_push_absent_masks_down(kind):
    masks = torch.full((1, 1, 2, 2), 0.5, requires_grad=True)
    value = distillation_loss(masks, torch.zeros(1, 1), torch.full((1, 1, 2, 2), NAN), kind)
    assert value.item() == pytest.approx(0.25) and (torch.autograd.grad(value, masks)[0] > 0).all()


def test_term_is_weighted_scheduled_and_says_what_it_needs():
    terms = build_terms({"distillation": {"weight": [[0.0, 2.0], [0.5, 0.0]], "kind": "mse"}, "target_area": {"weight": 1.0}})
    teacher = torch.full((2, 3, 4, 4), 1.0)
    total, values = total_loss(terms, explanation(teacher=teacher, progress=0.25))
    assert values["distillation"].item() == pytest.approx(0.25) and total.item() == pytest.approx(0.25 + 0.5)
    total, values = total_loss(terms, explanation(progress=0.5))
    assert "distillation" not in values and total.item() == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="needs teachers"):
        total_loss(terms, explanation(progress=0.0))
    with pytest.raises(ConfigError, match="kind must be one of bce, mse, dice, jaccard"):
        build_terms({"distillation": {"kind": "l1"}})
    with pytest.raises(ShapeError, match="like class_masks"):
        distillation_loss(torch.rand(1, 2, 3, 3), torch.ones(1, 2), torch.rand(1, 2, 4, 4))
