"""Hand-worked numbers and slow derivations of the four losses, and their degenerate cases."""

import math

import pytest
import torch

from explainer.errors import ConfigError, NumericalError, ShapeError
from explainer.losses.area import area_bound_loss, bound_penalty, mask_area
from explainer.losses.base import Explanation, build_terms, total_loss
from explainer.losses.classification import classification_loss
from explainer.losses.entropy import entropy_loss
from explainer.losses.total_variation import total_variation


def test_classification_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    # sigmoid = 1/2 and 3/4; targets 1 and 0: -(ln 1/2 + ln 1/4) / 2
    assert classification_loss(logits, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(-(math.log(0.5) + math.log(0.25)) / 2)
    # softmax = 1/4 and 3/4
    assert classification_loss(logits, torch.tensor([[1.0, 0.0]]), "multiclass").item() == pytest.approx(-math.log(0.25))


def test_entropy_by_hand():
    uniform = torch.zeros(2, 4, dtype=torch.float64)
    assert entropy_loss(uniform).item() == pytest.approx(-math.log(4) / 4)
    assert entropy_loss(uniform, "bernoulli").item() == pytest.approx(-math.log(2))
    certain = torch.tensor([[50.0, -50.0, -50.0]], dtype=torch.float64)
    assert entropy_loss(certain).item() == pytest.approx(0.0, abs=1e-12)
    mixed = torch.log(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64))
    assert entropy_loss(mixed).item() == pytest.approx((0.5 * math.log(0.5) + 0.5 * math.log(0.25)) / 3)


def test_entropy_survives_half_precision():
    logits = torch.tensor([[80.0, -80.0, 0.0]], dtype=torch.float16, requires_grad=True)
    for kind in ("softmax", "bernoulli"):
        (grad,) = torch.autograd.grad(entropy_loss(logits, kind), logits)
        assert torch.isfinite(grad).all()


def slow_bound(mask, low, high):
    """Eqs. 4 and 5 with a sort and a loop."""
    q = sorted(mask.flatten().tolist(), reverse=True)
    Z = len(q)
    total = 0.0
    for i, value in enumerate(q):
        if i < math.floor(Z * low):
            total += 1 - value
        if i >= math.floor(Z * high):
            total += value
    return total / Z


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.3), (0.0, 0.3), (0.2, 0.2), (0.0, 0.0), (1.0, 1.0), (0.3, 1.0)])
def test_bound_against_loop(low, high):
    masks = torch.rand(3, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.tensor([slow_bound(m, low, high) for m in masks], dtype=torch.float64)
    torch.testing.assert_close(bound_penalty(masks, low, high), expected)


def test_area_bound_reductions():
    g = torch.Generator().manual_seed(2)
    masks = torch.rand(2, 3, 4, 5, dtype=torch.float64, generator=g)
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    a, b, c = (slow_bound(m, 0.1, 0.4) for m in (masks[0, 0], masks[0, 1], masks[1, 2]))
    assert area_bound_loss(masks, targets, 0.1, 0.4, "mean").item() == pytest.approx(((a + b) / 2 + c) / 2)
    assert area_bound_loss(masks, targets, 0.1, 0.4, "sum").item() == pytest.approx((a + b + c) / 2)


def test_area_bound_without_labels_is_zero_with_gradient():
    masks = torch.rand(2, 3, 4, 4, requires_grad=True)
    value = area_bound_loss(masks, torch.zeros(2, 3), 0.05, 0.3)
    assert value.item() == 0 and torch.autograd.grad(value, masks)[0].abs().max() == 0


@pytest.mark.parametrize(("low", "high"), [(0.4, 0.3), (-0.1, 0.3), (0.1, 1.2)])
def test_area_bound_rule_in_message(low, high):
    with pytest.raises(ConfigError, match="0 <= min_area <= max_area <= 1"):
        bound_penalty(torch.rand(1, 4, 4), low, high)


def test_mask_area():
    assert mask_area(torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])).item() == 0.5


def test_total_variation_by_hand():
    mask = torch.tensor([[[0.0, 1.0, 0.0], [0.0, 0.0, 0.5]]])
    # vertical: 0, 1, .5; horizontal: 1, 1 / 0, .5 -> 4 over 6 pixels
    assert total_variation(mask).item() == pytest.approx(4 / 6)
    # reflect: the last row's vertical differences (1.5) and the last column's horizontal ones (1.5) once more
    assert total_variation(mask, "reflect").item() == pytest.approx(7 / 6)
    assert total_variation(mask, power=2).item() == pytest.approx((1 + 0.25 + 1 + 1 + 0.25) / 6)
    assert total_variation(torch.full((2, 5, 5), 0.3)).item() == 0


