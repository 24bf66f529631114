"""Hand-worked numbers of the parts."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import jaccard_score

from explainer.concepts import embedding
from explainer.concepts.classification import balanced, classification_loss
from explainer.concepts.iou import SetIoU, iou_counts, ratio
from explainer.concepts.segmentation import segmentation_loss
from explainer.concepts.statistics import effective_number, hoyer, mean_and_error, pearson, spearman
from explainer.concepts.subsets import filters_needed, order, sizes, top
from explainer.concepts.supports import Supports, thresholds, upsample
from explainer.errors import ConfigError


def test_set_iou_is_scikit_learns_on_all_pixels():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(6, 5, 7, generator=generator) > 0.6 for _ in range(2))
    metric = SetIoU()
    metric.update(*iou_counts(a[:2], b[:2]))
    metric.update(*iou_counts(a[2:], b[2:]))
    assert float(metric.compute()) == pytest.approx(jaccard_score(b.flatten(), a.flatten()))
    assert float(ratio(torch.zeros(1), torch.zeros(1))) == 0


def test_thresholds_leave_the_share_above():
    maps = torch.arange(1.0, 201).view(2, 1, 10, 10)  # 1 to 200
    assert float(thresholds([maps], 0.05)) == 190  # 191 to 200 are above: 5 %
    assert float(thresholds([maps[:1], maps[1:]], 0.05)) == 190
    dead = thresholds([torch.full((2, 1, 4, 4), 3.0)], 0.1)
    assert float(dead) == 3 and len(Supports.of(torch.full((2, 1, 4, 4), 3.0), dead).filters) == 0
    with pytest.raises(ConfigError, match=r"tau is a share .* received 1"):
        thresholds([maps], 1.0)


def test_supports_combine_as_dense_maps_do():
    generator = torch.Generator().manual_seed(1)
    maps, limits = torch.rand(5, 4, 3, 2, generator=generator), torch.tensor([0.2, 0.5, 0.9, 2.0])
    supports, w = Supports.of(maps, limits), torch.randn(4, generator=generator, requires_grad=True)
    dense = (maps > limits[:, None, None]).float()
    torch.testing.assert_close(supports.combine(w), torch.einsum("nkhw,k->nhw", dense, w))
    some = torch.tensor([4, 0])
    torch.testing.assert_close(supports.only(some).combine(w), torch.einsum("nkhw,k->nhw", dense[some], w))
    torch.testing.assert_close(supports.indicators(some), dense[some])
    (gradient,) = torch.autograd.grad(supports.combine(w).sum(), w)
    torch.testing.assert_close(gradient, dense.sum((0, 2, 3)))


def test_the_threshold_stands_before_the_upsampling():
    """A 4-cell block at factor 4: the single filter's mask stays the block, a weight of 1 without bias spreads by half a cell."""
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 2:6, 2:6] = 1
    block = torch.zeros(32, 32, dtype=torch.bool)
    block[8:24, 8:24] = True
    z = upsample(maps, (32, 32))[0, 0]
    i, u = iou_counts(z[None] > 0, block[None])
    assert float(i / u) == pytest.approx(256 / 400)
    i, u = iou_counts(z[None] > 0.5, block[None])
    assert float(i / u) == pytest.approx(252 / 256, abs=0.02)


def test_equation_4_by_hand():
    z, target = torch.tensor([[[0.0, math.log(3)]]]), torch.tensor([[[True, False]]])
    # alpha .8: -(.8 * 1/2 + .2 * (1 - 3/4)) and its logarithms
    assert float(segmentation_loss(z, target, 0.8, "linear")) == pytest.approx(-(0.4 + 0.05))
    assert float(segmentation_loss(z, target, 0.8, "bce")) == pytest.approx(-(0.8 * math.log(0.5) + 0.2 * math.log(0.25)))
    assert float(segmentation_loss(z, target, 0.0, "linear")) == pytest.approx(-(0.5 + 0.25))  # alpha left out
    assert float(segmentation_loss(z, target, 0.8, "linear", torch.tensor([[[True, False]]]))) == pytest.approx(-0.4)


