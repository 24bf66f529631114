"""The probes name the filters that were planted (tests/unit/concepts/planted.py says which)."""

import pytest
import torch

from explainer.concepts.classification import Features, classification_scores
from explainer.concepts.embedding import arithmetic, parse_query, unit_vectors
from explainer.concepts.segmentation import best_filter, combination_counts, set_iou, single_filter_scores
from explainer.concepts.statistics import pearson, sharing
from explainer.concepts.subsets import filters_needed, order, top
from explainer.concepts.supports import Supports, thresholds
from explainer.tasks.concepts import Recipe, fit_classification, fit_segmentation
from tests.unit.concepts.planted import NAMES, K, activations, planted, truth

BLUE, PAIR, RED, YELLOW = range(4)
CONCEPTS = list(range(4))


@pytest.fixture(scope="module")
def data():
    train, val = planted(120, 0), planted(60, 1)
    limits = thresholds([train[0].maps, val[0].maps], 0.0)
    return [(a, Supports.of(a.maps, limits), t) for a, t in (train, val)]


def scores(fitted, supports, truth, concept):
    w, b = fitted.of(concept)
    return set_iou(combination_counts(supports, truth, concept, truth.images_with(concept), weights=w, bias=b))


@pytest.fixture(scope="module")
def single(data):
    """IoU of every concept and filter, train and val."""
    return [single_filter_scores(supports, truth) for _, supports, truth in data]


@pytest.fixture(scope="module")
def converged(data):
    _, supports, truth = data[0]
    return fit_segmentation(supports, truth, CONCEPTS, Recipe(tolerance=1e-4))


def test_single_filters_are_those_planted(single):
    found = [best_filter(single[0][c]) for c in CONCEPTS]
    assert found == [2, 0, 0, 1]  # pair: a tie of f0 and f1, the lower index
    on_val = [float(single[1][c, k]) for c, k in zip(CONCEPTS, found, strict=True)]
    assert on_val == pytest.approx([1.0, 0.5, 0.5, 1.0])
    served, bins = sharing(found, K)
    assert served[:3] == [2, 1, 1] and dict(bins) == {
        "0": 13,
        "1": 2,
        "2 to 4": 1,
        "5 to 9": 0,
        "10 to 19": 0,
        "20 to 29": 0,
        "30 and more": 0,
    }


def test_no_single_filter_passes_one_half_on_the_pair_and_two_make_it_whole(data, single):
    _, supports, truth = data[1]
    assert float(single[1][PAIR].max()) == pytest.approx(0.5)
    by_hand = torch.zeros(K)
    by_hand[:2] = 1
    images = truth.images_with(PAIR)
    assert set_iou(combination_counts(supports, truth, PAIR, images, weights=by_hand, bias=None)) == 1
    by_hand[1] = -1.5  # red and not yellow
    assert set_iou(combination_counts(supports, truth, RED, truth.images_with(RED), weights=by_hand, bias=None)) == 1


def test_combinations_find_or_and_and_not(data, converged):
    _, supports, truth = data[1]
    assert [scores(converged, supports, truth, c) for c in CONCEPTS] == pytest.approx([1.0] * 4, abs=0.01)
    w = converged.weights
    assert set(order(w[PAIR])[:2].tolist()) == {0, 1} and bool((w[PAIR, :2] > 0).all())
    assert set(order(w[RED])[:2].tolist()) == {0, 1} and w[RED, 0] > 0 > w[RED, 1]
    assert order(w[BLUE])[0] == 2


def test_filters_needed(data, converged):
    _, train, truth = data[0]
    _, val, held_out = data[1]
    need = {}
    for concept in (BLUE, PAIR, RED):
        curve = {}
        for f in (1, 2, K):
            allowed = {concept: top(converged.weights[concept], f)}
            fitted = fit_segmentation(train, truth, [concept], Recipe(tolerance=1e-4), allowed)
            assert int((fitted.weights[concept] != 0).sum()) <= f
            curve[f] = scores(fitted, val, held_out, concept)
        need[concept] = filters_needed(curve, 0.95)
    assert need == {BLUE: 1, PAIR: 2, RED: 2}


def test_equation_4_prefers_two_filters_to_all_of_them(data):
    """It has no logarithm and weighs the background by the foreground's share: stray positive weights stay on noise filters."""
    _, train, truth = data[0]
    _, val, held_out = data[1]
    published = Recipe("published", "linear", False, batch_size=16)
    every = fit_segmentation(train, truth, [PAIR], published)
    assert set(order(every.weights[PAIR])[:2].tolist()) == {0, 1}
    two = fit_segmentation(train, truth, [PAIR], published, {PAIR: top(every.weights[PAIR], 2)})
    assert scores(two, val, held_out, PAIR) == pytest.approx(1.0)
    assert scores(every, val, held_out, PAIR) < 0.5


