"""Boxes by threshold rules, and how much of a class's probability an edit leaves, against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explainer.errors import ConfigError
from explainer.evaluation.protocols.box_deletion import resized_boxes
from explainer.metrics.boxes import box_masks, thresholds, tight_boxes
from explainer.metrics.suppression import Suppression, fully_blurred
from explainer.models.explanandum import Explanandum

# 4 x 5 with the values 8, 4, 4, 2, 2 (sum 20, mean 1) and zeros elsewhere; in [0,1]: 1, .5, .5, .25, .25 (sum 2.5, mean .125).
MAP = torch.zeros(1, 4, 5)
MAP[0, 1, 1], MAP[0, 1, 2], MAP[0, 2, 1], MAP[0, 3, 4], MAP[0, 0, 0] = 8.0, 4.0, 4.0, 2.0, 2.0
WHOLE = [0, 0, 5, 4]


@pytest.mark.parametrize(
    ("rule", "alpha", "box"),
    [
        ("value", 0.0, WHOLE),
        ("value", 0.25, WHOLE),
        ("value", 0.3, [1, 1, 3, 3]),
        ("value", 0.6, [1, 1, 2, 2]),
        ("energy", 0.0, WHOLE),  # the empty set: nothing survives
        ("energy", 0.4, [1, 1, 2, 2]),  # the highest pixel holds exactly 0.4
        ("energy", 0.41, [1, 1, 3, 3]),  # one of the two equal ones is needed: both survive
        ("energy", 0.8, [1, 1, 3, 3]),
        ("energy", 0.81, WHOLE),
        ("mean", 2.0, WHOLE),
        ("mean", 2.5, [1, 1, 3, 3]),
        ("mean", 4.5, [1, 1, 2, 2]),
        ("mean", 8.5, WHOLE),  # above the maximum nothing survives
    ],
)
def test_boxes_of_the_three_rules(rule, alpha, box):
    assert tight_boxes(MAP, thresholds(MAP, rule, [alpha]))[0, 0].tolist() == box


def test_boxes_are_found_by_looking_at_every_pixel():
    maps = torch.rand(6, 9, 7, generator=torch.Generator().manual_seed(0)) ** 6
    limits = thresholds(maps, "value", [0.1, 0.4, 0.9])
    scaled = (maps - maps.amin((1, 2), keepdim=True)) / (maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True))
    for p in range(6):
        for a in range(3):
            y, x = (scaled[p].double() >= limits[p, a]).nonzero(as_tuple=True)
            expected = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
            assert tight_boxes(maps, limits)[p, a].tolist() == expected


def test_a_box_as_a_mask():
    mask = box_masks(torch.tensor([1, 0, 3, 2]), (3, 4))
    assert mask.int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="value, energy, mean"):
        thresholds(MAP, "median", [0.5])  # type: ignore[arg-type]


def test_boxes_grow_about_their_centre_and_stay_inside():
    # 10 x 10 about (50, 50) to a quarter of 100 x 100: 50 x 50 about the same centre. In the corner it is moved inside.
    assert resized_boxes(torch.tensor([[45.0, 45, 55, 55]]), 0.25, (100, 100)).tolist() == [[25, 25, 75, 75]]
    assert resized_boxes(torch.tensor([[0.0, 90, 10, 100]]), 0.25, (100, 100)).tolist() == [[0, 50, 50, 100]]
    # 10 rows and 90 columns to a half: the width cannot exceed 100, the height becomes 50.
    assert resized_boxes(torch.tensor([[5.0, 45, 95, 55]]), 0.5, (100, 100)).tolist() == [[0, 25, 100, 75]]


class Mean(nn.Module):
    """Logit of class 0: ten times the mean of the first channel minus five."""

    def forward(self, images):
        value = 10 * images[:, 0].mean((1, 2)) - 5
        return torch.stack([value, torch.zeros_like(value)], 1)


def test_suppression_is_one_for_the_image_zero_for_its_blur_and_undefined_where_blur_does_nothing():
    model = Explanandum(Mean(), 2, "multilabel", mean=(0, 0, 0), std=(1, 1, 1))
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = fully_blurred(images)
    darker = blurred.clone()
    darker[0] *= 0.5
    q = Suppression(model, images, torch.tensor([0, 0]), darker)
    p = model.probabilities(model(images))[:, 0].double()
    low = model.probabilities(model(darker))[:, 0].double()
    assert q.undefined.tolist() == [False, True]  # a blur keeps the mean: nothing is suppressed
    assert float(q(images)[0]) == pytest.approx(1) and float(q(darker)[0]) == pytest.approx(0, abs=1e-9)
    half = model.probabilities(model(images * 0.9))[:, 0].double()
    assert float(q(images * 0.9)[0]) == pytest.approx(float((half - low)[0] / (p - low)[0]))
    assert q(images).isnan().tolist() == [False, True]
