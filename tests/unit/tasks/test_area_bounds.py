"""``losses.area_bound: auto``: bounds from the classifier's own evidence, on objects of a known size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explainer import Explanandum
from explainer.data.contract import Sample
from explainer.errors import ConfigError
from explainer.losses.area import AreaBound, bound_penalty
from explainer.losses.base import Explanation
from explainer.tasks import area_bounds
from explainer.tasks.area_bounds import bounds, evidence_areas, settle

SIDE = 32
PIXELS = {0: 256, 1: 4}  # of the red objects and of the blue ones
NAMES = ("red", "blue")


class Planted(nn.Module):
    """Logit 10 (share of a class's object that is seen - 1/2): red objects have 256 pixels, blue ones 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(x).relu().sum(dim=(2, 3)) / torch.tensor([float(PIXELS[0]), float(PIXELS[1])])
        return 10 * (seen - 0.5)


def explanandum() -> Explanandum:
    return Explanandum(Planted(), 2, "multilabel", mean=[0.0] * 3, std=[1.0] * 3, class_names=NAMES)


def picture(k: int, at: int) -> Tensor:
    """Black, with one object of class k."""
    x, side = torch.zeros(3, SIDE, SIDE), int(PIXELS[k] ** 0.5)
    x[2 * k, at : at + side, at : at + side] = 1
    return x


class Pictures:
    """Four of each class."""

    cheap_targets = True
    num_classes, class_names = 2, NAMES

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Sample:
        return Sample(picture(i % 2, i // 2 + 1), torch.eye(2)[i % 2], str(i))

    def dataset(self, split: str) -> Pictures:
        assert split == "train"
        return self

    def members(self, split: str) -> list[list[int]]:
        return [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_share_that_keeps_half_and_the_share_that_leaves_half() -> None:
    images = torch.stack([picture(0, 2), picture(1, 5)])
    shares = tuple(n / SIDE**2 for n in (1, 2, 3, 4, 64, 127, 128, 129, 256))
    enough, every = evidence_areas(
        explanandum(), lambda x, k: x[torch.arange(2), 2 * k], images, torch.tensor([0, 1]), fill="black", shares=shares
    )
    # Half of the probability (0.497) is reached with half of the object (0.5): 128 of 256 pixels, 2 of 4. Removing half leaves 0.5, which
    # is more than 0.497, so one pixel more has to go.
    assert (enough * SIDE**2).tolist() == [128, 2] and (every * SIDE**2).tolist() == [129, 3]


def test_each_class_has_bounds_around_its_own_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    term = AreaBound(min_area="auto", max_area="auto")
    settle([term], explanandum(), Pictures(), tmp_path, seed=0, fill="black")  # type: ignore[arg-type]
    low, high = term.bounds_of(torch.tensor([0, 1]))
    true = torch.tensor([256.0, 4.0]) / SIDE**2
    assert bool((low < true).all()) and bool((true <= high).all()) and float(high[1]) < float(low[0]), "no bound fits both"
    assert "the evidence of blue is a few pixels large: raise data.options.size" in caplog.text
    saved = json.loads((tmp_path / "area_bounds.json").read_text())
    assert list(saved["bounds"]) == list(NAMES)
    again, measured = AreaBound(min_area="auto", max_area=0.9), area_bounds.measure
    area_bounds.measure = None  # type: ignore[assignment]  # what is written there is not measured again
    try:
        settle([again], explanandum(), Pictures(), tmp_path, seed=0, fill="black")  # type: ignore[arg-type]
    finally:
        area_bounds.measure = measured
    assert torch.equal(again.bounds_of(torch.tensor([0]))[0], low[:1]) and float(again.bounds_of(torch.tensor([0]))[1]) == pytest.approx(
        0.9
    )


def test_scores_alone_are_enough(tmp_path: Path) -> None:
    class Scores(Explanandum):
        differentiable = False  # type: ignore[assignment]

    blind = Scores(Planted(), 2, "multilabel", mean=[0.0] * 3, std=[1.0] * 3, class_names=NAMES)
    found = area_bounds.measure(blind, Pictures(), 0, "black")  # type: ignore[arg-type]
    assert found["red"][0] <= 256 / SIDE**2 <= found["red"][1] and found["blue"][1] < found["red"][1]


def test_bounds_are_half_the_lower_and_twice_the_upper_quartile() -> None:
    areas = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    low, high = bounds([(areas, areas), (torch.empty(0), torch.empty(0))], 100)
    assert low.tolist() == pytest.approx([0.1, 0.1]) and high.tolist() == pytest.approx([0.8, 0.8])  # quartiles 0.2 and 0.4
    low, high = bounds([(torch.tensor([0.002]), torch.tensor([0.6]))], 100)
    assert low.tolist() == pytest.approx([0.01]) and high.tolist() == pytest.approx([0.95]), "at least a pixel, at most nearly all"


def explanation(masks: Tensor, targets: Tensor) -> Explanation:
    rest: dict[str, Any] = dict.fromkeys(Explanation.__dataclass_fields__)
    return Explanation(**{**rest, "class_masks": masks, "targets": targets})


def test_every_mask_is_bound_by_its_own_class() -> None:
    masks = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[1.0, 1], [0, 1], [0, 0]])
    term = AreaBound(min_area="auto", max_area="auto")
    with pytest.raises(ConfigError, match="nobody has measured"):
        term.value(explanation(masks, targets))
    term.use(torch.tensor([0.2, 0.01]), torch.tensor([0.5, 0.1]))
    first = (bound_penalty(masks[:1, 0], 0.2, 0.5) + bound_penalty(masks[:1, 1], 0.01, 0.1)) / 2
    expected = (first + bound_penalty(masks[1:2, 1], 0.01, 0.1)) / 3
    assert float(term.value(explanation(masks, targets))) == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(ConfigError, match="min_area must be a share of the image in"):
        AreaBound(min_area="none")  # type: ignore[arg-type]


def test_a_number_that_is_given_stays() -> None:
    term = AreaBound(min_area=0.2, max_area="auto")
    term.use(torch.tensor([0.01, 0.01]), torch.tensor([0.1, 0.5]))
    low, high = term.bounds_of(torch.tensor([0, 1]))
    assert low.tolist() == pytest.approx([0.2, 0.2]) and high.tolist() == pytest.approx([0.2, 0.5])
    assert AreaBound(min_area=0.1, max_area=0.3).bounds_of(torch.tensor([1]))[1].tolist() == pytest.approx([0.3])
    assert not AreaBound().needs_bounds and AreaBound(max_area="auto").needs_bounds
