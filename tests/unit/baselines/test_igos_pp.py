from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import explainer
from explainer.baselines import build
from explainer.baselines.igos_pp import NoiseTape, _Problem, edge_weights, total_variation
from explainer.errors import ConfigError, ShapeError


class Quadrant(nn.Module):
    """Logit 0 grows with the red of the upper left quarter, logit 1 with the green of the lower right one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2] // 2, x.shape[-1] // 2
        return torch.stack([x[:, 0, :h, :w].mean((1, 2)) * 8 - 2, x[:, 1, h:, w:].mean((1, 2)) * 8 - 2], 1)


CLASSIFIER = explainer.Explanandum(Quadrant(), 2, mean=0.0, std=1.0)
FAST = {"size": 4, "iterations": 4, "points": 3, "fill": "black"}


def images(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5 + 0.5


def test_total_variation_by_hand() -> None:
    mask = torch.tensor([[[[0.0, 1.0], [0.0, 3.0]]]])
    # vertical differences 0, 2; horizontal 1, 3
    assert total_variation(mask).item() == pytest.approx((0 + 4) / 2 + (1 + 9) / 2)
    weights = (torch.tensor([[[[1.0, 0.5]]]]), torch.tensor([[[[0.0], [1.0]]]]))
    assert total_variation(mask, weights).item() == pytest.approx((0 + 2) / 2 + (0 + 9) / 2)


def test_edge_weights_by_hand() -> None:
    image = torch.zeros(1, 2, 2, 2)
    image[0, 0, 1, :] = 0.1  # one channel of two changes downwards: mean difference 0.05
    image[0, :, :, 1] += 0.2
    image[0, 0, :, 1] += 0.1  # horizontally the channels change by 0.3 and 0.2
    vertical, horizontal = edge_weights(image, 0.01)
    assert vertical[0, 0, 0, 0].item() == pytest.approx(math.exp(-(0.05**2) / 0.01), rel=1e-5)
    assert horizontal[0, 0, 0, 0].item() == pytest.approx((math.exp(-9) + math.exp(-4)) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["igos_pp", "igos"])
def test_gradient_equals_finite_differences_of_the_written_out_objective(name: str) -> None:
    """The objective is written out once more, one strength and one term at a time, and differentiated numerically."""
    method = build(name, CLASSIFIER, **FAST, noise=0.0, l1=0.7, l2=3.0)
    x, labels = images(), torch.tensor([0, 1])
    problem = _Problem(method, x, labels, torch.Generator())
    masks = torch.rand(2, method.n_masks, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def up(m: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(m[None, None], (16, 16), mode="bilinear", align_corners=True)[0, 0]

    def objective(m: torch.Tensor, n: int, share: float) -> float:
        value = 0.0
        for kind, which in method.terms:
            mask = math.prod(up(m[i, 0]) for i in which)
            for k in range(1, 4):
                part = mask * k / 3
                shown = x[n] * part if kind == "delete" else x[n] * (1 - part)
                probability = CLASSIFIER(shown[None]).sigmoid()[0, labels[n]].item()
                value += share * probability / 3 * (1 if kind == "delete" else -1)
        product = math.prod(m[i, 0] for i in range(len(m)))
        tv = total_variation(product[None, None])
        if name == "igos_pp":
            weights = edge_weights(x[n : n + 1], 0.01)
            tv = (tv + total_variation(up(product)[None, None], weights)) / 2
        return value + 0.7 * (1 - product).mean().item() + 3.0 * tv.item()

    loss, slope = problem.gradient(masks, torch.arange(2))
    share = 0.5 if name == "igos_pp" else 1.0
    for n in range(2):
        assert loss[n].item() == pytest.approx(objective(masks[n], n, 1.0))
        for position in [(0, 0, 0, 0), (method.n_masks - 1, 0, 2, 3), (0, 0, 3, 1)]:
            step = torch.zeros_like(masks[n])
            step[position] = 1e-6
            numeric = (objective(masks[n] + step, n, share) - objective(masks[n] - step, n, share)) / 2e-6
            assert slope[n][position].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)
    torch.testing.assert_close(problem.loss(masks, torch.arange(2)), loss)


@pytest.mark.parametrize("name", ["igos_pp", "igos"])
@pytest.mark.parametrize("optimizer", ["line_search", "nesterov"])
def test_finds_the_quarter_that_counts(name: str, optimizer: str) -> None:
    step = 20.0 if optimizer == "line_search" else 2.0
    method = build(name, CLASSIFIER, **{**FAST, "iterations": 8}, l2=1.0, optimizer=optimizer, step=step)
    maps = method(images(), [0, 1])
    assert maps[0, :7, :7].mean() > maps[0].mean() + 0.1
    assert maps[1, 9:, 9:].mean() > maps[1].mean() + 0.1
    assert maps.min() >= 0
    assert maps.max() <= 1


def test_history_shows_the_descent() -> None:
    method = build("igos_pp", CLASSIFIER, **{**FAST, "iterations": 6}, noise=0.0, step=20.0)
    method(images(), [0, 1])
    losses = torch.stack([row["loss"] for row in method.history])
    assert losses.shape == (6, 2)
    # Every accepted step lowers the objective; a rejected search ends with a step too short to raise it noticeably.
    assert (losses.diff(dim=0) <= 1e-5).all()
    assert (losses[-1] < losses[0] - 0.1).all()


@pytest.mark.parametrize("name", ["igos_pp", "igos"])
def test_batch_equals_single_images_although_their_line_searches_differ(name: str) -> None:
    x = images(3)
    x[1] *= 0.1
    method = build(name, CLASSIFIER, **FAST, noise=0.2, step=500.0, batch_size=5)
    together = method(x, [0, 1, 1])
    steps = torch.stack([row["step"] for row in method.history])
    assert (steps[:, 0] != steps[:, 1]).any(), "the case must make the searches differ"
    for i, k in enumerate([0, 1, 1]):
        torch.testing.assert_close(method(x[i : i + 1], k)[0], together[i])


def test_converged_images_leave_the_batch() -> None:
    x = images(2)
    x[0] = 0  # black on a black fill: nothing to gain, and the area term holds the mask at 1
    method = build("igos_pp", CLASSIFIER, **FAST, noise=0.0, tolerance=1e-6, step=20.0)
    maps = method(x, [0, 1])
    assert maps[0].abs().max() == 0
    assert [row["active"] for row in method.history] == [2, 1, 1, 1]
    assert method.history[1]["loss"][0].isnan()
    assert method.history[1]["loss"][1].isfinite()
    alone = method(x[1:], 1)
    torch.testing.assert_close(alone[0], maps[1])


def test_budget_of_no_time_returns_the_start() -> None:
    start = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = nn.functional.interpolate(start[:, None], (16, 16), mode="bilinear", align_corners=True)[:, 0]
    for name in ("igos_pp", "igos"):
        for init in (start, lambda x, k: start):
            method = build(name, CLASSIFIER, **FAST, budget_s=-1.0, init=init)
            torch.testing.assert_close(method(images(), 0), expected)
            assert method.history == []


def test_a_good_start_needs_fewer_iterations() -> None:
    x, labels = images(), [0, 1]
    long = build("igos_pp", CLASSIFIER, **{**FAST, "iterations": 12}, noise=0.0, step=20.0)
    best = long(x, labels)
    cold = build("igos_pp", CLASSIFIER, **{**FAST, "iterations": 2}, noise=0.0, step=20.0)
    warm = build("igos_pp", CLASSIFIER, **{**FAST, "iterations": 2}, noise=0.0, step=20.0, init=best)
    cold(x, labels)
    warm(x, labels)
    assert (warm.history[-1]["loss"] < cold.history[-1]["loss"]).all()


def test_noise_tape_reads_the_same_at_any_order() -> None:
    scale = torch.full((1,), 2.0, dtype=torch.float64)
    plain = torch.Generator().manual_seed(5)
    expected = [2 * torch.randn(3, generator=plain, dtype=torch.float64) for _ in range(5)]
    generator = torch.Generator().manual_seed(5)
    tape = NoiseTape(generator, (3,), scale, keep=2)
    for place in (1, 0, 3, 0, 2, 3, 4, 1):
        assert torch.equal(tape[place], expected[place])
    tape.close()
    assert torch.equal(generator.get_state(), plain.get_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "at least 1"),
        ({"optimizer": "adam"}, "optimizer must be one of line_search, nesterov"),
        ({"score": "loss"}, "score must be one of"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("igos_pp", CLASSIFIER, **options)


def test_wrong_shapes() -> None:
    with pytest.raises(ShapeError, match="init must be"):
        build("igos_pp", CLASSIFIER, **FAST, init=torch.ones(3, 4, 4))(images(), 0)
    with pytest.raises(ShapeError, match="fill"):
        build("igos_pp", CLASSIFIER, **{**FAST, "fill": torch.ones(1, 3, 4, 4)})(images(), 0)