def test_total_variation_rejects_channel_axis():
    with pytest.raises(ShapeError, match="drop the channel axis"):
        total_variation(torch.rand(2, 1, 8, 8))


def explanation(**changes):
    masks = torch.full((2, 3, 4, 4), 0.5)
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    base = {
        "images": torch.rand(2, 3, 4, 4),
        "targets": targets,
        "class_masks": masks,
        "target_mask": masks[:, 0],
        "non_target_mask": masks[:, 1],
        "logits_masked": torch.zeros(2, 3),
        "logits_inverse": torch.zeros(2, 3),
        "shown": targets,
        "task": "multilabel",
        "explanandum": None,
        "generators": [torch.Generator(), torch.Generator()],
        "progress": 0.0,
        "ids": ("first", "second"),
    }
    return Explanation(**{**base, **changes})


def test_total_is_the_weighted_sum():
    terms = build_terms({"classification": {"weight": 2.0}, "entropy": {"weight": 3.0}, "target_area": {"weight": 0.5}})
    total, values = total_loss(terms, explanation())
    assert values["classification"].item() == pytest.approx(math.log(2))
    assert total.item() == pytest.approx(2 * math.log(2) + 3 * (-math.log(3) / 3) + 0.25)


def test_entropy_of_one_class_is_that_of_its_probability():
    """sigmoid = 3/4; the softmax of one logit would be 0 for every mask."""
    one = torch.ones(2, 1)
    e = explanation(logits_inverse=torch.full((2, 1), math.log(3)), shown=one, targets=one)
    expected = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert total_loss(build_terms({"entropy": {}}), e)[0].item() == pytest.approx(expected, rel=1e-5)


def test_what_remains_is_a_class_without_a_region():
    """-log of the summed probability of those classes on the inverse image, by hand; an image without a shown class adds 0."""
    terms = build_terms({"remainder": {}})
    inverse = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    shown = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    free = torch.tensor([False, True, True])
    e = explanation(task="multiclass", logits_inverse=inverse, shown=shown, targets=shown, no_region=free)
    expected = -math.log((1 + math.e) / (math.e**2 + 1 + math.e)) / 2
    assert total_loss(terms, e)[0].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match=r"data\.options\.no_region"):
        total_loss(terms, explanation(task="multiclass"))


def test_a_class_without_a_region_is_not_asked_of_a_mask():
    terms = build_terms({"classification": {}})
    logits = torch.tensor([[9.0, 9.0, -9.0], [-9.0, -9.0, 9.0]])
    last = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    free = torch.tensor([False, False, True])
    assert total_loss(terms, explanation(logits_masked=logits, shown=last, no_region=free))[0].item() < 1e-3
    assert total_loss(terms, explanation(logits_masked=logits, shown=last))[0].item() > 1


def test_schedule_interpolates():
    (term,) = build_terms({"entropy": {"weight": [[0.0, 0.0], [0.5, 1.0], [1.0, 3.0]]}}).values()
    assert [term.weight_at(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0, 2.0)] == [0.0, 0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("weight", [[[0.5, 1.0], [0.5, 2.0]], -1, [[0.0, 1.0], [1.0, -0.1]], math.nan, math.inf, [], "much"], ids=str)
def test_weights_are_at_least_0_and_schedules_rise(weight):
    with pytest.raises(ConfigError, match=r"losses\.entropy\.weight must be a finite number of at least 0.*received"):
        build_terms({"entropy": {"weight": weight}})


def test_entropy_counts_only_images_shown_in_full():
    targets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    shown = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    (term,) = build_terms({"entropy": {}}).values()
    assert term.value(explanation(targets=targets, shown=shown, logits_inverse=logits)).item() == pytest.approx(-math.log(3) / 3 / 2)


def test_remainder_wants_the_hidden_labels_and_no_shown_one():
    targets = torch.tensor([[1.0, 1.0, 0.0]])
    shown = torch.tensor([[1.0, 0.0, 0.0]])
    (term,) = build_terms({"remainder": {}}).values()
    right = term.value(explanation(targets=targets, shown=shown, logits_inverse=torch.tensor([[-9.0, 9.0, -9.0]])))
    wrong = term.value(explanation(targets=targets, shown=shown, logits_inverse=torch.tensor([[9.0, -9.0, -9.0]])))
    assert right < 0.001 and wrong > 5


def test_non_finite_names_term_and_images():
    terms = build_terms({"classification": {}, "target_area": {}})
    bad = torch.tensor([[float("nan"), 0.0, 0.0]] * 2)
    with pytest.raises(NumericalError, match=r"classification.*first, second"):
        total_loss(terms, explanation(logits_masked=bad))
