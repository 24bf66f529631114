"""The comparison that ``fit`` ends with, on a classifier whose evidence is one bright quarter of the image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from explainer import Explanandum
from explainer.inference.rivals import CONSTANT, OTHERS, START, UNTRAINED, Comparison, compare, pinned, placed, weaker_than_majority


class Brightest(nn.Module):
    """Logit 16 (m - 0.5) of the brightest quarter's mean m."""

    def forward(self, x: Tensor) -> Tensor:
        m = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8).flatten(1).amax(1)
        return torch.stack([16 * (m - 0.5), 16 * (0.5 - m)], dim=1)


def explanandum() -> Explanandum:
    return Explanandum(Brightest(), 2, "multilabel", mean=[0.0] * 3, std=[1.0] * 3)


def quarters(number: int = 8) -> Tensor:
    """``[N,16,16]``, 1 on one quarter, each time the next one."""
    masks = torch.zeros(number, 16, 16)
    for i in range(number):
        y, x = divmod(i % 4, 2)
        masks[i, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 1
    return masks


def test_values_stay_and_places_change() -> None:
    own = torch.tensor([[[0.2, 0.9], [0.5, 0.1]]])
    order = torch.tensor([[[4.0, 1.0], [2.0, 3.0]]])
    assert torch.equal(placed(own, order), torch.tensor([[[0.9, 0.1], [0.2, 0.5]]]))


def test_masks_on_the_evidence_beat_all_that_know_less_and_not_what_finds_it_too() -> None:
    masks = quarters()
    images = masks[:, None].expand(-1, 3, -1, -1).contiguous()
    rivals = {"Grad-CAM": masks * 5 + 1, UNTRAINED: torch.rand(8, 16, 16, generator=torch.Generator().manual_seed(0))}
    found = compare(explanandum(), images, masks, torch.zeros(8, dtype=torch.long), rivals, fill="black")
    assert found.better == (CONSTANT, OTHERS, UNTRAINED) and found.equal == ("Grad-CAM",) and found.worse == ()
    # sigmoid(8) with the quarter, sigmoid(-8) without it; a constant of a quarter shows 0.25 and leaves 0.75: sigmoid(-4) - sigmoid(4)
    assert found.kept == pytest.approx(0.99966, abs=1e-4) and found.left == pytest.approx(0.00034, abs=1e-4)
    assert found.scores[CONSTANT] == pytest.approx(-0.9640, abs=1e-3)
    (said,) = found.sentences(["masking.binarize: 0.5"])
    assert "better than a constant (-0.96)" in said and "not told apart from Grad-CAM (1.00)" in said


def test_masks_beside_the_evidence_are_told_with_what_is_not_set_yet() -> None:
    images = quarters()[:, None].expand(-1, 3, -1, -1).contiguous()
    beside = quarters().roll(1, 0)  # always the quarter before
    found = compare(explanandum(), images, beside, torch.zeros(8, dtype=torch.long), {"Grad-CAM": images[:, 0]}, fill="black")
    assert found.worse == (CONSTANT, "Grad-CAM") and found.equal == (OTHERS,) and found.better == ()
    warning = found.sentences(["masking.binarize: 0.5"])[1]
    assert warning.startswith("WARNING: the masks keep and remove their class no better than") and warning.endswith(
        "Not set yet: masking.binarize: 0.5."
    )


def test_masks_that_begin_as_class_activations_may_keep_as_much_as_they_did_and_not_less() -> None:
    masks = quarters()
    images, classes = masks[:, None].expand(-1, 3, -1, -1).contiguous(), torch.zeros(8, dtype=torch.long)
    found = compare(explanandum(), images, masks, classes, {START: masks}, fill="black")
    assert found.equal == (START,) and len(found.sentences(["more steps"])) == 1, "evidence that was known before is no fault"
    scores = {"own": 0.6, CONSTANT: -0.9, START: 0.8}
    spoilt = Comparison(images=24, whole=0.99, kept=0.9, left=0.3, scores=scores, better=(CONSTANT,), equal=(), worse=(START,))
    warning = spoilt.sentences()[1]
    assert warning.startswith("WARNING: the masks keep and remove their class less well than the masks that training began with")
    assert "a lower optimizer.lr" in warning


def test_an_area_that_the_bound_decides_is_told() -> None:
    (said,) = pinned([0.3, 0.31, 0.29, 0.3, 0.1], [0.05] * 5, [0.3] * 5)
    assert said.startswith("WARNING: 4 of 5 masks have the largest area that losses.area_bound allows (mean 0.260)")
    assert pinned([0.1, 0.2, 0.25, 0.3], [0.05] * 4, [0.3] * 4) == []
    (said,) = pinned([0.05] * 4, [0.05] * 4, [0.3] * 4)
    assert "the smallest area" in said and "min_area" in said
    assert pinned([0.0] * 4, [0.0] * 4, [0.3] * 4) == [], "no lower bound holds nothing"


def test_a_classifier_weaker_than_one_answer_for_all_is_told() -> None:
    targets = torch.eye(3)[[0, 0, 0, 1, 2]]
    wrong = torch.eye(3)[[1, 2, 0, 1, 0]]  # right for two of five, the first class would be right for three
    (said,) = weaker_than_majority(wrong, targets, ["scratch", "dent", "free"])
    assert "right for 40 % of 5 val pictures, always answering scratch for 60 %" in said
    assert weaker_than_majority(targets, targets, ["scratch", "dent", "free"]) == []
    assert weaker_than_majority(torch.ones(2, 3), torch.zeros(2, 3), ["a", "b", "c"]) == [], "no picture has a label"
