"""Adversarial manipulation: the loss by hand, constraints, stopping, what an attack achieves, scoring against slow formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from explainer import Explanandum
from explainer.baselines import build
from explainer.errors import ConfigError, NumericalError, ShapeError
from explainer.evaluation.manipulation import (
    AttackSettings,
    gradient_map,
    manipulate,
    normalized_magnitude,
    score,
    softplus_surrogate,
    uniform_ssim,
)
from explainer.evaluation.protocols.manipulation import Manipulation


def explanandum(inplace=False):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return Explanandum(net.double(), 4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def images(seed=0, batch=2):
    return torch.rand(batch, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def srd(ex):
    return build("srd", ex, start="constant").differentiable_map


METHODS = {
    "srd": (srd, {}),
    "gradient": (gradient_map, {"softplus": (10.0, 100.0)}),
    "input_x_gradient": (lambda ex: gradient_map(ex, "input_x_gradient"), {"softplus": (10.0, 100.0)}),
    "integrated_gradients": (lambda ex: gradient_map(ex, "integrated_gradients", 4), {"softplus": (10.0, 100.0)}),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_attack_approaches_the_target_map_within_its_limits(method):
    make, options = METHODS[method]
    ex, x, y = explanandum(inplace=True), images(0), images(1)
    settings = AttackSettings(max_iterations=40, learning_rate=3e-3, stop_mse=1.0, **options)
    attack = manipulate(ex, make(ex), x, y, settings)
    rows = score(ex, make(ex), x, attack)
    assert attack.map_loss.shape == (40, 2) and attack.iterations.tolist() == [40, 40]
    for i, row in enumerate(rows):
        assert row["map_loss_last"] < 0.8 * row["map_loss_first"]
        assert row["map_loss_last"] == pytest.approx(float(attack.map_loss[-1, i]))
        assert row["mse"] > 0 and row["output_change"] < 0.1 and row["ssim"] < 0.999 and row["pearson"] < 0.999
    before = score(ex, make(ex), x, manipulate(ex, make(ex), x, y, AttackSettings(max_iterations=1, learning_rate=1e-12, **options)))
    assert np.mean([r["target_pearson"] for r in rows]) > np.mean([r["target_pearson"] for r in before])
    assert all(r["ssim"] == pytest.approx(1, abs=1e-6) and r["pearson"] == pytest.approx(1, abs=1e-6) for r in before)
    assert float((attack.images - x).abs().max()) <= 8 / 255 + 1e-12 and 0 <= float(attack.images.min()) <= float(attack.images.max()) <= 1
    assert all(p.grad is None for p in ex.parameters()) and ex.classifier[1].inplace


def test_first_losses_by_hand():
    ex, x, y = explanandum(), images(0, 1), images(1, 1)
    attack = manipulate(ex, srd(ex), x, y, AttackSettings(max_iterations=2))
    maps = [build("srd", ex, start="constant", normalize=False)(z, int(ex(z).argmax())).abs() for z in (x, y)]
    h, target = (m / m.sum() for m in maps)
    assert float(attack.map_loss[0, 0]) == pytest.approx(float(((h - target) ** 2).mean()), rel=1e-9)
    assert float(attack.output_loss[0, 0]) == 0 and float(attack.output_loss[1, 0]) > 0
    assert torch.allclose(attack.target_map, target) and attack.class_index.tolist() == ex(x).argmax(1).tolist()
    summed = manipulate(ex, srd(ex), x, y, AttackSettings(max_iterations=1, distance="sum"))  # the squared norms of eq. 10
    assert float(summed.map_loss[0, 0]) == pytest.approx(144 * float(attack.map_loss[0, 0]))
    # Adam's first step moves every pixel by the learning rate in normalised units, wherever colours and epsilon allow it
    change = ((summed.images - x) / ex.std.view(1, -1, 1, 1)).abs()
    inside = (x > 0.01) & (x < 0.99)
    assert torch.allclose(change[inside], torch.full_like(change[inside], 1e-3), rtol=1e-3)


def test_gradient_of_the_loss_is_the_one_descended():
    """A step against finite differences: the sign of each pixel's first move is that of the loss's slope."""
    ex, x, y = explanandum(), images(2, 1), images(3, 1)
    settings = AttackSettings(max_iterations=1, map_weight=1.0, output_weight=0.0)
    attack = manipulate(ex, srd(ex), x, y, settings)
    loss = lambda z: float((normalized_magnitude(srd(ex)(z)) - attack.target_map).square().mean().detach())  # noqa: E731
    for c, i, j in [(0, 3, 4), (1, 8, 2), (2, 6, 6)]:
        step = torch.zeros_like(x)
        step[0, c, i, j] = 1e-6
        slope = loss(x + step) - loss(x - step)
        assert math.copysign(1, slope) == -math.copysign(1, float((attack.images - x)[0, c, i, j]))


def test_each_image_stops_by_itself_and_a_batch_equals_singles():
    ex, x, y = explanandum(), images(0), images(1)
    x[1] = (x[1] > 0.5).double()  # saturated colours: half of the moves are clamped away, so its MSE grows more slowly
    settings = AttackSettings(max_iterations=30, learning_rate=3e-3, stop_mse=5e-5)
    both = manipulate(ex, srd(ex), x, y, settings)
    assert both.iterations[0] < both.iterations[1] < 30 and bool((both.mse >= 5e-5).all())
    stop = int(both.iterations[0])
    assert bool(both.map_loss[:stop, 0].isfinite().all()) and bool(both.map_loss[stop:, 0].isnan().all())
    for i in (0, 1):
        alone = manipulate(ex, srd(ex), x[i : i + 1], y[i : i + 1], settings)
        assert alone.iterations[0] == both.iterations[i] and torch.allclose(alone.images[0], both.images[i], atol=1e-9)


def test_output_weight_holds_the_prediction():
    ex, x, y = explanandum(), images(0), images(1)
    changes = []
    for weight in (0.0, 1e11):
        settings = AttackSettings(max_iterations=25, learning_rate=5e-3, output_weight=weight, stop_mse=1.0, distance="mean")
        changes.append(float((ex(manipulate(ex, srd(ex), x, y, settings).images) - ex(x)).abs().mean()))
    free, held = changes
    assert held < 0.5 * free
    softmax = manipulate(ex, srd(ex), x, y, AttackSettings(max_iterations=2, output="softmax"))
    moved = manipulate(ex, srd(ex), x, y, AttackSettings(max_iterations=1)).images
    expected = (ex(moved).softmax(1) - ex(x).softmax(1)).square().sum(1)
    assert torch.allclose(softmax.output_loss[1], expected, rtol=1e-6)


def test_a_map_without_useful_gradient_shows_in_the_loss_curve():
    ex, x, y = explanandum(), images(0), images(1)
    rounded = lambda z, k: srd(ex)(z, k) * 0 + (z.mean(1) > 0.5)  # noqa: E731
    attack = manipulate(ex, rounded, x, y, AttackSettings(max_iterations=5))
    assert torch.equal(attack.map_loss, attack.map_loss[:1].expand(5, 2)) and float(attack.mse.max()) == 0
    assert all(r["ssim"] == 1 and r["map_loss_first"] == r["map_loss_last"] for r in score(ex, rounded, x, attack))


def test_softplus_surrogate_replaces_every_relu_and_nothing_else():
    x = images().requires_grad_()
    soft = lambda t: F.softplus(t, 5.0)  # noqa: E731
    for inplace in (False, True):
        ex = explanandum(inplace)
        n = ex.classifier
        expected = n[7](n[6](n[5](soft(n[3](n[2](soft(n[0](ex.normalize(x)))))))))
        with softplus_surrogate(5.0):
            inside = ex(x)
        assert torch.equal(inside, expected) and not torch.equal(ex(x), expected)
    with softplus_surrogate(5.0):
        y = x * 1
        y.relu_()
        assert torch.equal(y, soft(x)) and torch.equal(torch.relu(input=x), soft(x))
        assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.sigmoid(5 * x))
        for call in (lambda t: F.relu(t, inplace=True), lambda t: F.relu(t, True)):
            y = x * 1
            call(y)  # the result is not assigned: what counts is what became of y
            assert torch.equal(y, soft(x))


def test_distances_are_means_but_for_the_papers_mode():
    assert AttackSettings().distance == "mean"
    by_mode = {mode: Manipulation(mode) for mode in ("corrected", "code", "paper")}
    assert {m: p._settings(False).distance for m, p in by_mode.items()} == {"corrected": "mean", "code": "mean", "paper": "sum"}
    assert {m: p.columns()["map_loss_last"].title for m, p in by_mode.items()} == {
        "corrected": "map loss (mean square), last",
        "code": "map loss (mean square), last",
        "paper": "map loss (squared norm), last",
    }


def test_gradient_maps_against_autograd():
    ex, x = explanandum(), images()
    index = torch.tensor([1, 3])
    z = ex.normalize(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(ex.classifier(z).gather(1, index[:, None]).sum(), z)
    assert torch.allclose(gradient_map(ex)(x, index), gradient, atol=1e-12)
    assert torch.allclose(gradient_map(ex, "input_x_gradient")(x, index), gradient * z, atol=1e-12)
    total = gradient_map(ex, "integrated_gradients", 400)(x, index).sum((1, 2, 3))
    difference = (ex.classifier(z) - ex.classifier(torch.zeros_like(z))).gather(1, index[:, None])[:, 0]
    assert torch.allclose(total, difference, atol=2e-3), "completeness"
    with pytest.raises(ConfigError, match="kind"):
        gradient_map(ex, "smooth_grad")


def slow_ssim(x, y):
    """Window by window, with numpy's sample variance and covariance."""
    values = []
    for i, j in itertools.product(range(x.shape[0] - 6), range(x.shape[1] - 6)):
        a, b = x[i : i + 7, j : j + 7].ravel(), y[i : i + 7, j : j + 7].ravel()
        c = np.cov(a, b, ddof=1)
        values.append(
            (2 * a.mean() * b.mean() + 1e-4) * (2 * c[0, 1] + 9e-4) / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (c[0, 0] + c[1, 1] + 9e-4))
        )
    return np.mean(values)


