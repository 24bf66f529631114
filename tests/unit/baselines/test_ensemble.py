"""The mean of several methods' maps: hand-worked numbers, mirror images, and what a map cache knows of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from explainer import Explanandum
from explainer.attribution.map_cache import method_key
from explainer.baselines import build
from explainer.baselines.ensemble import Ensemble
from explainer.errors import ConfigError


class Weighted(nn.Module):
    """Logits: weighted sums of the pixels; the gradient of logit k is the k-th weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(8.0).view(2, 1, 2, 2).expand(2, 3, 2, 2).clone() - 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight)


def explanandum() -> Explanandum:
    return Explanandum(Weighted(), 2, mean=0.0, std=1.0)


class AnySize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, :2]


SIGNED = {"name": "gradient", "options": {"reduction": "mean", "absolute": False}}
TIMES_INPUT = {"name": "input_x_gradient", "options": {"reduction": "mean"}}


def test_positive_parts_over_their_maxima_are_averaged_by_hand() -> None:
    images = torch.ones(1, 3, 2, 2)
    images[..., 1, 1] = 0.5
    # Logit 0: gradient [[-2, -1], [0, 1]], times the input [[-2, -1], [0, .5]]; positive parts over 1 and .5 are 1 in the corner.
    torch.testing.assert_close(
        build("ensemble", explanandum(), methods=[SIGNED, TIMES_INPUT])(images, 0), torch.tensor([[[0.0, 0], [0, 1]]])
    )
    # Logit 1: [[2, 3], [4, 5]] / 5 and [[2, 3], [4, 2.5]] / 4, weights 3 to 1.
    expected = 0.75 * torch.tensor([[2.0, 3], [4, 5]]) / 5 + 0.25 * torch.tensor([[2.0, 3], [4, 2.5]]) / 4
    method = build("ensemble", explanandum(), methods=[SIGNED, TIMES_INPUT], weights=[3, 1])
    torch.testing.assert_close(method(images, 1), expected[None])
    torch.testing.assert_close(method.all_classes(images)[:, 1], expected[None])


@pytest.mark.parametrize(
    ("flips", "expected"),
    [("horizontal", [[2.5, 2.5], [4.5, 4.5]]), ("both", [[3.5, 3.5], [3.5, 3.5]]), ("none", [[2.0, 3.0], [4.0, 5.0]])],
)
def test_mirror_images_are_turned_back(flips: str, expected: list[list[float]]) -> None:
    # The gradient is the same for every image, so turned back it is mirrored.
    maps = build("ensemble", explanandum(), methods=[SIGNED], flips=flips)(torch.rand(1, 3, 2, 2), 1)
    torch.testing.assert_close(maps[0], torch.tensor(expected) / max(max(row) for row in expected))


def test_of_a_method_that_follows_the_picture_mirror_images_change_nothing() -> None:
    images, masks = torch.rand(2, 3, 4, 4), (torch.rand(2, 2, 4, 4) > 0.5).float()
    maps = build("ensemble", explanandum(), methods=["ground_truth"], flips="both")(images, [0, 1], masks=masks)
    torch.testing.assert_close(maps, masks[[0, 1], [0, 1]])


def test_scales_are_means_of_maps_each_over_its_maximum() -> None:
    """A method that follows the picture: its map of a copy, back at the picture's size, over the copy's own maximum."""
    image = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0.5], [0, 0, 0, 0.5]]).expand(1, 3, 4, 4)

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x.square().mean((1, 2, 3))[:, None].expand(-1, 2)  # the gradient is the picture over 3 H W

    model = Explanandum(Seen(), 2, mean=0.0, std=1.0)
    half = torch.tensor([[[[0.0, 1], [0, 0.25]]]])  # means of squares of two by two pixels
    expected = 0.5 * image[:, 0] + 0.5 * nn.functional.interpolate(half, (4, 4), mode="bilinear", align_corners=False)[:, 0]
    method = build("ensemble", model, methods=[SIGNED], scales=[1, 0.5])
    torch.testing.assert_close(method(image, 0), expected)
    torch.testing.assert_close(method.all_classes(image)[:, 1], expected)


