"""Metrics against the recorded results of the paper's public code and of TorchRay."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explainer.metrics import auc, coverage, f1, probability, sal, segmentation
from explainer.metrics.base import PerClassMetric
from explainer.metrics.classification_kept import micro_counts, scores_from_counts
from explainer.metrics.ground_truth import THRESHOLDS
from explainer.metrics.pointing_game import box_mask, first_maximum, point_hits, pointing_game
from tests.golden.cases import load

# The public code defines 0/0 as 0; this project's default is NaN.
MASK_METRICS = {
    "continuous_IOU": lambda m, g: segmentation.soft_iou(m, g, empty=0.0),
    "discrete_IOU_50": lambda m, g: segmentation.iou(m, g, threshold=0.5, empty=0.0),
    "IOUs": lambda m, g: segmentation.iou_curve(m, g, empty=0.0),
    "soft_accuracy": segmentation.soft_accuracy,
    "mae": segmentation.mean_absolute_error,
    "soft_f1": lambda m, g: f1.soft_f1(m, g, empty=0.0),
    "discrete_f1_25": lambda m, g: f1.f1(m, g, threshold=0.25, empty=0.0),
    "discrete_f1_50": lambda m, g: f1.f1(m, g, threshold=0.50, empty=0.0),
    "discrete_f1_75": lambda m, g: f1.f1(m, g, threshold=0.75, empty=0.0),
    "f1s": lambda m, g: f1.f1_curve(m, g, empty=0.0),
    "auc": auc.roc_auc,
    "mask_coverage": lambda m, g: coverage.object_coverage(m, g, empty=0.0),
    "background_coverage": lambda m, g: coverage.background_coverage(m, g, empty=0.0),
    "overlap": coverage.overlap,
    "sim_ratio": lambda m, g: coverage.similarity_ratio(m, g, empty=0.0),
}


@pytest.fixture(scope="module")
def metrics_0():
    _, arrays, _ = load("metrics_0")
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def test_thresholds_are_those_of_the_reference_to_the_last_bit():
    assert np.array_equal(np.array(THRESHOLDS), np.arange(0.1, 1, 0.1))


@pytest.mark.parametrize("name", MASK_METRICS)
def test_mask_metrics(metrics_0, name):
    value = MASK_METRICS[name](metrics_0["in/mask"], metrics_0["in/seg"])
    torch.testing.assert_close(value, metrics_0[f"out/{name}"], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", ["prob_sparsity", "prob_entropy"])
def test_probability_metrics(metrics_0, name):
    value = getattr(probability, name)(metrics_0["in/p_mask"])
    torch.testing.assert_close(value, metrics_0[f"out/{name}"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "labels"), [("saliency", 3), ("saliency_int", 1)])
def test_sal_of_all_labels_and_of_the_first(metrics_0, name, labels):
    targets = torch.zeros(10, 20)
    for row, classes in enumerate(metrics_0["in/classes"][:, :labels].tolist()):
        targets[row, [c for c in classes if c >= 0]] = 1
    value = sal.saliency_metric(metrics_0["in/mask"], metrics_0["in/p_mask"], targets)
    torch.testing.assert_close(value, metrics_0[f"out/{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("key", "threshold"), [("out/thr-1", -1.0), ("out/thr0", 0.0)])
def test_multilabel_micro_scores(key, threshold):
    _, arrays, _ = load("multilabel_0")
    counts = micro_counts(torch.from_numpy(arrays["in/logits"]), torch.from_numpy(arrays["in/labels"]), threshold).sum(0)
    torch.testing.assert_close(scores_from_counts(counts), torch.from_numpy(arrays[key]), rtol=1e-6, atol=0)


def test_pointing_hits_and_accuracy():
    _, arrays, _ = load("pointing_0")
    points = torch.from_numpy(arrays["in/points_xy"]).flip(1)
    hits = point_hits(points, torch.from_numpy(arrays["in/masks"]), tolerance=15)
    assert (hits.long() * 2 - 1).tolist() == arrays["out/hit"].tolist()

    metric = PerClassMetric(pointing_game, num_classes=6, absent="zero", empty="miss")
    metric.add_by_class(hits.double(), torch.from_numpy(arrays["in/class_ids"]))
    assert metric.total.tolist() == arrays["out/hits"].tolist()
    assert (metric.used - metric.total).tolist() == arrays["out/misses"].tolist()
    assert float(metric.compute()) == pytest.approx(float(arrays["out/accuracy"]), abs=1e-12)


def test_pointing_finds_the_first_maximum():
    _, arrays, _ = load("pointing_0")
    points = first_maximum(torch.from_numpy(arrays["in/saliency"])[:, 0])
    assert points.flip(1).tolist() == arrays["out/saliency_points_xy"].tolist()


def test_pointing_on_voc_boxes():
    entry, arrays, _ = load("pointing_voc")
    size = (entry["args"]["height"], entry["args"]["width"])
    boxes, classes, hard = (torch.from_numpy(arrays[f"in/{k}"]) for k in ("boxes_xyxy_1based", "box_class", "box_difficult"))
    outcome = []
    for c, (x, y) in zip(arrays["in/query_class"].tolist(), arrays["in/query_point_xy"].tolist(), strict=True):
        of_class = classes == c
        found = box_mask(boxes[of_class], hard[of_class], size)
        if f"out/mask_class_{c}" in arrays:
            assert np.array_equal(found.mask.numpy(), arrays[f"out/mask_class_{c}"])
        hit = bool(point_hits(torch.tensor([[y, x]]), found.mask[None], tolerance=15))
        outcome.append((1 if hit else -1) if found.counts else 0)
    assert outcome == arrays["out/hit"].tolist()


def test_empty_mask_is_a_miss_on_request():
    saliency, truth = torch.arange(12.0).reshape(1, 3, 4), torch.zeros(1, 3, 4)
    assert pointing_game(saliency, truth, empty="miss").tolist() == [0.0]
