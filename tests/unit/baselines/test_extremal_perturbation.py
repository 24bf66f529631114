"""Extremal perturbations: an independent slow derivation, games, starts, batches, early ends, channels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import explainer.baselines as baselines
from explainer.attribution import one_map
from explainer.baselines.extremal_perturbation import ExtremalMasks, ExtremalPerturbation
from explainer.baselines.kernels.extremal_channels import channel_masks
from explainer.baselines.kernels.extremal_game import class_reward, game_reward, make_schedule
from explainer.baselines.kernels.mask_search import History
from explainer.baselines.kernels.perturbation import imsmooth
from explainer.errors import ConfigError, ShapeError, UnsupportedLayerError
from explainer.models.explanandum import Explanandum
from tests.unit.baselines.test_smooth_mask import looped_mask


class Quadrants(nn.Module):
    """Logit k is the mean brightness of quadrant k: the evidence of class k is known."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        return 10 * self.pool(images.mean(1, keepdim=True)).flatten(1)


def quadrants() -> Explanandum:
    return Explanandum(Quadrants(), num_classes=4, mean=0.0, std=1.0)


def convolutional(seed: int = 0) -> Explanandum:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    return Explanandum(net, num_classes=3, mean=0.0, std=1.0)


def pictures(count: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(5))


def slow_energy(
    explanandum: Any, image: Tensor, parameters: np.ndarray, area: float, weight: float, target: int, step: int, sigma: int, flip: bool
) -> tuple[float, float]:
    """Reward of ``hybrid`` with ``fade``, and the same minus the weighted area term, from the definitions, with loops and lists."""
    size = image.shape[-1]
    pixels = step * (len(parameters) + 2 * (math.ceil(2 * sigma / step) - math.ceil(sigma / step)) - 1) + 1
    # a mask with margin: the loops are asked for a larger image whose margin begins at -sigma
    wide = padded_loops(parameters, pixels, step, sigma)
    mask = wide[sigma : sigma + size, sigma : sigma + size]
    total = 0.0
    for sign, shown in ((1, mask), (-1, 1 - mask)):
        seen = image * torch.from_numpy(shown)
        seen = torch.flip(seen, (-1,)) if flip else seen
        total += sign * float(explanandum(seen)[0, target])
    ordered = sorted(wide.ravel().tolist())
    zeros = int(len(ordered) * (1 - area))
    penalty = sum((v - (0.0 if k < zeros else 1.0)) ** 2 for k, v in enumerate(ordered)) / len(ordered)
    return total, total - weight * penalty


def padded_loops(parameters: np.ndarray, pixels: int, step: int, sigma: int) -> np.ndarray:
    """smax at every pixel of the padded mask, window by window."""
    radius, padding = 1 + math.ceil(sigma / step), 1 + math.ceil(2 * sigma / step)
    nodes = np.pad(parameters, 2 * padding)
    result = np.empty((pixels, pixels))
    offsets = np.arange(2 * radius + 1)
    for y in range(pixels):
        for x in range(pixels):
            i, j = y // step + offsets - padding, x // step + offsets - padding
            z = np.hypot(y - sigma - step * i[:, None], x - sigma - step * j[None, :]) / sigma
            value = np.exp(-2 * np.maximum(0, z - 0.5) ** 2) * nodes[np.ix_(i + 2 * padding, j + 2 * padding)]
            result[y, x] = (value * np.exp(20 * value)).sum() / np.exp(20 * value).sum()
    return result


def test_the_slow_masks_agree_with_the_plain_loops() -> None:
    parameters = np.random.default_rng(0).random((4, 4))
    expected = np.array(looped_mask(parameters.tolist(), 8, 8, 2, 4))
    np.testing.assert_allclose(padded_loops(parameters, 15, 2, 4)[4:12, 4:12], expected, rtol=1e-12)