def test_masks_follow_the_scale() -> None:
    images, masks = torch.rand(2, 3, 4, 4), torch.zeros(2, 2, 4, 4)
    masks[:, :, :2, 2:] = 1
    maps = build("ensemble", explanandum(), methods=["ground_truth"], scales=[0.5, 1.0, 2.0], flips="horizontal")(
        images, [0, 1], masks=masks
    )
    half = nn.functional.interpolate(masks[:, :, ::2, ::2], (4, 4), mode="bilinear", align_corners=False)[[0, 1], [0, 1]]
    double = nn.functional.interpolate(masks.repeat_interleave(2, -1).repeat_interleave(2, -2), (4, 4), mode="bilinear")[[0, 1], [0, 1]]
    torch.testing.assert_close(maps, (half + masks[[0, 1], [0, 1]] + double) / 3)


def test_a_classifier_of_one_size_is_told_what_to_leave_out() -> None:
    method = build("ensemble", explanandum(), methods=[SIGNED], scales=[1.0, 1.5])  # its weights are two pixels wide
    with pytest.raises(ConfigError, match=r"scales 1.5 .* pictures of 3 x 3 px and refuses them .*Leave scales at 1"):
        method(torch.rand(1, 3, 2, 2), 0)
    with pytest.raises(RuntimeError, match=r"size|subscript"):  # not the scale's fault
        build("ensemble", explanandum(), methods=[SIGNED])(torch.rand(1, 3, 5, 5), 0)


def test_errors_of_other_causes_keep_their_words() -> None:
    images = torch.rand(1, 3, 2, 2)
    with pytest.raises(ConfigError, match=r"^class_index must lie in"):
        build("ensemble", Explanandum(AnySize(), 2, mean=0.0, std=1.0), methods=[SIGNED], scales=[2]).all_classes(images, [7])
    with pytest.raises(RuntimeError, match=r"size|subscript"):  # the picture keeps its size
        build("ensemble", explanandum(), methods=[SIGNED], scales=[1.001])(torch.rand(1, 3, 5, 5), 0)


def test_a_memory_error_is_not_the_size_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build("ensemble", Explanandum(AnySize(), 2, mean=0.0, std=1.0), methods=[SIGNED], scales=[2])

    def full(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(method.members[0], "_explain", full)
    with pytest.raises(RuntimeError, match=r"^.enforce fail"):
        method(torch.rand(1, 3, 2, 2), 0)


def test_scales_that_the_classifier_would_undo_are_refused() -> None:
    fixed = Explanandum(Weighted(), 2, mean=0.0, std=1.0, input_size=2)
    with pytest.raises(ConfigError, match="resizes every picture to 2 px"):
        build("ensemble", fixed, methods=[SIGNED], scales=[1, 2])
    assert build("ensemble", fixed, methods=[SIGNED])(torch.rand(1, 3, 6, 6), 0).shape == (1, 6, 6)


def test_a_map_that_says_nothing_counts_nothing() -> None:
    model = explanandum()
    nn.init.constant_(model.classifier.weight, -1.0)
    assert build("ensemble", model, methods=[SIGNED])(torch.rand(1, 3, 2, 2), 0).abs().max() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"methods": "gradient"},
        {"methods": []},
        {"methods": ["ensemble"]},
        {"methods": [{"options": {}}]},
        {"methods": [{"name": "gradient", "optoins": {}}]},
        {"weights": [1]},
        {"weights": [0, 0]},
        {"weights": [2, -1]},
        {"flips": "vertical"},
        {"scales": []},
        {"scales": [0]},
        {"scales": ["two"]},
    ],
    ids=str,
)
def test_refusals_name_the_option_and_the_value(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"ensemble: .*{next(iter(options))}"):
        build("ensemble", explanandum(), **options)


def test_a_cache_knows_the_revisions_of_all_methods_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"methods": ["grad_cam", {"name": "guided_filter", "options": {"method": "srd"}}]}
    before = method_key("ensemble", Ensemble, options)
    assert [key["name"] for key in before["inner"]] == ["grad_cam", "guided_filter"]
    assert before["inner"][1]["inner"]["name"] == "srd"
    assert (
        before
        == method_key("ensemble", Ensemble, {**options, "flips": "none"})
        != method_key("ensemble", Ensemble, {**options, "flips": "both"})
    )
    from explainer.baselines.srd import SRD

    monkeypatch.setattr(SRD, "revision", SRD.revision + 1)
    assert method_key("ensemble", Ensemble, options) != before
