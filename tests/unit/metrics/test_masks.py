"""Metrics that compare a mask with the ground truth, against numpy loops, scikit-learn and hand-worked numbers."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics import MetricCollection

from explainer.errors import ShapeError
from explainer.metrics.auc import roc_auc
from explainer.metrics.base import PerImageMetric
from explainer.metrics.coverage import background_coverage, object_coverage, overlap, similarity_ratio
from explainer.metrics.f1 import f1, f1_curve, soft_f1
from explainer.metrics.grey_share import grey_share
from explainer.metrics.ground_truth import THRESHOLDS
from explainer.metrics.segmentation import (
    iou,
    iou_curve,
    mean_absolute_error,
    soft_accuracy,
    soft_iou,
)

# mask .5 .2 / 1 0 against truth 1 0 / 1 0
MASK = torch.tensor([[[0.5, 0.2], [1.0, 0.0]]], dtype=torch.float64)
TRUTH = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
HAND = {
    soft_accuracy: (0.5 + 0.8 + 1 + 1) / 4,
    mean_absolute_error: (0.5 + 0.2) / 4,
    soft_iou: 1.5 / 2.2,
    iou: 0.5,
    soft_f1: 2 * 1.5 / (1.7 + 2),
    f1: 2 * 1 / (1 + 2),
    object_coverage: 1.5 / 2,
    background_coverage: 0.2 / 2,
    overlap: 1 - 0.7 / 4,
    similarity_ratio: 1.5 / (0.25 + 0.04 + 1 + 2 - 1.5),
    roc_auc: 1.0,
}


@pytest.mark.parametrize("function", HAND, ids=lambda f: f.__name__)
def test_hand_worked(function):
    assert function(MASK, TRUTH).tolist() == pytest.approx([HAND[function]], abs=1e-12)


@pytest.mark.parametrize("function", HAND, ids=lambda f: f.__name__)
def test_void_pixels_do_not_count(function):
    """Whatever stands at a void pixel, also NaN, the value is that of the image without it."""
    generator = torch.Generator().manual_seed(5)
    mask, truth = torch.rand(1, 4, 9, generator=generator).double(), (torch.rand(1, 4, 9, generator=generator) < 0.4).double()
    void = torch.zeros(1, 4, 9, dtype=torch.bool)
    void[..., -3:] = True
    expected = function(mask[..., :6], truth[..., :6])
    for rubbish in (0.0, 1.0, math.nan):
        mask[..., -3:] = rubbish
        truth[..., -3:] = 1 if rubbish == 1 else 0
        torch.testing.assert_close(function(mask, truth, void), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("function", HAND, ids=lambda f: f.__name__)
def test_all_void_is_undefined_and_nan_stays_with_its_image(function):
    mask, truth = MASK.repeat(3, 1, 1), TRUTH.repeat(3, 1, 1)
    mask[1, 0, 1] = math.nan
    void = torch.zeros_like(truth, dtype=torch.bool)
    void[2] = True
    assert function(mask, truth, void).isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("function", [soft_iou, iou, soft_f1, f1, similarity_ratio], ids=lambda f: f.__name__)
def test_nothing_against_nothing(function):
    zeros = torch.zeros(1, 3, 3)
    assert math.isnan(function(zeros, zeros).item())
    assert function(zeros, zeros, empty=0.0).item() == 0.0
    assert math.isnan(function(zeros, zeros, torch.ones(1, 3, 3, dtype=torch.bool), empty=0.0).item()), "void everywhere beats `empty`"
    assert function(zeros, torch.ones(1, 3, 3)).item() == 0.0
    assert function(torch.ones(1, 3, 3), zeros).item() == 0.0
    assert function(torch.ones(1, 3, 3), torch.ones(1, 3, 3)).item() == 1.0


def test_coverage_without_object_or_background():
    ones, zeros = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    assert math.isnan(object_coverage(ones, zeros).item()) and object_coverage(ones, zeros, empty=0.0).item() == 0
    assert math.isnan(background_coverage(ones, ones).item()) and background_coverage(ones, ones, empty=0.0).item() == 0
    assert object_coverage(ones, ones).item() == 1 and background_coverage(ones, zeros).item() == 1


def test_threshold_is_strict_and_exact():
    """A float32 0.3 is larger than the float64 0.3 of the threshold list by less than float32 can show."""
    mask = torch.tensor([[[0.5, 0.3]]], dtype=torch.float32)
    truth = torch.ones(1, 1, 2)
    assert iou(mask, truth, threshold=0.5).item() == 0.0
    expected = [np.mean(mask.double().numpy() > t) for t in np.arange(0.1, 1, 0.1)]
    assert iou_curve(mask, truth)[0].tolist() == expected
    assert f1_curve(mask, truth)[0].tolist() == pytest.approx([2 * e / (1 + e) for e in expected], abs=1e-15)


@pytest.mark.parametrize(("curve", "one"), [(iou_curve, iou), (f1_curve, f1)])
def test_a_curve_is_its_metric_at_each_threshold(curve, one):
    """Counted in one reading; thresholds in any order, soft ground truth, void pixels, NaN and empty images included."""
    generator = torch.Generator().manual_seed(0)
    mask, truth = torch.rand(6, 9, 7, generator=generator), torch.rand(6, 9, 7, generator=generator)
    void = torch.rand(6, 9, 7, generator=generator) > 0.7
    mask[0, 2, 3] = 0.4  # equal to a threshold: not above it
    mask[1], truth[1] = 0.0, 0.0
    mask[2, 4, 4], void[2, 4, 4] = torch.nan, False
    mask[3, 1, 1], void[3, 1, 1] = torch.nan, True
    void[4] = True
    for given in (None, void):
        for empty in (math.nan, 0.0):
            at = (0.4, 0.9, 0.4, -0.1, 0.05, 1.5, 0.0)
            slow = torch.stack([one(mask, truth, given, t, empty) for t in at], dim=1)
            torch.testing.assert_close(curve(mask, truth, given, at, empty), slow, equal_nan=True, rtol=0, atol=0)


def test_curves_average_each_threshold_over_its_own_images():
    truth = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])
    mask = torch.tensor([[[1.0, 0.0]], [[0.35, 0.0]]])
    for curve in (PerImageMetric(iou_curve), PerImageMetric("f1_curve")):
        curve.update(mask, truth)
        # The second image is empty on both sides above 0.35: undefined there, 0 below.
        assert curve.compute().tolist() == [0.5] * 3 + [1.0] * 6
        assert curve.summary()["excluded"].tolist() == [0] * 3 + [1] * 6
    for single in (PerImageMetric(iou, threshold=0.3), PerImageMetric("f1", threshold=0.3)):
        single.update(mask, truth)
        assert single.compute().item() == 0.5
    assert len(THRESHOLDS) == 9


def test_auc_agrees_with_scikit_learn_also_on_ties():
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(5, 8, 8, generator=generator) * 6).round() / 6
    truth = (torch.rand(5, 8, 8, generator=generator) < 0.3).double()
    void = torch.rand(5, 8, 8, generator=generator) < 0.2
    expected = [sk.roc_auc_score(truth[i][~void[i]], mask[i][~void[i]]) for i in range(5)]
    assert roc_auc(mask, truth, void).tolist() == pytest.approx(expected, abs=1e-12)
    assert roc_auc(1 - mask, truth, void).tolist() == pytest.approx([1 - e for e in expected], abs=1e-12)


def test_auc_of_constant_maps_and_of_one_class():
    truth = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0]]])
    value = roc_auc(torch.full((3, 1, 3), 0.7), truth)
    assert value[0].item() == 0.5 and value[1:].isnan().all()
    metric = PerImageMetric("auc")
    metric.update(torch.full((3, 1, 3), 0.7), truth)
    assert metric.compute().item() == 0.5
    assert {k: int(v) for k, v in metric.summary().items() if k != "value"} == {"used": 1, "excluded": 2}


def test_f1_and_iou_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    mask, truth = torch.rand(4, 6, 6, generator=generator), (torch.rand(4, 6, 6, generator=generator) < 0.4).double()
    for i in range(4):
        hard = (mask[i] > 0.25).flatten().numpy()
        assert f1(mask, truth, threshold=0.25)[i].item() == pytest.approx(sk.f1_score(truth[i].flatten(), hard))
        assert iou(mask, truth, threshold=0.25)[i].item() == pytest.approx(sk.jaccard_score(truth[i].flatten(), hard))


def test_grey_share_counts_both_bounds():
    mask = torch.tensor([[[0.0, 0.1, 0.5, 0.9, 0.95]], [[1.0, 0.0, 1.0, 0.0, 1.0]], [[0.5, math.nan, 0.0, 0.0, 0.0]]])
    value = grey_share(mask)
    assert value[:2].tolist() == [0.6, 0.0] and value[2].isnan()
    void = torch.tensor([[[False, True, False, False, False]]]).expand(3, 1, 5)
    assert grey_share(mask, void).tolist() == [0.5, 0.0, 0.25]


def test_wrong_shapes_are_named():
    with pytest.raises(ShapeError, match=r"truth is \(1, 2, 3\) but the mask is \(1, 2, 2\)"):
        soft_iou(MASK, torch.zeros(1, 2, 3))
    with pytest.raises(ShapeError, match=r"expected \(B,H,W\)"):
        soft_iou(MASK[None], TRUTH[None])
    with pytest.raises(ShapeError, match="soft_iou averages values"):
        PerImageMetric(soft_iou).add(torch.zeros(3, 2))


def test_a_row_added_after_compute_is_seen():
    metric = PerImageMetric(soft_iou)
    metric.add(torch.tensor([1.0]))
    assert metric.compute().item() == 1.0
    metric.add(torch.tensor([0.0, math.nan]))
    assert metric.compute().item() == 0.5
    assert int(metric.excluded) == 1


def test_a_collection_hands_each_metric_its_own_arguments_also_after_pickling():
    collection = MetricCollection({"iou": PerImageMetric(soft_iou), "grey": PerImageMetric(grey_share)})
    for metrics in (collection, pickle.loads(pickle.dumps(collection))):
        metrics.update(mask=MASK, truth=TRUTH)  # the share of grey has no ``truth``
        assert metrics.compute()["iou"].item() == pytest.approx(1.5 / 2.2)
        assert metrics.compute()["grey"].item() == pytest.approx(grey_share(MASK).item())


def test_an_infinite_value_is_not_hidden():
    metric = PerImageMetric(soft_iou)
    metric.add(torch.tensor([math.inf, 0.0]))
    assert metric.compute().item() == math.inf
