"""Of many classes a training step computes all present ones and a sample of absent ones; the losses see the same as with all."""

from __future__ import annotations

import pytest
import torch

from explainer.config import MaskingConfig
from explainer.errors import ConfigError
from explainer.losses.area import area_bound_loss
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.tasks.class_sample import of_classes, sample_classes
from explainer.tasks.draws import Draws
from explainer.tasks.explain import ExplainTask
from explainer.tensors import Batch

LOSSES = {"area_bound": {"min_area": 0.1, "max_area": 0.4}, "non_target_area": {}, "total_variation": {}}


def batch_of(targets: torch.Tensor) -> Batch:
    return Batch(torch.rand(len(targets), 3, 32, 32), targets, ids=tuple("abc"[: len(targets)]))


def test_present_classes_come_first_and_no_class_comes_twice():
    targets = torch.zeros(3, 500)
    targets[0, [7, 300]] = targets[1, 499] = 1
    classes = sample_classes(targets, 10, Draws(0, 3, batch_of(targets), "classes"))
    assert classes.shape == (3, 12) and all(len(set(row)) == 12 for row in classes.tolist())
    assert set(classes[0, :2].tolist()) == {7, 300} and classes[1, 0] == 499
    assert of_classes(targets, classes).sum(1).tolist() == [2, 1, 0]
    again = sample_classes(targets, 10, Draws(0, 3, batch_of(targets), "classes"))
    other = sample_classes(targets, 10, Draws(0, 4, batch_of(targets), "classes"))
    assert torch.equal(classes, again) and not torch.equal(classes, other)


def test_all_classes_where_they_are_few():
    targets = torch.eye(3, 100)
    draws = Draws(0, 0, batch_of(targets))
    assert sample_classes(targets, None, draws) is None and sample_classes(targets, 99, draws) is None
    assert sample_classes(targets, 98, draws).shape == (3, 99)
    assert sample_classes(torch.zeros(3, 101), None, draws).shape == (3, 20)


def test_losses_of_a_sample_that_holds_all_classes_are_those_of_all():
    torch.manual_seed(0)
    K = 5
    e = Explanandum(build_classifier("small_vgg", K, widths=[4, 8]), K, mean=0.5, std=0.5)
    net = Explainer("vgg_unet", K, {"widths": [4, 8], "decoder_channels": [4]}, image_size=32).eval()
    targets = torch.zeros(2, K)
    targets[0, 0] = targets[1, K - 1] = 1
    values = []
    for absent in (K, K - 2):  # all in order; all but one, so that columns are sorted by presence
        task = ExplainTask(net, e, LOSSES, MaskingConfig(absent_classes=absent))
        found = task._explanation(batch_of(targets), "val")
        values.append({k: float(t.value(found).detach()) for k, t in task.terms.items()})
        assert found.present.sum(1).tolist() == [1, 1]
        if found.classes is not None:
            pairs = list(zip(*(t.tolist() for t in found.present_pairs()), strict=True))
            assert pairs == [(0, 0, 0), (1, 0, K - 1)]
            own = torch.stack([found.class_masks[0, 0], found.class_masks[1, 0]])
            by_hand = area_bound_loss(own[:, None], torch.ones(2, 1), 0.1, 0.4)
            assert values[-1]["area_bound"] == pytest.approx(float(by_hand), abs=1e-6)
    with pytest.raises(ConfigError, match="absent_classes"):
        ExplainTask(net, e, LOSSES, MaskingConfig(absent_classes=0))
