"""Functions with facts, as metrics of torchmetrics."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from explainer.errors import ConfigError, ShapeError, UnknownNameError
from explainer.metrics.base import PerClassMetric, PerImageMetric
from explainer.metrics.facts import Facts
from explainer.metrics.perturbation_curves import deletion
from explainer.metrics.segmentation import iou, iou_curve, soft_iou
from explainer.models.explanandum import Explanandum

FACTS = Facts("brightest", higher_is_better=True, bounds=(0.0, 1.0), optimum=None)


def brightest(mask, gain=1.0):
    return gain * mask.flatten(1).amax(1)


def test_facts_leave_a_plain_function():
    declared = FACTS(brightest)
    assert declared is brightest and brightest.facts == FACTS
    assert brightest(torch.full((2, 1, 1), 0.5)).tolist() == [0.5, 0.5]
    metric = PerImageMetric(brightest, gain=0.5)
    metric.update(torch.tensor([[[1.0]], [[0.5]]]))
    assert metric.compute() == 0.375
    assert (metric.name, metric.higher_is_better, metric.bounds, metric.optimum) == ("brightest", True, (0.0, 1.0), None)


def test_facts_can_be_given_to_a_function_of_somebody_else():
    def darkest(mask):
        return mask.flatten(1).amin(1)

    with pytest.raises(ConfigError, match="darkest declares no facts"):
        PerImageMetric(darkest)
    metric = PerImageMetric(darkest, Facts("darkest", higher_is_better=None, bounds=(0.0, 1.0), optimum=None))
    metric.update(mask=torch.tensor([[[1.0, 0.25]]]))
    assert metric.compute() == 0.25 and metric.name == "darkest"


def test_an_argument_is_an_input_or_an_option():
    with pytest.raises(ConfigError, match="argument 'picture' needs a default"):
        FACTS(lambda picture: picture)


def test_a_name_and_its_function_are_one_metric():
    mask, truth = torch.rand(3, 4, 4), torch.rand(3, 4, 4)
    found = []
    for given in (iou, "iou"):
        metric = PerImageMetric(given, threshold=0.3)
        metric.update(mask, truth)
        found.append(metric.compute())
    assert found[0] == found[1] == iou(mask, truth, threshold=0.3).mean()


def test_mistakes_are_answered_with_what_is_known():
    with pytest.raises(UnknownNameError, match="Did you mean 'soft_iou'"):
        PerImageMetric("soft_iu")
    with pytest.raises(ConfigError, match=r"Did you mean 'threshold'.*Options of iou: threshold, empty"):
        PerImageMetric(iou, treshold=0.3)
    with pytest.raises(ConfigError, match=r"masking_matrix\.MaskingMatrix"):
        PerImageMetric("masking_matrix")
    with pytest.raises(TypeError, match="msk"):
        PerImageMetric(soft_iou).update(msk=torch.zeros(1, 2, 2), truth=torch.zeros(1, 2, 2))
    with pytest.raises(ConfigError, match="9 values per image"):
        PerClassMetric(iou_curve, num_classes=3)
    with pytest.raises(ConfigError, match=r"class_index=\[B\]"):
        PerClassMetric(soft_iou, num_classes=3).update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    with pytest.raises(ShapeError, match=r"shape \(B,9\), received \(2, 3\)"):
        PerImageMetric(iou_curve).add(torch.zeros(2, 3))


def test_the_columns_of_a_curve_have_names():
    assert PerImageMetric(iou_curve, thresholds=(0.25, 0.5)).labels == ("0.25", "0.5")
    assert PerImageMetric("iou_curve").labels == tuple(f"0.{i}" for i in range(1, 10))
    assert PerImageMetric(soft_iou).labels is None


def test_any_metric_can_be_averaged_over_classes_also_one_that_reads_the_class():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    explanandum = Explanandum(network, num_classes=3)
    images, saliency, classes = torch.rand(4, 3, 2, 2), torch.rand(4, 2, 2), torch.tensor([0, 1, 1, 1])
    values = deletion(explanandum, images, saliency, classes, steps=2)
    for arguments in ((explanandum, images, saliency), ()):
        named = {} if arguments else {"explanandum": explanandum, "images": images, "saliency": saliency}
        metric = PerClassMetric("deletion", 3, steps=2)
        metric.update(*arguments, class_index=classes, **named)
        assert metric.per_class()[:2].tolist() == pytest.approx([values[0].item(), values[1:].mean().item()])
        assert metric.compute().item() == pytest.approx((values[0] + values[1:].mean()).item() / 2)


def test_a_collection_keeps_metrics_apart_that_agree_on_the_first_batch():
    collection = MetricCollection({"low": PerImageMetric(iou, threshold=0.3), "high": PerImageMetric(iou, threshold=0.5)})
    binary, grey = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.4, 0.0]]])
    for metrics in (collection, pickle.loads(pickle.dumps(collection))):
        metrics.update(mask=binary, truth=binary)
        metrics.update(mask=grey, truth=binary, images=torch.zeros(1, 3, 1, 2))  # further keywords are for other metrics
        assert {name: value.item() for name, value in metrics.compute().items()} == {"low": 1.0, "high": 0.5}
