"""Metrics of raw maps alone or against the ground truth: localisation, pointing, sparseness, AGF segmentation, similarity, preparation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score

from explainer.errors import ConfigError, ShapeError
from explainer.metrics.agf_segmentation import average_precision, mean_average_precision, pixel_accuracy, segment
from explainer.metrics.base import PerClassMetric, PerImageMetric
from explainer.metrics.class_segmentation import class_mean_average_precision, class_pixel_accuracy, class_scores_map, segment_classes
from explainer.metrics.class_sensitivity import class_sensitivity, extreme_classes
from explainer.metrics.correlation import average_ranks, pearson, spearman
from explainer.metrics.localization import attribution_localization, bounding_box
from explainer.metrics.map_similarity import map_spearman, map_ssim
from explainer.metrics.pointing_game import box_mask, difficult, first_maximum, pointing_game
from explainer.metrics.preparation import clamp, divide_by_max, divide_by_max_abs, prepare, resize
from explainer.metrics.ranking import pixel_ranks, top_masks
from explainer.metrics.sparseness import sparseness
from explainer.tensors import min_max


def one_hot_map(height, width, row, column):
    saliency = torch.zeros(1, height, width)
    saliency[0, row, column] = 1
    return saliency


# ------------------------------------------------------------------ ranks and correlations
def test_ranks_and_correlations_agree_with_scipy_on_ties():
    generator = torch.Generator().manual_seed(2)
    a, b = ((torch.rand(6, 40, generator=generator).double() * 7).round() for _ in range(2))
    assert np.array_equal(average_ranks(a).numpy(), np.stack([stats.rankdata(row) for row in a.numpy()]))
    for i in range(6):
        assert pearson(a, b)[i].item() == pytest.approx(stats.pearsonr(a[i], b[i])[0], abs=1e-12)
        assert spearman(a, b)[i].item() == pytest.approx(stats.spearmanr(a[i], b[i])[0], abs=1e-12)


def test_correlation_of_constant_and_nan_rows_is_undefined():
    rising = torch.arange(4.0)[None]
    for row in (torch.full((1, 4), 0.1), torch.tensor([[0.0, math.nan, 1.0, 2.0]])):
        assert pearson(rising, row).isnan().all() and spearman(row, rising).isnan().all()
    assert spearman(rising, rising**3).item() == pytest.approx(1) and spearman(rising, -rising).item() == pytest.approx(-1)


def test_class_sensitivity_is_rank_correlation():
    first = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 1.0]]])
    second = torch.tensor([[[9.0, 8.0], [7.0, 0.0]], [[1.0, 10.0], [100.0, 1000.0]], [[1.0, 2.0], [3.0, 4.0]]])
    value = class_sensitivity(first, second)
    assert value[:2].tolist() == pytest.approx([-1, 1]) and value[2].isnan()
    most, least = extreme_classes(torch.tensor([[0.0, 3.0, -1.0], [5.0, 1.0, 2.0]]))
    assert most.tolist() == [1, 0] and least.tolist() == [2, 1]
    with pytest.raises(ShapeError, match="one shape"):
        class_sensitivity(first, second[:1])


# ------------------------------------------------------------------ ranking
def test_ranks_follow_the_map_and_break_ties_at_random_but_alike():
    saliency = torch.tensor([[[0.1, 0.9], [0.5, 0.3]]])
    assert pixel_ranks(saliency).tolist() == [[3, 0, 1, 2]]
    assert pixel_ranks(saliency, "lowest").tolist() == [[0, 3, 2, 1]]
    flat = torch.zeros(2, 10, 10)
    ranks = pixel_ranks(flat)
    assert torch.equal(ranks[0], ranks[1]) and torch.equal(ranks[0].sort().values, torch.arange(100))
    assert abs(np.corrcoef(ranks[0], np.arange(100))[0, 1]) < 0.3, "a constant map is not removed row by row"
    assert not torch.equal(ranks, pixel_ranks(flat, seed=1))
    with pytest.raises(ConfigError, match="'highest' or 'lowest'"):
        pixel_ranks(saliency, "top")


def test_top_masks_have_the_area_asked_for():
    saliency = torch.arange(100.0).reshape(1, 10, 10)
    masks = top_masks(saliency, [0.0, 0.29, 0.7, 1.0])
    assert masks.sum((2, 3)).tolist() == [[0, 29, 70, 100]]
    assert masks[0, 1].flatten().nonzero()[:, 0].tolist() == list(range(71, 100))
    saliency[0, 0, 0] = math.nan
    assert top_masks(saliency, [0.5]).isnan().all()


# ------------------------------------------------------------------ pointing game
def test_fifteen_pixels_are_a_miss_and_fourteen_a_hit():
    truth = torch.zeros(1, 30, 40)
    truth[0, 5, 5] = 1
    for column, expected in ((5, 1.0), (19, 1.0), (20, 0.0)):
        assert pointing_game(one_hot_map(30, 40, 5, column), truth).item() == expected
    # 9, 12 -> distance 15 exactly; 9, 11 -> 14.2
    assert pointing_game(one_hot_map(30, 40, 14, 17), truth).item() == 0.0
    assert pointing_game(one_hot_map(30, 40, 14, 16), truth).item() == 1.0
    assert pointing_game(one_hot_map(30, 40, 5, 5), truth, tolerance=0).item() == 1.0
    assert pointing_game(one_hot_map(30, 40, 5, 6), truth, tolerance=0).item() == 0.0
    with pytest.raises(ConfigError, match="at least 0 pixels, received -3"):
        pointing_game(one_hot_map(30, 40, 5, 6), truth, tolerance=-3)


def test_ties_go_to_the_first_maximum_and_constant_maps_miss():
    saliency = torch.zeros(1, 4, 60)
    saliency[0, 1, 50] = saliency[0, 2, 3] = 1
    assert first_maximum(saliency).tolist() == [[1, 50]]
    truth = one_hot_map(4, 60, 2, 3)
    assert pointing_game(saliency, truth).item() == 0.0
    everywhere = torch.ones(1, 4, 60)
    for constant in (0.0, 0.5, -3.0):
        assert pointing_game(torch.full((1, 4, 60), constant), everywhere).item() == 0.0


def test_pointing_undefined_cases():
    saliency, truth = one_hot_map(4, 60, 0, 0), one_hot_map(4, 60, 0, 0)
    assert pointing_game(saliency, torch.zeros_like(truth)).isnan().all()
    assert pointing_game(torch.full_like(saliency, math.nan), truth).isnan().all()
    everything = torch.ones(1, 4, 60, dtype=torch.bool)
    assert pointing_game(saliency, truth, everything).isnan().all()
    # The maximum lies on void: the second best decides.
    void = torch.zeros_like(everything)
    void[0, 0, 0] = True
    saliency[0, 0, 40] = 0.5
    truth[0, 0, 1] = 1
    assert pointing_game(saliency, truth, void).item() == 0.0
    with pytest.raises(ConfigError, match="'skip' or 'miss'"):
        pointing_game(saliency, truth, empty="hit")
    with pytest.raises(ShapeError, match="resize the map"):
        pointing_game(saliency[:, :2], truth)


def test_difficult_subset():
    truth = torch.zeros(3, 4, 4)
    truth[:2, 0, :3] = 1  # 3/16
    truth[2, 0] = 1  # exactly a quarter
    targets = torch.tensor([[1, 1], [1, 0], [1, 1]])
    assert difficult(truth, targets).tolist() == [True, False, False]
    metric = PerClassMetric(pointing_game, num_classes=2, subset="difficult", tolerance=0)
    metric.update(truth, truth, targets=targets, class_index=torch.tensor([0, 0, 1]))
    assert metric.compute().item() == 1.0
    assert metric.summary()["used"].tolist() == [1, 0] and metric.summary()["excluded"].tolist() == [1, 1]
    with pytest.raises(ConfigError, match="targets"):
        metric.values(truth, truth)


def test_mean_over_classes_and_over_images():
    hits, classes = torch.tensor([1.0, 1.0, 0.0, 0.0, math.nan]), torch.tensor([0, 0, 0, 1, 2])
    expected = {("classes", "skip"): (2 / 3 + 0) / 2, ("classes", "zero"): (2 / 3) / 4, ("images", "skip"): 0.5}
    for (average, absent), value in expected.items():
        metric = PerClassMetric(pointing_game, num_classes=4, average=average, absent=absent)
        metric.add_by_class(hits, classes)
        assert metric.compute().item() == pytest.approx(value)
        assert metric.excluded.tolist() == [0, 0, 1, 0]
    assert metric.per_class()[:2].tolist() == pytest.approx([2 / 3, 0]) and metric.per_class()[2:].isnan().all()
    with pytest.raises(ConfigError, match="average must be"):
        PerClassMetric(pointing_game, num_classes=4, average="median")


def test_voc_boxes_are_one_based_and_inclusive():
    found = box_mask(torch.tensor([[2, 1, 3, 2]]), torch.tensor([0]), (3, 4))
    assert found.mask.long().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]] and found.counts
    assert not box_mask(torch.tensor([[2, 1, 3, 2]]), torch.tensor([1]), (3, 4)).counts
    assert not box_mask(torch.zeros(0, 4), torch.zeros(0), (3, 4)).counts


# ------------------------------------------------------------------ localisation and sparseness
def test_localisation_counts_positive_attribution_only():
    saliency = torch.tensor([[[3.0, -5.0, 1.0], [0.0, 0.0, 0.0]]])
    truth = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    assert attribution_localization(saliency, truth).item() == 0.75
    assert attribution_localization(-saliency, truth).item() == 1.0
    void = torch.tensor([[[False, False, True], [False, False, False]]])
    assert attribution_localization(saliency, truth, void).item() == 1.0
    assert attribution_localization(saliency.clamp(max=0), truth).isnan().all(), "no positive attribution"
    assert attribution_localization(saliency, torch.zeros_like(truth)).isnan().all(), "no object"
    metric = PerImageMetric(attribution_localization)
    metric.update(torch.cat([saliency, torch.zeros_like(saliency)]), truth.repeat(2, 1, 1))
    assert metric.compute().item() == 0.75 and int(metric.excluded) == 1


def test_localisation_in_the_bounding_box():
    truth = torch.zeros(1, 4, 5)
    truth[0, 1, 1] = truth[0, 2, 3] = 1
    box = torch.zeros(1, 4, 5, dtype=torch.bool)
    box[0, 1:3, 1:4] = True
    assert torch.equal(bounding_box(truth), box)
    assert not bounding_box(torch.zeros(1, 4, 5)).any()
    assert attribution_localization(torch.ones(1, 4, 5), truth, region="box").item() == pytest.approx(6 / 20)
    assert attribution_localization(torch.ones(1, 4, 5), truth).item() == pytest.approx(2 / 20)
    with pytest.raises(ConfigError, match="'mask' or 'box'"):
        attribution_localization(truth, truth, region="hull")


def test_sparseness_is_the_gini_index():
    generator = torch.Generator().manual_seed(4)
    saliency = torch.randn(3, 5, 6, generator=generator)
    for i, value in enumerate(sparseness(saliency).tolist()):
        v = saliency[i].abs().double().flatten().numpy()
        # mean absolute difference over twice the mean: the textbook definition, a double loop instead of a sort
        assert value == pytest.approx(np.abs(v[:, None] - v[None]).mean() / (2 * v.mean()), abs=1e-7)
    torch.testing.assert_close(sparseness(-7 * saliency), sparseness(saliency))


def test_sparseness_degenerate_maps():
    value = sparseness(torch.stack([one_hot_map(3, 4, 1, 1)[0], torch.zeros(3, 4), torch.full((3, 4), 0.1), torch.full((3, 4), math.nan)]))
    assert value[:3].tolist() == pytest.approx([1 - 1 / 12, 0, 0], abs=1e-12) and value[2].item() == 0 and value[3].isnan()
    assert sparseness(one_hot_map(3, 4, 1, 1), offset=1.0).item() == pytest.approx((2 * 12 - 13) / (12 * 13))


# ------------------------------------------------------------------ AGF segmentation
def test_segments_at_zero_or_at_the_mean():
    saliency = torch.tensor([[[4.0, 0.5, 0.5, -1.0]]])  # mean 1
    assert segment(saliency, signed=True).tolist() == [[[1, 1, 1, 0]]]
    assert segment(saliency, signed=False).tolist() == [[[1, 0, 0, 0]]]
    third = torch.full((1, 3, 3), 1 / 3)
    assert segment(third, signed=False).sum() == 0 and segment(third, signed=True).sum() == 9
    truth = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    assert pixel_accuracy(saliency, truth, signed=True).item() == 0.75
    assert pixel_accuracy(saliency, truth, signed=False).item() == 0.75
    void = torch.tensor([[[False, False, True, False]]])
    assert pixel_accuracy(saliency, truth, void, signed=True).item() == 1.0
    assert pixel_accuracy(saliency, truth, ~torch.zeros_like(void)).isnan().all()
    assert pixel_accuracy(saliency * math.nan, truth).isnan().all()


def test_average_precision_agrees_with_scikit_learn_on_ties_and_void():
    generator = torch.Generator().manual_seed(6)
    scores = (torch.rand(5, 30, generator=generator) * 5).round() - 2
    labels = (torch.rand(5, 30, generator=generator) < 0.3).double()
    weight = torch.rand(5, 30, generator=generator) < 0.8
    expected = [average_precision_score(labels[i][weight[i]], scores[i][weight[i]]) for i in range(5)]
    assert average_precision(scores, labels, weight).tolist() == pytest.approx(expected, abs=1e-12)
    assert average_precision(scores, torch.zeros_like(labels)).isnan().all()


def test_mean_average_precision_takes_object_and_background_together():
    saliency = torch.tensor([[[2.0, -1.0], [1.0, -2.0]]])
    truth = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    # Segment 1 0 1 0 against 1 0 0 0, and its complement 0 1 0 1 against 0 1 1 1.
    expected = average_precision_score([1, 0, 0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 1, 0, 1])
    assert mean_average_precision(saliency, truth, signed=True).item() == pytest.approx(expected, abs=1e-12)
    expected = average_precision_score([1, 0, 0, 0, 0, 1, 1, 1], [1, -0.5, 0.5, -1, -1, 0.5, -0.5, 1])
    assert mean_average_precision(saliency, truth, signed=True, scores="saliency").item() == pytest.approx(expected, abs=1e-12)
    assert mean_average_precision(truth * 2 - 1, truth, signed=True).item() == 1.0
    with pytest.raises(ConfigError, match="'segment' or 'saliency'"):
        mean_average_precision(saliency, truth, scores="rank")


# ------------------------------------------------------------------ similarity
def test_ssim_against_a_direct_computation():
    generator = torch.Generator().manual_seed(7)
    a, b = torch.rand(2, 12, 9, generator=generator).double(), torch.rand(2, 12, 9, generator=generator).double()
    line = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(line, line) / np.outer(line, line).sum()

    def smooth(image):
        return ndimage.correlate(image, window, mode="mirror")

    for i, value in enumerate(map_ssim(a, b, data_range=2.0).tolist()):
        x, y = a[i].numpy(), b[i].numpy()
        mx, my = smooth(x), smooth(y)
        vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
        expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
        assert value == pytest.approx(expected, rel=1e-6)


def test_similarity_of_equal_constant_and_nan_maps():
    maps = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(8))
    assert map_ssim(maps, maps).tolist() == pytest.approx([1, 1]) and map_spearman(maps, maps).tolist() == pytest.approx([1, 1])
    zeros = torch.zeros_like(maps)
    assert map_ssim(zeros, zeros).tolist() == [1, 1] and map_spearman(zeros, maps).isnan().all()
    assert map_spearman(maps, -maps).tolist() == pytest.approx([-1, -1])
    assert map_spearman(maps, -maps, absolute=True).tolist() == pytest.approx([1, 1])
    maps[1, 0, 0] = math.nan
    assert map_ssim(maps, zeros).isnan().tolist() == [False, True]
    with pytest.raises(ShapeError, match="6x6"):
        map_ssim(maps[:, :5], zeros[:, :5])


# ------------------------------------------------------------------ preparation
def test_preparation_steps():
    saliency = torch.tensor([[[2.0, -4.0], [1.0, 0.0]], [[-1.0, -2.0], [-1.0, -1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert divide_by_max(saliency)[0].tolist() == [[1, -2], [0.5, 0]]
    assert torch.equal(divide_by_max(saliency)[1:], saliency[1:]), "without a positive value the map stays"
    assert divide_by_max_abs(saliency)[0].tolist() == [[0.5, -1], [0.25, 0]]
    assert divide_by_max_abs(saliency)[1:].flatten().tolist() == [-0.5, -1, -0.5, -0.5, 0, 0, 0, 0]
    assert min_max(saliency)[0].flatten().tolist() == pytest.approx([1, 0, 5 / 6, 4 / 6])
    assert min_max(saliency)[2].abs().sum() == 0
    assert min_max(saliency, epsilon=2.0)[:2].flatten().tolist() == pytest.approx([6 / 8, 0, 5 / 8, 4 / 8, 1 / 3, 0, 1 / 3, 1 / 3])
    assert min_max(saliency, epsilon=1e-20)[2].abs().sum() == 0
    assert clamp(saliency)[0].tolist() == [[1, -1], [1, 0]]
    assert prepare(saliency)[0].tolist() == [[1, -1], [0.5, 0]]
    assert prepare(saliency, norm="none")[0].tolist() == [[1, -1], [1, 0]]
    with pytest.raises(ConfigError, match="norm must be one of"):
        prepare(saliency, norm="l2")


def test_resize_is_bilinear_without_aligned_corners():
    saliency = torch.tensor([[[0.0, 1.0]]])
    assert resize(saliency, (1, 4)).tolist() == [[[0, 0.25, 0.75, 1]]]
    assert resize(saliency[None], (1, 4)).shape == (1, 1, 1, 4) and resize(saliency, (1, 2)) is saliency
    assert prepare(2 * saliency, (1, 4)).tolist() == [[[0, 0.25, 0.75, 1]]]
    with pytest.raises(ShapeError, match="batch axis"):
        resize(saliency[0], (1, 4))


# ------------------------------------------------------------------ class segmentation
def test_class_segmentation_by_hand():
    # 1x4 pixels, two classes; class 1 is not predicted and loses 0.1.
    maps = torch.tensor([[[[4.0, 1.0, -1.0, 0.0]], [[5.0, 2.0, 0.4, -3.0]]]])
    logits = torch.tensor([[2.0, -1.0]])
    scores = class_scores_map(maps, logits)
    assert scores[0, :, 0].flatten().tolist() == pytest.approx([0, 0, 0, 0, 1, 0.25, 0, 0, 0.9, 0.3, -0.02, -0.1])
    assert segment_classes(scores).tolist() == [[[1, 2, 0, 0]]]
    truth = torch.tensor([[[[1, 1, 0, 0]], [[0, 0, 1, 0]]]])
    assert class_pixel_accuracy(maps, logits, truth).item() == 0.5
    void = torch.tensor([[[False, True, False, False]]])
    assert class_pixel_accuracy(maps, logits, truth, void).item() == pytest.approx(2 / 3)
    soft = scores.softmax(1)[0, :, 0]
    one_hot = torch.tensor([[0, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]])
    expected = average_precision_score(one_hot.flatten(), soft.flatten())
    assert class_mean_average_precision(maps, logits, truth).item() == pytest.approx(expected, abs=1e-12)
    keep = [0, 2, 3]
    expected = average_precision_score(one_hot[:, keep].flatten(), soft[:, keep].flatten())
    assert class_mean_average_precision(maps, logits, truth, void).item() == pytest.approx(expected, abs=1e-12)


def test_class_segmentation_undefined_and_perfect():
    truth = (torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.3).double()
    truth[:, 1:] *= 1 - truth[:, :1]
    truth[:, 2] *= 1 - truth[:, 1]
    logits = torch.ones(2, 3)
    assert class_pixel_accuracy(truth, logits, truth).tolist() == [1, 1]
    # Tied background pixels: .25 for each channel. A class that is not predicted loses 0.1 and ties nowhere.
    found = class_scores_map(truth, logits).softmax(1)
    labels = torch.cat([1 - truth.sum(1, keepdim=True), truth], 1)
    expected = [average_precision_score(labels[i].flatten(), found[i].flatten()) for i in range(2)]
    assert max(expected) < 1 and class_mean_average_precision(truth, logits, truth).tolist() == pytest.approx(expected, abs=1e-12)
    assert class_mean_average_precision(truth[:, :1], -logits[:, :1], truth[:, :1]).tolist() == [1, 1]
    assert class_pixel_accuracy(truth * math.nan, logits, truth).isnan().all()
    everything = torch.ones(2, 5, 5, dtype=torch.bool)
    assert class_pixel_accuracy(truth, logits, truth, everything).isnan().all()
    assert class_mean_average_precision(truth, logits, truth, everything).isnan().all()
    nothing = class_pixel_accuracy(torch.zeros_like(truth), logits, torch.zeros_like(truth))
    assert nothing.tolist() == [1, 1], "empty maps say background"
    with pytest.raises(ShapeError, match=r"expected \(B,K,H,W\)"):
        class_scores_map(truth, logits[:, :2])
