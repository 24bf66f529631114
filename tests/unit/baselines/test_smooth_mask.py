"""Smooth masks and the area penalty against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from explainer.baselines.kernels.smooth_mask import SmoothMask, area_penalty, excluded, kernel_profile, parameters_of_area, shared_ranks
from explainer.errors import ConfigError, ShapeError


def looped_mask(parameters: list[list[float]], height: int, width: int, step: int, sigma: int) -> list[list[float]]:
    """The definition, pixel by pixel: smax over the window of nodes around each pixel of k(distance / sigma) p(node)."""
    radius, padding = 1 + math.ceil(sigma / step), 1 + math.ceil(2 * sigma / step)
    result = []
    for y in range(sigma, sigma + height):
        line = []
        for x in range(sigma, sigma + width):
            numerator = denominator = 0.0
            for a in range(2 * radius + 1):
                for b in range(2 * radius + 1):
                    i, j = y // step + a - padding, x // step + b - padding
                    inside = 0 <= i < len(parameters) and 0 <= j < len(parameters[0])
                    z = math.hypot(y - sigma - step * i, x - sigma - step * j) / sigma
                    value = math.exp(-2 * max(0.0, z - 0.5) ** 2) * (parameters[i][j] if inside else 0.0)
                    numerator += value * math.exp(20 * value)
                    denominator += math.exp(20 * value)
            line.append(numerator / denominator)
        result.append(line)
    return result


@pytest.mark.parametrize(("height", "width", "step", "sigma"), [(8, 8, 2, 4), (7, 10, 3, 3), (6, 5, 1, 3)])
def test_masks_equal_the_loops(height: int, width: int, step: int, sigma: int) -> None:
    family = SmoothMask(height, width, step, sigma, dtype=torch.float64)
    parameters = torch.rand(2, *family.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([looped_mask(p.tolist(), height, width, step, sigma) for p in parameters], dtype=torch.float64)
    torch.testing.assert_close(family(parameters), expected, rtol=1e-12, atol=1e-12)


def test_masks_of_the_paper_equal_loops_over_all_nodes() -> None:
    """Distances in nodes, whatever sigma is; the window of 6 nodes reaches the whole grid here, and nodes outside it are 0."""
    step, family = 2, SmoothMask(8, 8, 2, 4, profile="paper", dtype=torch.float64)
    parameters = torch.rand(1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(8, 8, dtype=torch.float64)
    for y in range(8):
        for x in range(8):
            cell, total, mass = (y // step, x // step), 0.0, 0.0
            for i in range(cell[0] - 6, cell[0] + 7):
                for j in range(cell[1] - 6, cell[1] + 7):
                    z = math.hypot(y / step - i, x / step - j)
                    inside = 0 <= i < 4 and 0 <= j < 4
                    value = math.exp(-(max(0.0, z - 1) ** 2) / 4) * (float(parameters[0, i, j]) if inside else 0.0)
                    total, mass = total + value * math.exp(20 * value), mass + math.exp(20 * value)
            expected[y, x] = total / mass
    torch.testing.assert_close(family(parameters)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("profile", "share"), [("code", 0.033), ("paper", 0.022)])
def test_one_node_covers_the_papers_share_of_the_image(profile: str, share: float) -> None:
    family = SmoothMask(224, 224, 7, 21, profile=profile, dtype=torch.float64)
    node = torch.zeros(1, *family.grid, dtype=torch.float64)
    node[0, 16, 16] = 1
    assert (family(node) > 0.5).double().mean().item() == pytest.approx(share, rel=0.1)
    assert family(node).max().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pooling", ["softmax", "sum", "sigmoid"])
def test_gradient_is_the_finite_difference(pooling: str) -> None:
    family = SmoothMask(5, 6, 2, 2, pooling=pooling, dtype=torch.float64)
    parameters = torch.rand(2, *family.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(family.padded_masks, (parameters,))


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    family = SmoothMask(8, 8, 2, 4, dtype=torch.float64)
    parameters = torch.rand(3, *family.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    once = family(parameters)
    (grad,) = torch.autograd.grad(once.square().sum(), parameters)
    monkeypatch.setattr("explainer.baselines.kernels.smooth_mask._CPU_BLOCK", 1)
    blocks = family(parameters)
    torch.testing.assert_close(blocks, once)
    torch.testing.assert_close(torch.autograd.grad(blocks.square().sum(), parameters)[0], grad)


def test_profiles_by_hand() -> None:
    z = torch.tensor([0.0, 0.5, 1.5, 3.0], dtype=torch.float64)
    assert kernel_profile(z, "code").tolist() == pytest.approx([1, 1, math.exp(-2), math.exp(-12.5)])
    assert kernel_profile(z, "paper").tolist() == pytest.approx([1, 1, math.exp(-0.0625), math.exp(-1)])
    with pytest.raises(ConfigError, match="profile"):
        kernel_profile(z, "gauss")  # type: ignore[arg-type]


def test_saturated_masks_block_or_pass_gradient() -> None:
    ones = torch.zeros(1, 3, 3, requires_grad=True)  # every mask value is exactly 0
    for clamp, expected in (("pass", True), ("block", False)):
        family = SmoothMask(6, 6, 2, 4, clamp_gradient=clamp)
        (grad,) = torch.autograd.grad(family(ones).sum(), ones)
        assert bool((grad > 0).all()) is expected


def test_invalid_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of step"):
        SmoothMask(32, 32, step=4, sigma=6)
    with pytest.raises(ConfigError, match="step and sigma"):
        SmoothMask(32, 32, step=0, sigma=6)
    with pytest.raises(ConfigError, match="pooling"):
        SmoothMask(32, 32, 4, 8, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="clamp_gradient"):
        SmoothMask(32, 32, 4, 8, clamp_gradient="both")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"\(8, 8\)"):
        SmoothMask(32, 32, 4, 8)(torch.ones(1, 7, 8))


def test_parameters_from_masks_follow_the_mask() -> None:
    family = SmoothMask(16, 16, 4, 8, dtype=torch.float64)
    mask = torch.zeros(1, 16, 16, dtype=torch.float64)
    mask[:, :, 9:] = 1
    parameters = family.parameters_from(mask)
    assert tuple(parameters.shape) == (1, *family.grid)
    assert parameters[0, 0].tolist() == [0, 0, pytest.approx(2 / 5), 1]  # node at column 8: columns 6..10, of which 9 and 10 are 1


def test_area_penalty_by_hand() -> None:
    masks = torch.tensor([[0.2, 1.0, 0.0, 0.9], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    penalty = area_penalty(masks, excluded(4, [0.5, 0.25]))
    # row 0, two zeros wanted: 0, .2 -> 0; .9, 1 -> 1. Row 1, three zeros wanted: one of the ones is too many.
    assert penalty.tolist() == pytest.approx([(0.2**2 + 0.1**2) / 4, 1 / 4])
    assert area_penalty(masks, excluded(4, [0.5, 0.25]), "sum").tolist() == pytest.approx([0.2**2 + 0.1**2, 1.0])
    assert excluded(2025, [0.1, 0.3]).tolist() == [1822, 1417]


def test_shared_ranks_by_hand() -> None:
    values = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.2, 0.8, 1.0], [0.0, 0.5, 0.52, 1.0]], dtype=torch.float64)
    ranks = shared_ranks(values, torch.tensor([1, 2, 2]), width=0.1)
    # All tie: a quarter each. Far apart: the two largest. Two of them within 0.1: x and x + 0.2 that sum to 1.
    expected = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0, 0, 1, 1], [0, 0.4, 0.6, 1]], dtype=torch.float64)
    torch.testing.assert_close(ranks, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(shared_ranks(values, torch.tensor([0, 4, 4]), 0.1).sum(1), torch.tensor([0.0, 4, 4], dtype=torch.float64))


def test_shared_ranks_are_the_nearest_point_of_the_capped_simplex() -> None:
    """By Dykstra's alternating projections onto the box and the plane of the sum."""
    values = torch.rand(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones, width = torch.arange(20) + 5, 0.3
    point, correction = values / width, torch.zeros(20, 30, dtype=torch.float64)
    for _ in range(3000):
        flat = point + ((ones - point.sum(1)) / 30)[:, None]
        point = (flat + correction).clamp(0, 1)
        correction = flat + correction - point
    torch.testing.assert_close(shared_ranks(values, ones, width), point, rtol=0, atol=1e-5)


def test_area_penalty_with_shared_ranks() -> None:
    far = torch.tensor([[0.9, 0.1, 0.4, 0.7]])
    torch.testing.assert_close(area_penalty(far, torch.tensor([2]), width=0.05), area_penalty(far, torch.tensor([2])))
    tied = torch.full((1, 4), 0.5).requires_grad_()
    area_penalty(tied, torch.tensor([3]), width=0.05).backward()
    assert tied.grad is not None
    torch.testing.assert_close(tied.grad, torch.full((1, 4), 2 * (0.5 - 0.25) / 4))  # no pixel is preferred
    far.requires_grad_()
    first, second = (torch.autograd.grad(area_penalty(far, torch.tensor([2]), width=w).sum(), far)[0] for w in (0.05, 0.0))
    torch.testing.assert_close(first, second)


def test_parameters_of_area_have_the_area_and_follow_the_score() -> None:
    family = SmoothMask(24, 24, 2, 4, dtype=torch.float64)
    score = torch.zeros(2, *family.grid, dtype=torch.float64)
    score[:, :6] = torch.linspace(1, 2, 12, dtype=torch.float64)  # the upper half, more to the right
    for on_margin in (True, False):
        parameters = parameters_of_area(family, score, [0.1, 0.3], on_margin=on_margin)
        full = family.padded_masks(parameters)
        masks = full if on_margin else family.crop(full)
        assert masks.mean((1, 2)).tolist() == pytest.approx([0.1, 0.3], abs=0.005)
        assert (parameters[0, :, 2:-2].diff(dim=1) >= 0).all()
        assert parameters[1, 2, -3] > parameters[1, -3, -3]


def test_footprint_of_inner_and_corner_nodes() -> None:
    part = SmoothMask(60, 60, 3, 3, dtype=torch.float64).footprint()
    assert part.shape == (20, 20)
    assert part[8:12, 8:12].min().item() == pytest.approx(1)
    assert 0.2 < part[0, 0].item() < 0.5  # a quarter of the disc, and the axes' share
    assert part[0, 10].item() < part[1, 10].item() < part[2, 10].item()
