"""Coalition regression: its minimum is the Shapley values (enumerated by permutations), and no gradient enters the classifier."""

import itertools
import math

import pytest
import torch
from torch import nn

import explainer
from explainer.errors import ConfigError, ShapeError
from explainer.losses.base import build_terms
from explainer.losses.coalition import coalition_loss, efficient, sample_coalitions
from tests.unit.losses.test_paper_losses import explanation


def game(z):
    """A game of four players with an interaction of three: v({}) = 0.5."""
    a, b, c, d = z
    return 0.5 + 2 * a - b + 3 * a * b * c + d * c


def shapley_by_permutations():
    phi = [0.0] * 4
    for order in itertools.permutations(range(4)):
        z = [0, 0, 0, 0]
        for player in order:
            before = game(z)
            z[player] = 1
            phi[player] += (game(z) - before) / math.factorial(4)
    return torch.tensor(phi, dtype=torch.float64)


def test_minimum_is_the_shapley_values():
    """All coalitions with the kernel's weights, by repetition: sizes 1 and 3 have total weight 1/3 (four sets), size 2 1/4 (six sets)."""
    sets = []
    for z in itertools.product([0.0, 1.0], repeat=4):
        size = int(sum(z))
        if 0 < size < 4:
            sets += [z] * {1: 2, 2: 1, 3: 2}[size]  # 1/(3*4) : 1/(4*6) = 2 : 1
    coalitions = torch.tensor(sets, dtype=torch.float64)[None]
    scores = torch.tensor([[game(z) for z in sets]], dtype=torch.float64)
    empty, gap = torch.tensor([0.5], dtype=torch.float64), torch.tensor([game([1, 1, 1, 1]) - 0.5], dtype=torch.float64)
    phi = shapley_by_permutations()[None]
    assert phi.sum().item() == pytest.approx(gap.item())

    def loss(values):
        return coalition_loss(efficient(values, gap, "additive"), coalitions, scores, empty)

    values = phi.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(values), values)
    assert grad.abs().max() < 1e-12
    for k in range(4):
        moved = phi.clone()
        moved[0, k] += 0.1
        assert loss(moved) > loss(phi) + 1e-4
    shifted = phi + 7.0  # the efficiency gap takes a common offset away
    torch.testing.assert_close(loss(shifted), loss(phi))


def test_efficiency_by_hand():
    values, gap = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([2.0, 1.0])
    torch.testing.assert_close(efficient(values, gap, "share"), torch.tensor([[0.5, 1.5], [0.5, 0.5]]))
    torch.testing.assert_close(efficient(values, gap, "additive"), torch.tensor([[0.0, 2.0], [0.5, 0.5]]))
    assert efficient(values, gap, "none") is values
    with pytest.raises(ConfigError, match="efficiency must be one of"):
        efficient(values, gap, "half")


def test_loss_by_hand():
    value = coalition_loss(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1.5, 1.0]]), torch.tensor([0.25])
    )
    assert value.item() == pytest.approx(((1.5 - 1.25) ** 2 + (1.0 - 2.25) ** 2) / 2)
    with pytest.raises(ShapeError, match="must agree"):
        coalition_loss(torch.ones(1, 2), torch.ones(1, 3, 4), torch.ones(1, 3), torch.ones(1))


def test_coalitions_follow_the_kernel():
    z = sample_coalitions(20000, 4, torch.Generator().manual_seed(0), paired=False)
    counts = torch.stack([(z.sum(1) == k).float().mean() for k in range(5)])
    expected = torch.tensor([0, 1 / 3, 1 / 4, 1 / 3, 0]) / (1 / 3 + 1 / 4 + 1 / 3)
    torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.full((4,), 0.5), atol=0.02, rtol=0)
    paired = sample_coalitions(7, 9, torch.Generator().manual_seed(0))
    assert paired.shape == (7, 9) and torch.equal(paired[0] + paired[1], torch.ones(9))
    with pytest.raises(ConfigError, match="at least 2 cells"):
        sample_coalitions(3, 1, torch.Generator())


class Corner(nn.Module):
    """Logit of class 0: eight times the mean of the top left quarter, less 4; class 1 likewise bottom right. Counts its images."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.seen += len(x)
        half = x.shape[-1] // 2
        return torch.stack([x[..., :half, :half].mean((1, 2, 3)), x[..., half:, half:].mean((1, 2, 3))], dim=1) * 8 - 4


def scene(masks, targets):
    model = explainer.Explanandum(Corner(), 2, mean=0.0, std=1.0)
    images = torch.ones(len(masks), 3, 8, 8)
    return explanation(
        images=images, class_masks=masks, targets=targets, shown=targets, explanandum=model, generators=[torch.Generator()] * 2
    )


@pytest.mark.parametrize("efficiency", ["share", "additive"])
def test_scores_alone_lead_a_mask_to_the_evidence(efficiency):
    (term,) = build_terms({"coalition": {"grid": 2, "coalitions": 8, "efficiency": efficiency}}).values()
    targets = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    logits = torch.zeros(2, 2, 8, 8, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    e = scene(logits.sigmoid(), targets)
    for step in range(60):
        e.generators[0].manual_seed(step)
        e.class_masks = logits.sigmoid()
        loss = term.value(e)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    masks = logits.sigmoid().detach()
    quarters = torch.nn.functional.adaptive_avg_pool2d(masks, 2).flatten(2)
    assert loss.item() < 0.01
    assert quarters[0, 0, 0] > 3 * quarters[0, 0, 1:].max() and quarters[1, 1, 3] > 3 * quarters[1, 1, :3].max()
    torch.testing.assert_close(masks[0, 1], torch.full((8, 8), 0.5))  # an absent class learns nothing
    assert e.explanandum.classifier.seen == 60 * 2 * (8 + 2)


def test_no_labels_ask_nothing():
    (term,) = build_terms({"coalition": {"grid": 2}}).values()
    masks = torch.rand(2, 2, 8, 8, requires_grad=True)
    e = scene(masks, torch.zeros(2, 2))
    assert term.value(e).item() == 0 and e.explanandum.classifier.seen == 0
    with pytest.raises(ConfigError, match="grid must be at least 2"):
        build_terms({"coalition": {"grid": 1}})
