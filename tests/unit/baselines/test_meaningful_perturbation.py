"""Meaningful perturbation: hand-worked terms, a slow derivation of the objective, the disc start, both games."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import explainer.baselines as baselines
from explainer.baselines.kernels.perturbation import imsmooth
from explainer.baselines.meaningful_perturbation import MeaningfulPerturbation, centred_discs, variation
from explainer.errors import ConfigError, ShapeError
from explainer.models.explanandum import Explanandum
from tests.unit.baselines.test_extremal_perturbation import convolutional, pictures


class Spots(nn.Module):
    """Logit k is how many pixels of quadrant k are brighter than 0.7: fills and noise show none of them."""

    def forward(self, images: Tensor) -> Tensor:
        bright = (images.mean(1, keepdim=True) - 0.7).clamp_min(0)
        return 60 * F.adaptive_avg_pool2d(bright, 2).flatten(1) - 2


def spots() -> Explanandum:
    return Explanandum(Spots(), num_classes=4, mean=0.0, std=1.0)


def test_variation_by_hand() -> None:
    mask = torch.tensor([[[0.0, 1.0, 0.5], [0.0, 0.0, 0.5]]])
    # across: 1 + 1/8 + 0 + 1/8; down: 0 + 1 + 0
    assert variation(mask, 3.0).item() == pytest.approx(2.25)
    assert variation(torch.full((1, 4, 4), 0.7)).item() == 0


def test_discs_grow_to_the_corners() -> None:
    discs = centred_discs(4, 4, 2, torch.float32, torch.device("cpu"))
    assert discs[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert discs[1].tolist() == [[1] * 4] * 4


@pytest.mark.parametrize("game", ["delete", "preserve"])
def test_two_iterations_equal_the_slow_derivation(game: str) -> None:
    """The objective written with interpolate and autograd's own graph, stepped by torch.optim.Adam."""
    explanandum, images, index = convolutional(), pictures(2, 16), torch.tensor([0, 2])
    start = torch.rand(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(1 - start if game == "delete" else start.clone())
    optimizer = torch.optim.Adam([parameter], 0.1)
    blurred = imsmooth(images, 2.0, renormalize=True)
    objectives, scores = [], []
    for t in range(3):
        mask = F.interpolate(parameter[:, None], (16, 16), mode="bilinear", align_corners=False)
        probability = explanandum(images * mask + blurred * (1 - mask)).sigmoid()[[0, 1], index]
        size = (1 - parameter).abs().sum((1, 2)) if game == "delete" else parameter.abs().sum((1, 2))
        cost = 0.003 * size + 0.02 * variation(parameter, 2.0) + (probability if game == "delete" else -probability)
        objectives.append(-cost.detach())
        scores.append(probability.detach())
        if t < 2:
            optimizer.zero_grad()
            cost.sum().backward()
            optimizer.step()
            with torch.no_grad():
                parameter.clamp_(0, 1)
    method = MeaningfulPerturbation(
        explanandum,
        game=game,
        iterations=3,
        l1=0.003,
        l2=0.02,
        beta=2.0,
        grid=4,
        mask_sigma=0.0,
        blur_sigma=2.0,
        jitter=0,
        init=start,
        blend="mix",
    )
    found = method.masks(images, index)
    torch.testing.assert_close(method.history.values["objective"], torch.stack(objectives), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(method.history.values["score"], torch.stack(scores), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.scores, scores[-1], rtol=1e-6, atol=1e-8)
    kept = F.interpolate(parameter.detach()[:, None], (16, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found.maps, 1 - kept if game == "delete" else kept, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("perturbation", ["blur", "constant", "noise"])
@pytest.mark.parametrize("game", ["delete", "preserve"])
def test_finds_the_quadrant(game: str, perturbation: str) -> None:
    images = pictures(1, 16, torch.float32) * 0.2
    images[:, :, 2:6, 10:14] = 1.0  # a bright square in quadrant 1, which any fill destroys
    method = baselines.build(
        "meaningful_perturbation", spots(), game=game, perturbation=perturbation, iterations=60, grid=8, blur_sigma=6.0, l1=5e-3
    )
    maps = method(images, 1)
    inside = maps[0, :8, 8:].mean()
    assert inside > 2 * maps[0, 8:].mean()
    assert inside > 2 * maps[0, :, :8].mean()


def test_disc_start_is_the_smallest_with_the_effect() -> None:
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 6:10, 6:10] = 1.0  # evidence in the centre only: a small disc destroys or keeps all of it
    for game in ("delete", "preserve"):
        method = MeaningfulPerturbation(spots(), game=game, perturbation="constant", max_iterations=1, grid=16, mask_sigma=0.0, jitter=0)
        found = method.masks(images, 0)
        radius_needed = 1.5 * 2**0.5  # the square's corner pixels lie 1.5 pixels off the centre on each axis
        corner = 7.5 * 2**0.5
        chosen = next(k for k in range(1, 17) if corner * k / 16 >= radius_needed - 1e-6)
        expected = centred_discs(16, 16, 16, torch.float32, torch.device("cpu"))[chosen - 1]
        torch.testing.assert_close(found.parameters[0], expected)


def test_batch_equals_singles_and_passes_do_not_matter() -> None:
    explanandum, images = convolutional(), pictures(3, 16)
    options: dict[str, Any] = {"iterations": 8, "grid": 4, "perturbation": "noise"}
    whole = MeaningfulPerturbation(explanandum, **options)(images, [0, 1, 2])
    for b in range(3):
        torch.testing.assert_close(MeaningfulPerturbation(explanandum, **options)(images[b : b + 1], b)[0], whole[b], rtol=1e-8, atol=1e-9)
    chunked = MeaningfulPerturbation(explanandum, **options, rows_per_pass=2)(images, [0, 1, 2])
    torch.testing.assert_close(chunked, whole, rtol=1e-8, atol=1e-9)


def test_starts_and_limits() -> None:
    explanandum, images = convolutional(), pictures(2, 16)

    def first(init: Any, game: str = "delete") -> Tensor:
        return MeaningfulPerturbation(explanandum, game=game, max_iterations=1, grid=4, init=init).masks(images, 0).parameters

    evidence = torch.rand(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = evidence.repeat_interleave(4, 1).repeat_interleave(4, 2)
    for game in ("delete", "preserve"):
        torch.testing.assert_close(first(evidence, game), evidence)
        torch.testing.assert_close(first(full, game), evidence)
        torch.testing.assert_close(first(lambda x, k: full, game), evidence)
        torch.testing.assert_close(first(0.25, game), torch.full((2, 4, 4), 0.25, dtype=torch.float64))
    with pytest.raises(ShapeError, match="init"):
        first(torch.ones(2, 5, 5))
    method = MeaningfulPerturbation(explanandum, grid=4, tolerance=10.0, patience=4)
    method(images, 0)
    assert len(method.history.active) == 4
    method = MeaningfulPerturbation(explanandum, grid=4, budget_s=0.0)
    method(images, 0)
    assert len(method.history.active) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"game": "hybrid"}, "delete, preserve"),
        ({"perturbation": "fade"}, "blur, constant"),
        ({"iterations": 0}, "iterations"),
        ({"init": "square"}, "disc"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeaningfulPerturbation(spots(), **options)


def seen_by_the_classifier(mask: Tensor, images: Tensor, **options: object) -> Tensor:
    """What a classifier is shown behind a full-size mask: logit k is pixel k."""

    class Pixels(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    count = images[0].numel()
    explanandum = Explanandum(Pixels(), num_classes=count, task="multilabel", mean=0.0, std=1.0)
    shown = torch.empty(count, dtype=images.dtype)
    method = MeaningfulPerturbation(
        explanandum,
        game="preserve",
        iterations=1,
        grid=images.shape[-1],
        mask_sigma=0.0,
        jitter=0,
        init=mask,
        **options,  # type: ignore[arg-type]
    )
    for k in range(count):
        shown[k] = method.masks(images, k).scores[0]
    return shown.logit().view_as(images[0])


def test_blur_of_varying_width_equals_a_gaussian_per_pixel() -> None:
    """Each pixel is the average of the image under its own Gaussian of width 4 (1 - m), cut off and renormalised at the border."""
    coarse = torch.rand(1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (6, 6), mode="bilinear", align_corners=True)
    mask = torch.linspace(0, 1, 36, dtype=torch.float64).view(1, 6, 6)
    exact = torch.empty(3, 6, 6, dtype=torch.float64)
    place = torch.arange(6, dtype=torch.float64)
    for y in range(6):
        for x in range(6):
            sigma = 4 * (1 - float(mask[0, y, x])) + 1e-7
            window = torch.exp(-((place[:, None] - y) ** 2 + (place - x) ** 2) / (2 * sigma**2))
            exact[:, y, x] = (images[0] * window).sum((1, 2)) / window.sum()
    shown = seen_by_the_classifier(mask, images, blur_sigma=4.0, blend="width")
    torch.testing.assert_close(shown, exact, atol=0.02, rtol=0)
    mixed = seen_by_the_classifier(mask, images, blur_sigma=4.0, blend="mix")
    assert (mixed - exact).abs().max() > 0.04  # the public code's formula is another one
    binary = (mask > 0.5).double()
    ends = [seen_by_the_classifier(binary, images, blur_sigma=4.0, blend=blend) for blend in ("width", "mix")]
    torch.testing.assert_close(ends[0], ends[1])


def test_noise_is_gaussian_around_the_mean_colour_and_independent_per_pixel() -> None:
    images = torch.full((1, 3, 8, 8), 0.5, dtype=torch.float64)
    noise = (seen_by_the_classifier(torch.zeros(1, 8, 8, dtype=torch.float64), images, perturbation="noise") - 0.5) / 0.2
    expected = torch.randn((1, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)[0]
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-8)
