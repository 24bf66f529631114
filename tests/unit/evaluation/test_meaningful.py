"""The experiments of meaningful perturbation: localisation, deletion, boxes, adversarial images."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from explainer.baselines import build
from explainer.data.contract import collate
from explainer.evaluation.detector import detection_accuracy
from explainer.evaluation.protocols.adversarial import Adversarial, fast_gradient_sign
from explainer.evaluation.protocols.box_deletion import BoxDeletion
from explainer.evaluation.protocols.localization import Localization
from explainer.evaluation.protocols.mask_deletion import MaskDeletion
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Scene
from explainer.evaluation.statistics import statistic
from explainer.models.explanandum import Explanandum
from tests.unit.evaluation.factories import Dense, data, method


class Left(nn.Module):
    """Class 0: how striped the left half is (logit -4 to 4); classes 1 and 2 never. A blur takes the stripes away."""

    def forward(self, images):
        left = 8 * images[..., : images.shape[-1] // 2].diff(dim=-1).abs().mean((1, 2, 3)) - 4
        return torch.stack([left, torch.full_like(left, -9), torch.full_like(left, -9)], 1)


def stripes() -> torch.Tensor:
    """``[1,3,32,32]``: every second column is white."""
    image = torch.zeros(1, 3, 32, 32)
    image[..., ::2] = 1
    return image


def scene_of(images: torch.Tensor, model: nn.Module, indices: list[int]) -> Scene:
    masks = torch.zeros(len(images), 3, 32, 32, dtype=torch.bool)
    masks[:, 0, :, :15] = True  # less than half of the image: a box around everything is wrong
    targets = torch.tensor([[1.0, 0, 0]] * len(images))
    batch = replace(collate([data().dataset("test")[0]] * len(images)), images=images, targets=targets, masks=masks)
    wrapped = Explanandum(model, 3, "multilabel", mean=(0, 0, 0), std=(1, 1, 1))
    return Scene(batch, indices, wrapped)


def maps_of(scene: Scene, saliency: torch.Tensor) -> Maps:
    raw = torch.full((len(scene.images), 3, 32, 32), torch.nan)
    raw[:, 0] = saliency
    return Maps(method("given", Dense()), scene, raw)


def test_alpha_is_chosen_on_held_out_images_and_errors_are_counted_on_the_others():
    """Maps: 1 in the object, 0.4 in a frame. `value` is right from 0.45 on. Of image 1, whose frame is 0.7, only from 0.75 on."""
    scene = scene_of(stripes().repeat(4, 1, 1, 1), Left(), [0, 1, 2, 10])
    saliency = torch.zeros(4, 32, 32)
    saliency[:, :, 15:] = 0.4
    saliency[1, :, 15:] = 0.7
    saliency[:, :, :15] = 1.0
    saliency[:, 0, 31] = 0.0
    protocol = Localization()
    rows = [s.labelled("m", "raw", "p", scene) for s in protocol.score(scene, maps_of(scene, saliency))]
    assert [r.values["held_out"] for r in rows] == [1, 0, 0, 1]
    columns = protocol.columns()
    value = {name: statistic(rows, name, column, protocol=protocol, bootstrap=0).value for name, column in columns.items()}
    assert value["value_alpha"] == pytest.approx(0.45)  # the least alpha without errors on images 0 and 10
    assert value["value_error"] == pytest.approx(0.5)  # of images 1 and 2, image 1 is wrong there
    # Nothing is held out: no alpha, no number.
    none = [r for r in rows if not r.values["held_out"]]
    assert np.isnan(statistic(none, "value_error", columns["value_error"], protocol=protocol, bootstrap=0).value)


def test_any_instance_of_the_class_is_a_hit_at_the_original_resolution():
    scene = scene_of(stripes(), Left(), [1])
    boxes = [SimpleNamespace(label=0, x0=0, y0=0, x1=10, y1=10), SimpleNamespace(label=0, x0=60, y0=20, x1=100, y1=60)]
    scene.dataset = SimpleNamespace(boxes=lambda _: boxes, original_size=lambda _: (60, 100), geometry="squash")
    saliency = torch.zeros(1, 32, 32)
    saliency[0, 11:, 20:] = 1.0  # columns 62.5 to 100, rows 20.6 to 60 of the picture
    (found,) = Localization().score(scene, maps_of(scene, saliency))
    rows, errors = found.vectors["value"][21], found.vectors["value"][22:]
    assert rows == 1 and errors[0] == 1 and errors[10:] == [0.0] * 10
    # The data set's class has no box: no row.
    scene.dataset.boxes = lambda _: [SimpleNamespace(label=1, x0=0, y0=0, x1=10, y1=10)]
    assert Localization().score(scene, maps_of(scene, saliency)) == []


def test_deletion_of_the_evidence_leaves_nothing_and_of_other_places_everything():
    scene = scene_of(stripes(), Left(), [0])
    right, wrong = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    right[:, :, :16] = 1.0
    wrong[:, :, 24:] = 1.0
    (good,), (bad,) = (MaskDeletion().score(scene, maps_of(scene, m)) for m in (right, wrong))
    assert abs(good.vectors["constant"][10]) < 0.1 and abs(good.vectors["blur"][10]) < 0.1 and bad.vectors["constant"][10] > 0.95
    assert 0.05 < good.vectors["noise"][10] < 0.5  # noise has stripes of its own
    assert good.vectors["blur"][0] == pytest.approx(1)  # alpha 0 keeps every pixel
    assert good.values["blur"] == pytest.approx(np.mean(good.vectors["blur"]), abs=1e-4)


def test_the_smallest_box_that_suppresses_and_boxes_of_equal_area():
    scene = scene_of(stripes(), Left(), [0])
    saliency = torch.zeros(1, 32, 32)
    saliency[:, :, :16] = 0.5
    saliency[:, 12:20, 4:12] = 1.0
    (found,) = BoxDeletion().score(scene, maps_of(scene, saliency))
    # Of the boxes only the left half (from 0.5 on) and the whole image take everything that a blur takes.
    assert found.values["area_99"] == pytest.approx(0.5) and found.values["area_80"] == pytest.approx(0.5)
    assert found.values["q_box"] == pytest.approx(0, abs=0.02) and found.values["box_area"] == pytest.approx(0.5)
    assert found.values["mask_area"] == pytest.approx((0.5 * 512 + 0.5 * 64) / 1024)
    assert 0.2 < found.values["q_mask"] < 0.6 and len(found.vectors["q_area"]) == 6
    # Nothing to suppress: left out.
    (none,) = BoxDeletion().score(scene_of(torch.full((1, 3, 32, 32), 0.5), Left(), [0]), maps_of(scene, saliency))
    assert np.isnan(none.values["area_80"]) and np.isnan(none.values["q_box"])


class TwoSides(nn.Module):
    """Class 0: the left half's mean; class 1: the right half's."""

    def forward(self, images):
        return torch.stack([images[..., :16].mean((1, 2, 3)), images[..., 16:].mean((1, 2, 3)), torch.zeros(len(images)) - 9], 1) * 10


def test_the_attack_follows_the_slope_and_only_changed_images_have_rows():
    """Image 0 is nearly balanced: 8/255 a pixel turn it. Image 1 is not."""
    images = torch.full((2, 3, 32, 32), 0.4)
    images[0, ..., :16] += 0.02
    images[1, ..., :16] += 0.4
    scene = scene_of(images, TwoSides(), [5, 6])
    attacked = fast_gradient_sign(scene.explanandum, scene.images, scene.top, 8 / 255)
    expected = images[0].clone()
    expected[..., :16] -= 8 / 255  # the multi-label loss of class 0 sees the left half only
    torch.testing.assert_close(attacked[0], expected)
    raw = torch.zeros(2, 3, 32, 32)

    class Sides(Dense):
        def _explain_all(self, given):
            out = torch.zeros_like(given)
            out[:, 0, :, :16] = 1.0
            out[:, 1, :, 16:] = 1.0
            return out

    (found,) = Adversarial().score(scene, Maps(method("sides", Sides()), scene, raw))
    assert found.row == 0 and len(found.vectors["clean"]) == 28 * 28
    assert found.values["right"] == found.values["recovered"]


def test_the_detector_learns_a_difference_and_guesses_without_one():
    random = np.random.default_rng(0)
    clean, same = random.random((60, 28, 28)), random.random((60, 28, 28))
    smooth = np.cumsum(random.random((60, 28, 28)) - 0.5, axis=2)
    assert detection_accuracy(clean, smooth, range(60), epochs=8)[0] > 0.9
    accuracy, count = detection_accuracy(clean, same, range(60), epochs=8)
    assert count == 24 and accuracy < 0.8
    assert detection_accuracy(clean[:3], same[:3], range(3)) == (pytest.approx(float("nan"), nan_ok=True), 0)


def test_the_verdict_says_how_often_maps_tell_attacks():
    random = np.random.default_rng(0)
    rows = [
        Row(
            "m",
            "raw",
            "adversarial",
            str(i),
            i,
            None,
            {},
            {"clean": random.random(784).tolist(), "changed": np.cumsum(random.random(784) - 0.5).tolist()},
        )
        for i in range(40)
    ]
    (verdict,) = Adversarial().verdicts(rows)
    assert verdict.passed and verdict.details["maps"] == 16 and "16 held-out maps" in verdict.sentence
    (few,) = Adversarial().verdicts(rows[:4])
    assert few.passed is None


def test_meaningful_perturbation_suppresses_the_top_classes_together():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    model = Explanandum(net, 3, "multiclass")
    images = torch.rand(1, 3, 32, 32)
    found = [build("meaningful_perturbation", model, iterations=3, top=2).masks(images, k) for k in (0, 1)]
    torch.testing.assert_close(found[0].maps, found[1].maps)  # whatever the class asked for
    best = model.probabilities(model(images))[0].topk(2).values.sum()
    torch.testing.assert_close(found[0].original, best[None].detach())


def test_blurred_discs_cover_half_the_window_around_their_middle():
    model = Explanandum(Left(), 3, "multilabel", mean=(0, 0, 0), std=(1, 1, 1))
    (hidden,) = build("occlusion", model, window=4, stride=4, shape="disc")._patches((4, 4), torch.device("cpu"), 9)  # type: ignore[attr-defined]
    # Centres of the corner pixels are 1.5 * sqrt(2) = 2.1 from the middle, more than the radius of 2.
    assert hidden.int().tolist() == [[[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]]
    found = build("occlusion", model, window=8, stride=4, shape="disc", fill="blur", blur_sigma=2.0)(stripes(), 0)
    assert found.isfinite().all() and float(found[0, 16, 4]) > float(found[0, 16, 28])


def test_maps_of_layers_are_combined_by_their_weights():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    model, images = Explanandum(net, 3, "multiclass"), torch.rand(2, 3, 16, 16)
    maps = []
    for layer in ("1", "3"):
        m = build("norm_grad", model, layer=layer)(images, 1)
        low, high = m.amin((1, 2), keepdim=True), m.amax((1, 2), keepdim=True)
        maps.append((m - low) / (high - low))
    got = build("layer_combination", model, method="norm_grad", layers=["1", "3"], weights="linear")(images, 1)
    torch.testing.assert_close(got, maps[0] ** (1 / 3) * maps[1] ** (2 / 3), atol=1e-4, rtol=1e-4)
    got = build("layer_combination", model, method="norm_grad", layers=["1", "3"], weights=[3, 1], combine="sum")(images, 1)
    torch.testing.assert_close(got, 0.75 * maps[0] + 0.25 * maps[1], atol=1e-4, rtol=1e-4)
