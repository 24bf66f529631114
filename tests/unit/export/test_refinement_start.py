"""The start of a refinement: the mask given, at the area searched, with edges that the area penalty accepts."""

import pytest
import torch

from explainer import baselines
from explainer.baselines.kernels.smooth_mask import area_penalty, excluded
from explainer.inference.refinement import extremal_start
from explainer.models.explanandum import Explanandum


@pytest.mark.parametrize("area", [0.1, 0.2])
def test_start_is_the_mask_at_its_area_with_steep_edges(area):
    explanandum = Explanandum(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()), num_classes=3, task="multilabel")
    search = baselines.build("extremal_perturbation", explanandum, areas=[area], schedule="fast")
    images = torch.rand(1, 3, 64, 64)
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:40, 20:44] = 1  # 14 % of the image
    family = search.generator_for(images)
    full = family.padded_masks(extremal_start(search, images, mask)[0])
    assert float(family.crop(full).mean()) == pytest.approx(area, abs=0.01)
    inside = family.crop(full)[0, 24:32, 28:36]
    assert float(inside.min()) > 0.7  # the middle of the mask is shown, and
    assert float(family.crop(full)[0, :4].max()) < 0.01  # far away nothing is
    shown = family.crop(full)
    penalty = area_penalty(shown, excluded(shown[0].numel(), [area], shown.device))
    assert float(penalty) < 0.25 * area * (1 - area)  # a flat mask of this area costs area (1 - area)