def test_the_quantile_is_strict_and_bounds_the_iou(data):
    """With tau below the filter's true share q, the best IoU is tau / q."""
    (a, _, truth), (b, _, _) = data
    share = float((torch.cat([a.maps, b.maps])[:, 2] > 0).float().mean())
    limits = thresholds([a.maps, b.maps], 0.005)
    above = float((torch.cat([a.maps, b.maps])[:, 2] > limits[2]).float().mean())
    assert above == pytest.approx(0.005, abs=1e-5)
    supports = Supports.of(a.maps, limits)
    assert float(single_filter_scores(supports, truth)[BLUE][2]) == pytest.approx(0.005 / share, rel=0.1)


def test_together_as_one_by_one(data):
    _, supports, truth = data[0]
    for recipe in (Recipe("published", "linear", False, epochs=5), Recipe(tolerance=1e-3)):
        together = fit_segmentation(supports, truth, [PAIR, YELLOW], recipe)
        for c in (PAIR, YELLOW):
            alone = fit_segmentation(supports, truth, [c], recipe)
            torch.testing.assert_close(alone.weights[c], together.weights[c], rtol=1e-4, atol=1e-5)
        assert bool(together.weights[BLUE].isnan().all())


def test_permuted_and_duplicated_filters(data, converged):
    a, _, truth = data[0]
    b, val, held_out = data[1]
    turn = torch.randperm(K, generator=torch.Generator().manual_seed(3))
    turned = fit_segmentation(Supports.of(a.maps[:, turn], torch.zeros(K)), truth, [PAIR], Recipe(tolerance=1e-4))
    torch.testing.assert_close(turned.weights[PAIR], converged.weights[PAIR, turn], rtol=0.02, atol=0.05)
    twice = [Supports.of(torch.cat([x.maps, x.maps[:, :1]], 1), torch.zeros(K + 1)) for x in (a, b)]
    fitted = fit_segmentation(twice[0], truth, [RED], Recipe(tolerance=1e-4))
    assert scores(fitted, twice[1], held_out, RED) == pytest.approx(scores(converged, val, held_out, RED), abs=0.01)
    assert float(fitted.weights[RED, 0]) == pytest.approx(float(fitted.weights[RED, K]), rel=1e-3)


def test_classification_needs_two_filters_for_red(data):
    (a, _, truth), (b, _, held_out) = data
    features = Features.of(a.mean, True)
    fitted = fit_classification(features, truth.labels, CONCEPTS, Recipe(tolerance=1e-4))
    values = features.of_split(b.mean)

    def score(fit, c):
        return classification_scores(values @ fit.weights[c] + fit.bias[c], held_out.labels[:, c], 0, c)

    for concept in CONCEPTS:
        assert score(fitted, concept) == pytest.approx((1.0, 1.0), abs=0.03)
    w, bias = features.raw(fitted.weights[RED], fitted.bias[RED])
    torch.testing.assert_close(b.mean @ w + bias, values @ fitted.weights[RED] + fitted.bias[RED], rtol=1e-3, atol=1e-3)
    one = fit_classification(
        features, truth.labels, [BLUE, YELLOW], Recipe(tolerance=1e-4), {c: top(fitted.weights[c], 1) for c in (BLUE, YELLOW)}
    )
    assert score(one, BLUE)[0] == 1.0  # f2 alone
    assert order(fitted.weights[BLUE])[0] == 2


def test_published_classification_hardly_moves(data):
    """Learning rate 1e-4 with mean-pooled activations: the weights stay where they began."""
    (a, _, truth), _ = data
    fitted = fit_classification(Features.of(a.mean, False), truth.labels, [BLUE], Recipe.named("published"))
    from explainer.tasks.concepts import initial

    assert float((fitted.weights[BLUE] - initial(K, BLUE, 0)).abs().max()) < 0.01


def test_vectors_can_be_added(converged, single):
    unit = unit_vectors(converged.weights)
    assert unit[PAIR, 1] > 0 > unit[RED, 1] and int(unit[BLUE].argmax()) == 2
    difference = unit[PAIR] - unit[RED]
    assert int(difference.abs().argmax()) == 1
    assert arithmetic(converged.weights, parse_query("pair - red", NAMES))[0][0] == YELLOW  # what f1 sees
    r, p = pearson(converged.weights[BLUE].clamp(min=0), single[1][BLUE])
    assert r > 0.9 and p < 0.01


def test_void_pixels_are_left_out():
    masks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, :2] = True
    void = torch.zeros(1, 4, 4, dtype=torch.bool)
    void[0, 1] = True
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, :2] = 1  # half of the first row: 2 of 8 pixels, or 2 of 4 without the void row
    supports = Supports.of(activations(maps).maps, torch.zeros(1))
    assert float(single_filter_scores(supports, truth(masks))[0, 0]) == 0.25
    assert float(single_filter_scores(supports, truth(masks, void))[0, 0]) == 0.5
