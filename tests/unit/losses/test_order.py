"""The order of pixels by hand, against a loop, and what it leaves alone."""

import math

import pytest
import torch

from explainer.errors import ConfigError, ShapeError
from explainer.losses.base import build_terms, total_loss
from explainer.losses.order import order_loss
from tests.unit.losses.test_paper_losses import explanation

NAN = float("nan")


def every_pair(pixels):
    first, second = torch.meshgrid(torch.arange(pixels), torch.arange(pixels), indexing="ij")
    return first.reshape(1, -1), second.reshape(1, -1)


def test_by_hand():
    """Pixels 0 and 1 inside, 2 and 3 outside: two pairs count, those across the edge do not."""
    S = torch.tensor([[1.0, 2.0, -1.0, -3.0]])
    t = torch.tensor([[0.9, 0.6, 0.6, 0.0]])
    expected = (math.log(1 + math.e) + math.log(1 + math.exp(-2))) / 2
    assert order_loss(S, t, *every_pair(4)).item() == pytest.approx(expected, abs=1e-6)


def test_against_a_loop_over_pairs():
    g = torch.Generator().manual_seed(0)
    S, t = torch.randn(3, 20, generator=g), torch.rand(3, 20, generator=g)
    first, second = torch.randint(20, (2, 3, 50), generator=g)
    for n, found in enumerate(order_loss(S, t, first, second).tolist()):
        total = count = 0.0
        for i, j in zip(first[n].tolist(), second[n].tolist(), strict=True):
            difference = float(t[n, i] - t[n, j])
            if (S[n, i] >= 0) == (S[n, j] >= 0) and difference:
                high, low = (i, j) if difference > 0 else (j, i)
                total += math.log(1 + math.exp(float(S[n, low] - S[n, high])))
                count += 1
        assert found == pytest.approx(total / count, abs=1e-5)


def test_flat_masks_cost_log_2_sorted_ones_little_and_flat_maps_nothing():
    t = torch.linspace(0, 1, 10)[None]
    pairs = every_pair(10)
    assert order_loss(torch.full((1, 10), 2.0), t, *pairs).item() == pytest.approx(math.log(2), abs=1e-6)
    assert order_loss(200 * t + 1, t, *pairs).item() < 1e-3 < 5 < order_loss(201 - 200 * t, t, *pairs).item()
    assert order_loss(t, torch.full((1, 10), 0.5), *pairs).item() == 0
    with pytest.raises(ShapeError, match="alike"):
        order_loss(t, t, pairs[0], pairs[1][:, :3])


def test_descent_sorts_the_pixels_of_a_side_and_moves_none_across_by_a_pair_across():
    """Target orders against the mask: both sides end in its order, the side of each pixel stays."""
    t = torch.tensor([0.1, 0.5, 0.9, 0.2, 0.6, 0.95])
    S = torch.tensor([3.0, 2.0, 1.0, -1.0, -2.0, -3.0], requires_grad=True)
    optimizer = torch.optim.SGD([S], 0.3)
    for _ in range(200):
        optimizer.zero_grad()
        order_loss(S[None], t[None], *every_pair(6)).sum().backward()
        assert S.grad[:3].sum().abs() < 1e-6 and S.grad[3:].sum().abs() < 1e-6, "a side's mean stays"
        optimizer.step()
        if (S[:3] < 0).any() or (S[3:] >= 0).any():
            break
    assert S[0] < S[1] < S[2] and S[3] < S[4] < S[5]


def test_the_term_reads_the_known_maps_of_present_classes_and_repeats_itself():
    masks = torch.rand(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    order = torch.rand(2, 2, 4, 4)
    order[0, 1] = order[1] = NAN

    def term(maps, order_logits=None, **options):
        terms = build_terms({"order": options})
        e = explanation(class_masks=masks, targets=torch.eye(2), order=maps, order_logits=order_logits)
        e.generators = [torch.Generator().manual_seed(s) for s in (1, 2)]
        return total_loss(terms, e)[0]

    value = term(order, pairs=64)
    assert value == term(order, pairs=64) and 0 < value < 5
    (gradient,) = torch.autograd.grad(value, masks)
    assert gradient[0, 0].abs().max() > 0 and gradient[0, 1].abs().max() == 0 and gradient[1].abs().max() == 0
    assert term(torch.full_like(order, NAN)) == 0
    logits = torch.randn(2, 2, 4, 4).requires_grad_()
    apart = term(order, order_logits=logits)
    assert apart != value and torch.autograd.grad(apart, (masks, logits), allow_unused=True)[0] is None, "only the order's own logits"
    with pytest.raises(ConfigError, match="teaches: order"):
        term(None)
    with pytest.raises(ConfigError, match=r"pairs must be at least 1, received 0"):
        build_terms({"order": {"pairs": 0}})