def test_balanced_draws_and_even_weights():
    labels = torch.tensor([True] * 3 + [False] * 9)
    drawn = balanced(labels, 0, 1, 2)
    assert len(drawn) == 6 == len(set(drawn.tolist())) and {0, 1, 2} <= set(drawn.tolist())
    assert sorted(drawn.tolist()) != sorted(balanced(labels, 0, 1, 3).tolist())
    assert {0, 1, 2} <= set(balanced(~labels, 0).tolist()) and len(balanced(~labels, 0)) == 6  # more positives: the reverse
    w = torch.tensor([2.0])
    values = torch.where(labels, 1.0, -0.5)[:, None]
    positive, negative = math.log1p(math.exp(-2.0)), math.log1p(math.exp(-1.0))
    assert float(classification_loss(values, labels, w, None, True)) == pytest.approx((positive + negative) / 2)
    assert float(classification_loss(values, labels, w, None, False)) == pytest.approx((3 * positive + 9 * negative) / 12)


def test_statistics_are_scipys():
    rng = np.random.default_rng(0)
    for n, noise in ((8, 1.0), (30, 2.0), (300, 8.0)):
        x = rng.normal(size=n)
        y = x + noise * rng.normal(size=n)
        expected = stats.pearsonr(x, y)
        assert pearson(torch.tensor(x), torch.tensor(y)) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-3)
        assert spearman(x.tolist(), y.tolist()) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-6)
    assert math.isnan(pearson(torch.ones(5), torch.arange(5.0))[0]) and math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert mean_and_error([1.0, 3.0, math.nan]) == (2.0, 1.0)  # standard deviation sqrt(2) over sqrt(2)


def test_sparsity():
    one, all_alike = torch.tensor([0.0, -3.0, 0.0, 0.0]), torch.ones(4)
    assert (hoyer(one), effective_number(one)) == pytest.approx((1.0, 1.0))
    assert (hoyer(all_alike), effective_number(all_alike)) == pytest.approx((0.0, 4.0))
    assert math.isnan(hoyer(torch.zeros(4))) and math.isnan(effective_number(torch.zeros(4)))


def test_subsets():
    w = torch.tensor([0.5, -2.0, 0.5, 1.0])
    assert order(w).tolist() == [1, 3, 0, 2] and top(w, 3).tolist() == [1, 1, 0, 1]
    assert sizes((1, 2, 4, 8), 6) == [1, 2, 4, 6]
    assert filters_needed({1: 0.5, 2: 0.91, 8: 1.0}, 0.9) == 2 and filters_needed({1: math.nan}, 0.9) is None


def test_neighbours_and_arithmetic():
    names = ("grass", "sky", "blue", "green", "t-shirt")
    w = torch.tensor([[1.0, 0, 1], [0, 2, 1], [0, 3, 0], [5, 0, 0], [0, 0, 0]])
    assert [names[i] for i, _ in embedding.nearest(w, 1)] == ["blue", "grass", "green"]  # cosines 2/sqrt 5, 1/sqrt 10, 0; not the zeros
    assert embedding.nearest(w, 1)[0][1] == pytest.approx(2 / math.sqrt(5))
    terms = embedding.parse_query("grass + blue - green", names)
    assert terms == [(0, 1.0), (2, 1.0), (3, -1.0)]
    assert names[embedding.arithmetic(w, terms)[0][0]] == "sky"
    assert embedding.parse_query("- t-shirt + sky", names) == [(4, -1.0), (1, 1.0)]
    with pytest.raises(ConfigError, match="names 'gras', which is not a concept"):
        embedding.parse_query("gras + blue", names)


def test_clusters_and_spaces():
    w = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    label, inertia = embedding.kmeans(w, 2)
    assert label[0] == label[1] != label[2] == label[3] and 0 < inertia < 0.05
    assert embedding.purity(label, ["a", "a", "b", "a"]) == 0.75
    first, second = torch.eye(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    distance, rows = embedding.space_distance(first, second)
    assert distance == 0.5 and rows.tolist() == [0.25, 0.25]
    labels = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]]).bool()
    assert float(embedding.cooccurrence(labels)[0, 1]) == pytest.approx(np.corrcoef(labels[:, 0], labels[:, 1])[0, 1])
    placed = embedding.plane(w)
    torch.testing.assert_close(torch.cdist(placed, placed), torch.cdist(*[embedding.unit_vectors(w)] * 2), atol=1e-4, rtol=1e-4)
