"""RTIS by hand; the golden cases are in tests/golden/test_rtis.py."""

import math

import pytest
import torch

from explainer.errors import ConfigError
from explainer.fills import alternative_fill, zero_padded_blur
from explainer.losses.base import build_terms
from explainer.losses.rtis import destroyer_loss, preserver_loss
from tests.unit.losses.test_paper_losses import explanation


def test_parts_by_hand():
    logits = torch.tensor([[0.0, math.log(3), 5.0], [math.log(3), 0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])  # probabilities 1/2, 3/4 and 3/4: mean over the three pairs
    assert preserver_loss(logits, targets).item() == pytest.approx(-(math.log(0.5) + 2 * math.log(0.75)) / 3)
    assert destroyer_loss(logits, targets, 0.5).item() == pytest.approx(math.sqrt(2 / 3))
    single = torch.log(torch.tensor([[0.2, 0.8]], dtype=torch.float64))
    assert preserver_loss(single, torch.tensor([[1.0, 0.0]]), "multiclass").item() == pytest.approx(-math.log(0.2))
    assert destroyer_loss(single, torch.tensor([[1.0, 0.0]]), 1.0, "multiclass").item() == pytest.approx(0.2)


def test_no_labels_and_vanished_probabilities_have_finite_gradients():
    logits = torch.full((2, 3), -300.0, requires_grad=True)
    for targets in (torch.zeros(2, 3), torch.ones(2, 3)):
        for value in (preserver_loss(logits, targets), destroyer_loss(logits, targets)):
            assert torch.isfinite(torch.autograd.grad(value, logits, retain_graph=True)[0]).all()
    assert preserver_loss(logits, torch.zeros(2, 3)).item() == 0 and destroyer_loss(logits, torch.zeros(2, 3)).item() == 0


def test_term_sums_its_parts():
    (term,) = build_terms({"rtis": {"tv": 10, "area": 1, "preserver": 1, "destroyer": 5, "power": 1.0}}).values()
    mask = torch.zeros(2, 4, 4)
    mask[:, :2] = 1.0  # one edge of four differences: 4/16
    value = term.value(explanation(target_mask=mask))
    assert value.item() == pytest.approx(10 * 0.25 + 0.5 + math.log(2) + 5 * 0.5)
    with pytest.raises(ConfigError, match="power must be positive"):
        build_terms({"rtis": {"power": 0}})


def test_alternative_image():
    g = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=g)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    color = alternative_fill(images, mean, std, generator=g, kind="color")
    normalized = (color - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    level = normalized.mean((2, 3))
    assert abs(normalized.std((2, 3)).mean().item() - 1) < 0.05
    assert abs(level.mean().item() - 0.11) < 0.15 and level.amax() - level.amin() > 0.2 and level.abs().max() < 0.33 + 0.11 + 0.15
    seen = {bool((alternative_fill(images, mean, std, generator=torch.Generator().manual_seed(s)) > 1.2).any()) for s in range(12)}
    assert seen == {True, False}, "both kinds occur"
    # A point spreads as the Gaussian does: neighbours at distance 1 get exp(-1/(2 sigma^2)) of the centre.
    point = torch.zeros(1, 1, 21, 21, dtype=torch.float64)
    point[0, 0, 10, 10] = 1.0
    blurred = zero_padded_blur(point, 1.5)
    assert (blurred[0, 0, 10, 11] / blurred[0, 0, 10, 10]).item() == pytest.approx(math.exp(-1 / 4.5))
    assert blurred.sum().item() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="blur, color or random"):
        alternative_fill(images, mean, std, kind="grey")