def test_four_iterations_equal_the_slow_derivation() -> None:
    """Loops for the mask, sorted lists for the area, finite differences for the gradient, heavy-ball steps written out."""
    explanandum, image, area, target, step, sigma = convolutional(), pictures(1, 8), 0.3, 1, 2, 4
    start = np.random.default_rng(1).random((4, 4)) * 0.8 + 0.1
    parameters, buffer, rewards = start.copy(), None, []
    with torch.no_grad():
        for t in range(4):
            weight, flip = 300 * 1.0035**t, t % 2 == 0
            rewards.append(slow_energy(explanandum, image, parameters, area, weight, target, step, sigma, flip)[0])
            if t == 3:
                break
            grad = np.empty_like(parameters)
            for index in np.ndindex(parameters.shape):
                ends = []
                for sign in (1, -1):
                    moved = parameters.copy()
                    moved[index] += sign * 1e-5
                    ends.append(slow_energy(explanandum, image, moved, area, weight, target, step, sigma, flip)[1])
                grad[index] = (ends[0] - ends[1]) / 2e-5
            buffer = grad if buffer is None else 0.9 * buffer + 0.1 * grad
            parameters = np.clip(parameters + 0.01 * buffer, 0, 1)
    method = ExtremalPerturbation(
        explanandum, [area], game="hybrid", perturbation="fade", iterations=4, init=torch.from_numpy(start), step=step, sigma=sigma
    )
    found = method.masks(image, target)
    np.testing.assert_allclose(method.history.values["reward"][:, 0].numpy(), rewards, rtol=1e-6)
    np.testing.assert_allclose(found.parameters[0, 0].numpy(), parameters, atol=1e-6)
    np.testing.assert_allclose(found.masks[0, 0].numpy(), padded_loops(parameters, 15, step, sigma)[4:12, 4:12], atol=1e-6)


def test_rewards_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [5.0, 0.0, 3.0]])
    index = torch.tensor([1, 2])
    assert class_reward(logits, index).tolist() == [4.0, 3.0]
    assert class_reward(logits, index, "contrastive").tolist() == [2.0, -2.0]


def test_games_by_hand() -> None:
    def classify(mask: Tensor, rows: Tensor) -> Tensor:
        return torch.stack([mask.sum(1) * 10, rows.to(mask)], dim=1)

    mask, rows, index = torch.tensor([[0.75, 1.0], [0.5, 0.0]]), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.long)
    outcomes = {
        game: game_reward(classify, mask, rows, index, game=game, reward="simple").tolist() for game in ("preserve", "delete", "hybrid")
    }
    assert outcomes == {"preserve": [17.5, 5.0], "delete": [-2.5, -15.0], "hybrid": [15.0, -10.0]}


def test_schedules() -> None:
    code, paper, fast = (make_schedule(name) for name in ("code", "paper", "fast"))
    assert (code.iterations, paper.iterations) == (800, 1600)
    assert fast.iterations <= 800 / 5
    assert code.weight(2) == pytest.approx(300 * 1.0035**2)
    assert [paper.weight(t) for t in (0, 533, 534, 1066, 1067, 1599)] == [300, 300, 600, 600, 1200, 1200]
    assert (paper.profile, paper.area_on, paper.renormalize) == ("paper", "image", True)
    assert make_schedule("paper", 30).weight(10) == 600
    with pytest.raises(ConfigError, match="schedule"):
        make_schedule("slow")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="iterations"):
        make_schedule("code", 0)


@pytest.mark.parametrize("schedule", ["code", "paper", "fast"])
@pytest.mark.parametrize("game", ["preserve", "delete", "hybrid"])
def test_finds_the_quadrant(schedule: str, game: str) -> None:
    images, least = torch.ones(1, 3, 16, 16), 1.5 if schedule == "code" else 3  # a short run of the slowest schedule
    method = baselines.build(
        "extremal_perturbation",
        quadrants(),
        areas=[0.25],
        game=game,
        perturbation="fade",
        schedule=schedule,
        jitter=False,
        step=1,
        sigma=3,
        iterations={"code": 200}.get(schedule, 100),
        area_on="image",
    )
    maps = method(images, 3)
    assert maps[0, 8:, 8:].mean() > least * maps[0, :8].mean()
    assert maps[0, 8:, 8:].mean() > least * maps[0, :, :8].mean()