def test_ssim_against_the_slow_formula():
    first, second = images()[:, 0], images(4)[:, 1, :, :]
    expected = [slow_ssim(a.numpy(), b.numpy()) for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(uniform_ssim(first, second).numpy(), expected, atol=1e-12)
    assert torch.allclose(uniform_ssim(first, first), torch.ones(2).double())
    with pytest.raises(ShapeError, match="7x7"):
        uniform_ssim(first[:, :6], second[:, :6])


def test_scores_by_hand():
    ex, x, y = explanandum(), images(0), images(1)
    explain = gradient_map(ex)
    attack = manipulate(ex, explain, x, y, AttackSettings(max_iterations=5, softplus=(10.0, 100.0)))
    row = score(ex, explain, x, attack)[1]
    before, after = (explain(z, attack.class_index)[1].abs().sum(0).detach() for z in (x, attack.images))
    before, after = (before / before.max()).numpy(), (after / after.max()).numpy()
    assert row["ssim"] == pytest.approx(slow_ssim(before, after)) and row["pearson"] == pytest.approx(
        np.corrcoef(before.ravel(), after.ravel())[0, 1]
    )
    shown = (attack.target_map[1] / attack.target_map[1].max()).numpy()
    assert row["target_ssim"] == pytest.approx(slow_ssim(shown, after))
    assert row["output_change"] == pytest.approx(float((ex(attack.images) - ex(x))[1].abs().mean()))
    std = ex.std.view(1, -1, 1, 1)
    assert row["mse"] == pytest.approx(float((((attack.images - x) / std)[1] ** 2).mean())) and row["prediction_unchanged"] == 1


def test_zero_maps_and_wrong_arguments():
    assert torch.equal(normalized_magnitude(torch.zeros(1, 2, 3, 3)), torch.zeros(1, 3, 3))
    assert torch.equal(normalized_magnitude(torch.tensor([[[[1.0, -1.0]], [[-2.0, 0.0]]]])), torch.tensor([[[0.75, 0.25]]]))
    ex, x = explanandum(), images()
    with pytest.raises(ShapeError, match="one shape"):
        manipulate(ex, srd(ex), x, images(1, 1))
    for options in ({"output": "probability"}, {"distance": "max"}, {"max_iterations": 0}, {"softplus": (0.0, 1.0)}):
        with pytest.raises(ConfigError):
            AttackSettings(**options)
    with pytest.raises(NumericalError, match="step 1"):
        manipulate(ex, lambda z, k: (z.mean(1) - z.mean(1).detach()).abs().sqrt() + 1, x, images(1), AttackSettings(max_iterations=2))