def test_batch_of_images_classes_and_areas_equals_singles() -> None:
    explanandum, images = convolutional(), pictures(2, 12)
    start = torch.rand(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"step": 2, "sigma": 4, "iterations": 6, "perturbation": "blur", "init": start, "output": "sum"}
    whole = ExtremalPerturbation(explanandum, [0.1, 0.4], **options)
    maps = whole.all_classes(images, [2, 0])
    assert maps.shape == (2, 2, 12, 12)
    for b in range(2):
        for column, k in enumerate([2, 0]):
            single = [ExtremalPerturbation(explanandum, [a], **options)(images[b : b + 1], k) for a in (0.1, 0.4)]
            torch.testing.assert_close(maps[b, column], (single[0] + single[1])[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(whole(images, torch.tensor([2, 2])), maps[:, 0], rtol=1e-9, atol=1e-10)
    chunked = ExtremalPerturbation(explanandum, [0.1, 0.4], **options, rows_per_pass=3)
    torch.testing.assert_close(chunked.all_classes(images, [2, 0]), maps, rtol=1e-9, atol=1e-10)


def test_result_scores_are_those_of_the_masked_image() -> None:
    explanandum, images = convolutional(), pictures(2, 12)
    method = ExtremalPerturbation(explanandum, [0.2, 0.5], game="hybrid", perturbation="fade", iterations=3, step=2, sigma=4)
    found = method.masks(images, [1, 2])
    for b, k in enumerate([1, 2]):
        assert found.original[b].item() == pytest.approx(explanandum(images)[b, k].item())
        for a in range(2):
            kept = explanandum(images[b : b + 1] * found.masks[b, a])[0, k].item()
            dropped = explanandum(images[b : b + 1] * (1 - found.masks[b, a]))[0, k].item()
            assert found.preserved[b, a].item() == pytest.approx(kept)
            assert found.rewards[b, a].item() == pytest.approx(kept - dropped)
    assert found.iterations.tolist() == [[3, 3], [3, 3]]
    assert method.history.values["reward"].shape == (3, 4)


def test_smallest_sufficient_area() -> None:
    areas, nothing = (0.4, 0.1, 0.2), torch.zeros(3, 3)
    preserved = torch.tensor([[5.0, 1.0, 5.0], [4.0, 6.0, 1.0], [0.0, 0.0, 4.9]])
    found = ExtremalMasks(nothing, nothing, preserved, torch.full((3,), 5.0), areas, nothing, nothing, History())
    assert found.smallest_area()[:2].tolist() == pytest.approx([0.2, 0.1])
    assert math.isnan(found.smallest_area()[2])


def test_smallest_mask_is_the_one_of_the_smallest_sufficient_area() -> None:
    areas, empty = (0.4, 0.1, 0.2), torch.zeros(3, 3)
    masks = torch.tensor(areas)[None, :, None, None].expand(3, 3, 2, 2)  # each mask is filled with its area
    preserved = torch.tensor([[5.0, 1.0, 5.0], [4.0, 6.0, 1.0], [0.0, 0.0, 4.9]])
    found = ExtremalMasks(masks, empty, preserved, torch.full((3,), 5.0), areas, empty, empty, History())
    assert found.smallest_masks()[:, 0, 0].tolist() == pytest.approx([0.2, 0.1, 0.4])  # none suffices: the largest area
    assert found.smallest_masks(0.9)[:, 0, 0].tolist() == pytest.approx([0.2, 0.1, 0.2])
    assert found.smallest_area(0.9)[2].item() == pytest.approx(0.2)


def test_outputs_of_the_attributor() -> None:
    explanandum, images = convolutional(), pictures(2, 12)
    options: dict[str, Any] = {"iterations": 3, "step": 2, "sigma": 4, "perturbation": "fade", "reward": "contrastive"}
    areas = [0.5, 0.2]
    found = ExtremalPerturbation(explanandum, areas, **options).masks(images, [1, 2])
    for b, k in enumerate([1, 2]):  # the class's logit decides about sufficiency, not the contrastive reward
        assert found.original[b].item() == pytest.approx(explanandum(images)[b, k].item())
        assert found.preserved[b, 1].item() == pytest.approx(explanandum(images[b : b + 1] * found.masks[b, 1])[0, k].item())
    torch.testing.assert_close(ExtremalPerturbation(explanandum, areas, **options)(images, [1, 2]), found.smallest_masks())
    torch.testing.assert_close(ExtremalPerturbation(explanandum, areas, output="sum", **options)(images, [1, 2]), found.masks.sum(1))
    every = ExtremalPerturbation(explanandum, areas, output="all", **options)
    torch.testing.assert_close(every(images, [1, 2]), found.masks)  # [B,A,H,W]
    both = every.all_classes(images, [1, 2])  # [B,K,A,H,W]
    assert both.shape == (2, 2, 2, 12, 12)
    torch.testing.assert_close(torch.stack([both[0, 0], both[1, 1]]), found.masks)
    smooth = ExtremalPerturbation(explanandum, areas, output="all", smooth=0.1, **options)(images, [1, 2])
    torch.testing.assert_close(smooth.flatten(0, 1), imsmooth(found.masks.flatten(0, 1)[:, None], 1.2)[:, 0])
    with pytest.raises(ConfigError, match="2 maps an image"):
        one_map(every)
    torch.testing.assert_close(ExtremalPerturbation(explanandum, areas, output=0.2, **options)(images, [1, 2]), found.masks[:, 1])
    smallest = ExtremalPerturbation(explanandum, areas, output="smallest", tau=0.5, **options)
    torch.testing.assert_close(smallest(images, [1, 2]), found.smallest_masks(0.5))
    torch.testing.assert_close(smallest.all_classes(images, [1])[:1, 0], found.smallest_masks(0.5)[:1])


def test_smallest_masks_are_judged_after_smoothing() -> None:
    method = ExtremalPerturbation(quadrants(), [0.25], iterations=3, step=1, sigma=3, perturbation="fade", output="smallest", smooth=0.2)
    images = torch.ones(1, 3, 16, 16)
    found = method.masks(images, 3)
    plain = ExtremalPerturbation(quadrants(), [0.25], iterations=3, step=1, sigma=3, perturbation="fade").masks(images, 3).masks[:, 0]
    torch.testing.assert_close(found.masks[:, 0], imsmooth(plain[:, None], 3.2)[:, 0])
    assert found.preserved.item() == pytest.approx(quadrants()(images * found.masks[:, 0, None])[0, 3].item())
    torch.testing.assert_close(method(images, 3), found.masks[:, 0])


class Disc(nn.Module):
    """Logit 0 is ``worth`` times the mean brightness inside a disc of a known area, off the centre; logit 1 is 0."""

    def __init__(self, size: int, area: float, worth: float) -> None:
        super().__init__()
        place = (torch.arange(size) + 0.5) / size
        distance = (place[:, None] - 0.4) ** 2 + (place - 0.6) ** 2
        self.register_buffer("disc", (distance < distance.flatten().sort().values[int(area * size * size)]).float())
        self.worth = worth

    def forward(self, images: Tensor) -> Tensor:
        score = self.worth * (images.mean(1) * self.disc).sum((1, 2)) / self.disc.sum()
        return torch.stack([score, torch.zeros_like(score)], 1)


def recovered(area: float, worth: float = 1.0, size: int = 32, **options: Any) -> float:
    """Intersection over union of a planted disc and the mask's part above one half; the grid is that of 224 pixels."""
    net = Disc(size, area, worth)
    method = ExtremalPerturbation(
        Explanandum(net, num_classes=2, mean=0.0, std=1.0),
        [area],
        perturbation="fade",
        jitter=False,
        step=size // 32,
        sigma=3 * size // 32,
        **options,
    )
    mask, disc = method.masks(torch.ones(1, 3, size, size), 0).masks[0, 0] > 0.5, net.disc > 0.5
    return float((mask & disc).sum() / (mask | disc).sum())


@pytest.mark.parametrize("area", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("game", ["preserve", "delete", "hybrid"])
def test_fast_finds_the_planted_disc(game: str, area: float) -> None:
    assert recovered(area, game=game, schedule="fast") >= 0.95


@pytest.mark.parametrize(("schedule", "iterations"), [("code", 400), ("paper", 200)])
def test_a_cut_schedule_finds_the_planted_disc_by_default_and_not_as_published(schedule: str, iterations: int) -> None:
    assert recovered(0.1, schedule=schedule, iterations=iterations) >= 0.7
    assert recovered(0.1, schedule=schedule, iterations=iterations, init="ones") == 0


@pytest.mark.slow
@pytest.mark.parametrize("area", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("game", ["preserve", "delete", "hybrid"])
@pytest.mark.parametrize("schedule", ["code", "paper"])
def test_published_schedules_find_the_planted_disc_from_the_informed_start(schedule: str, game: str, area: float) -> None:
    found = recovered(area, game=game, schedule=schedule)
    assert found >= 0.7
    assert recovered(area, game=game, schedule="fast") >= found - 0.005  # less than one pixel


@pytest.mark.slow
def test_a_disc_worth_a_hundred_logits_is_found_as_published() -> None:
    assert recovered(0.05, worth=100.0, schedule="paper", init="ones") >= 0.6


def test_sum_and_mean_of_the_area_term_differ_by_the_number_of_pixels() -> None:
    options: dict[str, Any] = {"step": 1, "sigma": 3, "perturbation": "fade", "init": 0.7, "jitter": False, "max_iterations": 1}
    terms = []
    for reduction in ("mean", "sum"):
        method = ExtremalPerturbation(quadrants(), [0.25], area_reduction=reduction, iterations=2, area_on="image", **options)
        method.masks(torch.ones(1, 3, 16, 16), 3)
        terms.append(method.history.values["area"].item())
    assert terms[1] == pytest.approx(256 * terms[0])


def test_starts() -> None:
    explanandum, images = convolutional(), pictures(2, 12)

    def first(init: Any, **options: Any) -> Tensor:
        method = ExtremalPerturbation(explanandum, [0.1, 0.4], iterations=1, step=3, sigma=3, init=init, **options)
        return method.masks(images, 0).parameters  # a single iteration takes no step

    grid = torch.rand(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first("ones"), torch.ones(2, 2, 4, 4, dtype=torch.float64))
    assert first(None).min() == pytest.approx(0.9) and first(None).max() == 1
    torch.testing.assert_close(first(None), first("informed"))
    torch.testing.assert_close(first(0.5), torch.full((2, 2, 4, 4), 0.5, dtype=torch.float64))
    torch.testing.assert_close(first(grid), grid[:, None].expand(2, 2, 4, 4))
    torch.testing.assert_close(first(grid[0]), grid[0].expand(2, 2, 4, 4))
    by_area = torch.stack([grid, 1 - grid], dim=1)
    torch.testing.assert_close(first(by_area), by_area)
    half = torch.zeros(2, 12, 12, dtype=torch.float64)
    half[:, 6:] = 1
    expected = torch.tensor([0, 0, 2 / 3, 1], dtype=torch.float64)[:, None].expand(2, 2, 4, 4)  # node rows 0, 3, 6, 9
    torch.testing.assert_close(first(half), expected)
    torch.testing.assert_close(first(lambda x, k: half), expected)
    override = ExtremalPerturbation(explanandum, [0.1, 0.4], iterations=1, step=3, sigma=3).masks(images, 0, init=grid)
    torch.testing.assert_close(override.parameters, grid[:, None].expand(2, 2, 4, 4))
    with pytest.raises(ShapeError, match=r"\(4, 4\)"):
        first(torch.ones(2, 5, 5))


def test_single_pass_options() -> None:
    explanandum, images = convolutional(), pictures(1, 12)
    options: dict[str, Any] = {"step": 2, "sigma": 4, "iterations": 50}
    assert len(_history(ExtremalPerturbation(explanandum, [0.3], **options, max_iterations=4), images).active) == 4
    assert len(_history(ExtremalPerturbation(explanandum, [0.3], **options, budget_s=0.0), images).active) == 1
    assert len(_history(ExtremalPerturbation(explanandum, [0.3], **options, tolerance=10.0, patience=5), images).active) == 5
    assert len(_history(ExtremalPerturbation(explanandum, [0.3], **options), images).active) == 50
    smooth = ExtremalPerturbation(explanandum, [0.3], **options, smooth=0.09)(images, 0)
    rough = ExtremalPerturbation(explanandum, [0.3], **options)(images, 0)
    torch.testing.assert_close(smooth, imsmooth(rough[:, None], 0.09 * 12)[:, 0])


def _history(method: ExtremalPerturbation, images: Tensor) -> History:
    method(images, 0)
    return method.history


def test_defaults_follow_the_call() -> None:
    explanandum = quadrants()
    assert ExtremalPerturbation(explanandum).schedule_name == "fast"
    assert ExtremalPerturbation(explanandum, iterations=800).schedule_name == "code"
    published = ExtremalPerturbation(explanandum, schedule="code").generator_for(torch.ones(1, 3, 64, 64))
    scaled = ExtremalPerturbation(explanandum).generator_for(torch.ones(1, 3, 64, 64))
    full_size = ExtremalPerturbation(explanandum).generator_for(torch.ones(1, 3, 224, 224))
    assert [(f.step, f.margin) for f in (published, scaled, full_size)] == [(7, 21), (2, 6), (7, 21)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"areas": []}, "areas"),
        ({"areas": [0.0]}, "areas"),
        ({"areas": [1.5]}, "areas"),
        ({"game": "win"}, "preserve, delete, hybrid"),
        ({"reward": "double"}, "simple, contrastive"),
        ({"perturbation": "melt"}, "blur, fade"),
        ({"smooth": -1.0}, "smooth"),
        ({"area_on": "moon"}, "area_on"),
        ({"origin": "pink"}, "origin"),
        ({"layer": "nowhere"}, "not a module"),
        ({"init": "twos"}, "informed"),
        ({"output": "largest"}, "smallest"),
        ({"output": 0.3}, "0.025"),
        ({"area_reduction": "max"}, "mean, sum"),
        ({"patience": 0}, "patience"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExtremalPerturbation(quadrants(), **options)


def test_contrastive_needs_another_class() -> None:
    single = Explanandum(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)), num_classes=1)
    with pytest.raises(ConfigError, match="one class"):
        ExtremalPerturbation(single, reward="contrastive")


class TwoChannels(nn.Module):
    """Four feature maps, the image scaled; class 0 reads the second one, class 1 the fourth minus the first."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 1, bias=False)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None].expand(4, 3, 1, 1))
            self.head.weight.copy_(torch.tensor([[0.0, 20.0, 1.0, 0.0], [-20.0, 0.0, 1.0, 20.0]]))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.features(images)).flatten(1))


def test_channel_attribution_finds_the_channel() -> None:
    explanandum = Explanandum(TwoChannels(), num_classes=2, mean=0.0, std=1.0)
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.1
    method = ExtremalPerturbation(explanandum, areas=[1, 0.5], layer="features")
    found = method.channel_masks(images, [0, 1])
    assert found.kept == (1, 2)
    assert found.masks.shape == (2, 2, 4)
    torch.testing.assert_close(found.masks[0, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]), atol=0.1, rtol=0)
    torch.testing.assert_close(found.masks[1, 0], torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=0.1, rtol=0)
    activation = explanandum.classifier.features(images)
    expected = (found.masks[:, :, :, None, None] * activation[:, None]).sum(2)
    torch.testing.assert_close(found.saliency, expected)
    smallest = (found.preserved[:, 0] < found.original).long()  # one channel where it suffices, else both
    torch.testing.assert_close(method(images, [0, 1]), expected[torch.arange(2), smallest])
    for output, maps in (("sum", expected.sum(1)), ("all", expected)):
        made = ExtremalPerturbation(explanandum, areas=[1, 0.5], layer="features", output=output)(images, [0, 1])
        torch.testing.assert_close(made, maps)
    logits = explanandum.classifier.head((activation * found.masks[:, 0, :, None, None]).mean((2, 3)))
    torch.testing.assert_close(found.preserved[:, 0], logits[[0, 1], [0, 1]])
    torch.testing.assert_close(found.rewards, found.preserved)
    assert not explanandum.classifier.features._forward_hooks


def test_channel_attribution_refuses_unsuitable_layers() -> None:
    explanandum = convolutional()
    images, index = pictures(1, 8), torch.tensor([0])
    with pytest.raises(UnsupportedLayerError, match=r"feature map"):
        channel_masks(explanandum, "6", images, index, [0.5], iterations=2)
    with pytest.raises(ConfigError, match="has 8"):
        channel_masks(explanandum, "2", images, index, [9], iterations=2)
    twice = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    twice[2] = twice[0]
    with pytest.raises(ConfigError, match="more than once"):
        channel_masks(Explanandum(twice, 3, mean=0.0, std=1.0), "0", images, index, [0.5], iterations=2)
    with pytest.raises(ConfigError, match="channel_masks"):
        ExtremalPerturbation(explanandum, layer="0").masks(images, 0)
    with pytest.raises(ConfigError, match="layer"):
        ExtremalPerturbation(explanandum).channel_masks(images, 0)


def test_fast_starts_at_ones_and_a_tenth_lower_where_the_evidence_is_not() -> None:
    images = torch.ones(2, 3, 16, 16)
    options: dict[str, Any] = {"perturbation": "fade", "jitter": False, "step": 1, "sigma": 3, "area_on": "image", "max_iterations": 1}
    method = ExtremalPerturbation(quadrants(), [0.1, 0.25], schedule="fast", **options)
    found = method.masks(images, [3, 0])  # a single iteration takes no step
    start = found.parameters.flatten(0, -3).unflatten(0, (2, 2))  # image, area
    assert start.min() >= 0.9 - 1e-6 and start.max() <= 1
    pointed = (start - 0.9) / 0.1
    inside = torch.stack([pointed[0, :, 8:, 8:], pointed[1, :, :8, :8]]).mean((2, 3))
    outside = (pointed.mean((2, 3)) - inside / 4) * 4 / 3
    assert (inside[:, 1] > 0.25).all() and (outside < 0.05).all() and (inside[:, 0] < inside[:, 1]).all()
    chunked = ExtremalPerturbation(quadrants(), [0.1, 0.25], schedule="fast", rows_per_pass=1, **options).masks(images, [3, 0])
    torch.testing.assert_close(chunked.parameters, found.parameters)
    given = ExtremalPerturbation(quadrants(), [0.25], schedule="fast", init=0.5, **options).masks(images, [3, 0])
    assert (given.parameters == 0.5).all()
