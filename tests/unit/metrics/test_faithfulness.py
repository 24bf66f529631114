"""Metrics that ask the classifier, on a classifier whose answer can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from explainer.errors import ConfigError, ShapeError
from explainer.metrics.base import PerImageMetric
from explainer.metrics.captum_metrics import infidelity, max_sensitivity
from explainer.metrics.classification_kept import ClassificationKept, image_f1, micro_counts, scores_from_counts
from explainer.metrics.classifier import class_outputs, class_scores, correct, masked, predicted_classes, removal_fill
from explainer.metrics.fidelity import fidelity
from explainer.metrics.masking_matrix import MaskingMatrix, masking_contrast, masking_scores
from explainer.metrics.monotonicity import AREAS, monotone_scores, monotonicity
from explainer.metrics.perturbation_curves import (
    AGF_FRACTIONS,
    area_under,
    deletion,
    even_fractions,
    insertion,
    negative_perturbation,
    perturbation_curve,
    positive_perturbation,
)
from explainer.metrics.probability import prob_entropy
from explainer.metrics.sal import sal, saliency_metric
from explainer.metrics.stability import stability
from explainer.metrics.sufficiency import necessity, sufficiency, sufficiency_by_fill
from explainer.models.explanandum import Explanandum

SIDE = 4


class Linear(nn.Module):
    """logit_k = scale * sum of weights_k * (mean over channels of the normalised image)."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x):
        return torch.einsum("bhw,khw->bk", x.mean(1), self.weights)


def linear(weights, task="multilabel", mean=0.0, std=1.0):
    return Explanandum(Linear(weights.double()), num_classes=len(weights), task=task, mean=mean, std=std)


@pytest.fixture
def quadrants():
    """Class k sees quadrant k: logit = sum over its 4 pixels."""
    weights = torch.zeros(4, SIDE, SIDE)
    for k in range(4):
        row, column = 2 * (k // 2), 2 * (k % 2)
        weights[k, row : row + 2, column : column + 2] = 1
    return linear(weights), weights


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------ outputs and fills
def test_outputs_of_the_classifier(quadrants):
    net, _ = quadrants
    images = torch.ones(1, 3, SIDE, SIDE, dtype=torch.float64)
    images[..., :2] = 0
    assert class_outputs(net, images, "logit").tolist() == [[0, 4, 0, 4]]
    sigmoid, e = 1 / (1 + math.exp(-4)), math.exp(4)
    assert class_outputs(net, images)[0].tolist() == pytest.approx([0.5, sigmoid, 0.5, sigmoid])
    assert class_outputs(net, images, "softmax")[0].tolist() == pytest.approx([1 / (2 + 2 * e), e / (2 + 2 * e)] * 2)
    assert class_scores(net, images, [1], "logit").tolist() == [4]
    with pytest.raises(ConfigError, match="output must be one of"):
        class_outputs(net, images, "odds")


def test_predicted_classes_by_hand():
    logits = torch.tensor([[2.0, -1.0, 0.0], [-3.0, -1.0, -2.0]])  # probabilities .88 .27 .5 and .05 .27 .12
    assert predicted_classes(logits, "multiclass").int().tolist() == [[1, 0, 0], [0, 1, 0]]
    assert predicted_classes(logits, "multilabel").int().tolist() == [[1, 0, 1], [0, 1, 0]]
    assert predicted_classes(logits, "multilabel", at_least_one=False).int().tolist() == [[1, 0, 1], [0, 0, 0]]
    assert predicted_classes(logits, "multilabel", threshold=0.8, at_least_one=False).int().tolist() == [[1, 0, 0], [0, 0, 0]]
    assert predicted_classes(logits, "multilabel", threshold=0.25).int().tolist() == [[1, 1, 1], [0, 1, 0]]


def test_correct_depends_on_the_task(quadrants):
    net, weights = quadrants
    images = torch.full((1, 3, SIDE, SIDE), 0.1, dtype=torch.float64)
    images[..., 2:, 2:] = 0.9
    assert [correct(net, images, k).item() for k in range(4)] == [1, 1, 1, 1]
    single = linear(weights, task="multiclass")
    assert [correct(single, images, k).item() for k in range(4)] == [0, 0, 0, 1]
    assert correct(single, images * math.nan, 3).isnan().all()


def test_fills_do_not_depend_on_the_batch(quadrants):
    net, _ = quadrants
    images = uniform(3, 3, SIDE, SIDE)
    mask = uniform(3, SIDE, SIDE, seed=1)
    for fill in ("mean", "black", "grey", "white", "blur", "noise"):
        whole = masked(net, images, mask, fill)
        torch.testing.assert_close(masked(net, images[1:2], mask[1:2], fill), whole[1:2])
    assert removal_fill(net, images[:1], "shuffle").isnan().all(), "no other image to borrow from"
    own = torch.full((1, 3, 1, 1), 0.25)
    assert torch.equal(removal_fill(net, images, own), own.double())
    assert masked(net, images, torch.zeros_like(mask), own).unique().tolist() == [0.25]


# ------------------------------------------------------------------ Sal, probabilities
def test_sal_by_hand(quadrants):
    net, _ = quadrants
    images = torch.ones(2, 3, SIDE, SIDE, dtype=torch.float64)
    mask = torch.zeros(2, SIDE, SIDE, dtype=torch.float64)
    mask[0, :2, :2] = 1
    mask[1, 0, 0] = 0.2  # area below 5 %
    targets = torch.tensor([[1.0, 0, 0, 0], [1.0, 1.0, 0, 0]])
    first = math.log(0.25) - math.log(math.exp(4) / (math.exp(4) + 3))
    second = math.log(0.05) - math.log((math.exp(0.2) + 1) / (math.exp(0.2) + 3))
    assert sal(net, images, mask, targets).tolist() == pytest.approx([first, second])
    metric = PerImageMetric(sal)
    metric.update(net, images, mask, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    assert metric.compute().item() == pytest.approx(first) and int(metric.excluded) == 1, "no labels: undefined"
    assert saliency_metric(mask[:1], torch.zeros(1, 4), targets[:1]).item() == pytest.approx(math.log(0.25) + 12 * math.log(10))


def test_probability_metrics_of_the_masked_image(quadrants):
    net, _ = quadrants
    images, nothing = uniform(1, 3, SIDE, SIDE), torch.zeros(1, SIDE, SIDE)
    sparsity, entropy = PerImageMetric("prob_sparsity"), PerImageMetric("prob_entropy")
    sparsity.update(net, images, nothing)
    entropy.update(net, images, nothing)
    assert sparsity.compute().item() == pytest.approx(0.25) and entropy.compute().item() == pytest.approx(math.log(4))
    assert prob_entropy(torch.tensor([[1.0, 0.0]])).item() == 0


# ------------------------------------------------------------------ perturbation curves
def test_curves_against_a_pixel_loop():
    weights = uniform(2, SIDE, SIDE, seed=3) - 0.3
    net = linear(weights, mean=0.3, std=0.5)
    images, saliency = uniform(3, 3, SIDE, SIDE, seed=4), uniform(3, SIDE, SIDE, seed=5)
    classes, fractions = torch.tensor([0, 1, 0]), even_fractions(8)
    for first, reveal in (("highest", False), ("lowest", False), ("highest", True)):
        curve = perturbation_curve(
            net, images, saliency, classes, fractions, first=first, reveal=reveal, fill="black", measure="probability"
        )
        for b in range(3):
            order = np.argsort(-saliency[b].flatten().numpy() if first == "highest" else saliency[b].flatten().numpy())
            for t, fraction in enumerate(fractions):
                chosen = order[: int(16 * fraction)]
                image = images[b].flatten(1).numpy().copy()
                kept = np.isin(np.arange(16), chosen) == reveal
                image[:, ~kept] = 0
                logit = ((image - 0.3) / 0.5).mean(0) @ weights[classes[b]].flatten().numpy()
                assert curve[b, t].item() == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-12)


def test_deletion_and_insertion_by_hand():
    """One pixel carries everything: logit 10 with it, -10 without (mean fill is 0 after normalisation)."""

    class OnePixel(nn.Module):
        def forward(self, x):
            own = 20 * x[:, 0, 0, 0] - 10
            return torch.stack([own, -own], 1)

    net = Explanandum(OnePixel(), num_classes=2, mean=0.0, std=1.0)
    images = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    images[..., 0, 0] = 1
    low, high = 1 / (1 + math.exp(10)), 1 / (1 + math.exp(-10))
    right = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    index = torch.tensor([0])
    assert deletion(net, images, right, index, steps=4).item() == pytest.approx((0.5 * (high + low) + 3 * low) / 4)
    assert deletion(net, images, -right, index, steps=4).item() == pytest.approx((3 * high + 0.5 * (high + low)) / 4)
    assert insertion(net, images, right, index, steps=4, fill="black").item() == pytest.approx((0.5 * (low + high) + 3 * high) / 4)
    assert insertion(net, images, -right, index, steps=4, fill="black").item() == pytest.approx((3 * low + 0.5 * (low + high)) / 4)
    # AGF: of 0, .1, ... .9 with 4 pixels, the pixel goes at floor(4 q) = 1, q >= .3, when it goes first; it never goes when it goes last.
    assert positive_perturbation(net, images, right, index).item() == pytest.approx(100 * (0.2 + 0.05))
    assert negative_perturbation(net, images, right, index).item() == pytest.approx(90)
    assert negative_perturbation(net, images, -right, index).item() == pytest.approx(25)
    assert negative_perturbation(net, images, right, torch.tensor([1])).item() == 0, "the label decides, not the map's class"
    assert len(AGF_FRACTIONS) == 10


def test_curves_refuse_and_exclude():
    net = linear(uniform(2, SIDE, SIDE))
    images, saliency = uniform(2, 3, SIDE, SIDE), uniform(2, SIDE, SIDE)
    saliency[1, 0, 0] = math.nan
    assert deletion(net, images, saliency, torch.tensor([0, 0]), steps=2).isnan().tolist() == [False, True]
    with pytest.raises(ConfigError, match="steps"):
        deletion(net, images, saliency, torch.tensor([0, 0]), steps=0)
    with pytest.raises(ConfigError, match="measure must be one of"):
        perturbation_curve(net, images, saliency, torch.tensor([0, 0]), [0.5], measure="loss")
    assert area_under(torch.tensor([[0.0, 1.0, 1.0]]), [0.0, 0.5, 1.0]).item() == 0.75


# ------------------------------------------------------------------ sufficiency and necessity
def test_sufficiency_and_necessity_by_hand(quadrants):
    net, _ = quadrants
    images = torch.ones(1, 3, SIDE, SIDE, dtype=torch.float64)
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.float64)
    mask[0, :2, 0] = 1  # half of class 0's quadrant
    index = torch.tensor([0])
    logit = {"mean": (2, 2), "black": (2, 2), "grey": (3, 3), "white": (4, 4)}
    for fill, (kept, left) in logit.items():
        assert sufficiency(net, images, mask, index, fill, output="logit").item() == pytest.approx(kept)
        assert necessity(net, images, mask, index, fill, output="logit").item() == pytest.approx(left)
    assert sufficiency(net, images, mask, index, "black", output="logit", relative=True).item() == pytest.approx(0.5)
    assert sufficiency_by_fill(net, images, mask, index, ("black", "grey", "white"), output="logit").tolist() == [[2, 3, 4]]
    options = {"fills": ("black", "grey"), "output": "logit"}
    kept, left = PerImageMetric("sufficiency", **options), PerImageMetric("necessity", **options)
    mask[0, 0, 1] = 1
    kept.update(net, images, mask, index)
    left.update(net, images, mask, index)
    assert kept.compute().item() == pytest.approx((3 + 3.5) / 2) and left.compute().item() == pytest.approx((1 + 2.5) / 2)


# ------------------------------------------------------------------ masking matrix
def test_masking_matrix_against_a_loop(quadrants):
    net, weights = quadrants
    images, masks = uniform(3, 3, SIDE, SIDE, seed=6), uniform(3, 4, SIDE, SIDE, seed=7) * 0.8
    targets = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    for rescale in (False, True):
        result = masking_scores(net, images, masks, targets, classes=[0, 2, 1], rescale=rescale)
        for b in range(3):
            for t, target in enumerate([0, 2, 1]):
                if not targets[b, target]:
                    assert result[b, t].isnan().all()
                    continue
                for k, source in enumerate([0, 2, 1, None]):
                    values = []
                    for threshold in np.arange(0.1, 1, 0.1):
                        m = np.ones((SIDE, SIDE)) if source is None else masks[b, source].numpy()
                        if rescale and source is not None:
                            m = (m - m.min()) / (m.max() - m.min())
                        logits = np.einsum("hw,khw->k", images[b].mean(0).numpy() * (m > threshold), weights.numpy())
                        values.append(np.exp(logits[target]) / np.exp(logits).sum())
                    assert result[b, t, k].item() == pytest.approx(np.mean(values), abs=1e-9)


def test_masking_matrix_averages_rows_over_the_images_of_their_class(quadrants):
    net, weights = quadrants
    images = 5 * torch.ones(3, 3, SIDE, SIDE, dtype=torch.float64)
    targets = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    own = weights.double().expand(3, 4, SIDE, SIDE)
    metric = MaskingMatrix(num_classes=4)
    metric.update(net, images, own, targets)
    matrix = metric.compute()
    assert matrix.shape == (4, 5) and matrix[2:].isnan().all()
    assert matrix[0].tolist() == pytest.approx([100, 0, 0, 0, 25], abs=1e-4) and matrix[1, 1].item() == pytest.approx(100)
    assert metric.used[:, 0].tolist() == [2, 1, 0, 0]
    contrast = masking_contrast(masking_scores(net, images, own, targets))
    assert contrast[:2].tolist() == pytest.approx([1, 1], abs=1e-6) and contrast[2].isnan()
    same = masking_contrast(masking_scores(net, images, own[:, :1].expand(3, 4, SIDE, SIDE), targets))
    assert abs(same[0].item()) < 1e-12, "equal masks are not class specific"
    assert masking_contrast(masking_scores(net, images, own, targets, classes=[0])).isnan().all()
    with pytest.raises(ShapeError, match=r"expected \(B,K,H,W\)"):
        masking_scores(net, images, own[:, :2], targets)
    with pytest.raises(ConfigError, match=r"in 0\.\.3"):
        MaskingMatrix(num_classes=4, classes=[4])


# ------------------------------------------------------------------ classification kept
def test_micro_scores_by_hand():
    logits = torch.tensor([[1.0, -0.5, -2.0], [0.0, 3.0, math.nan]])
    targets = torch.tensor([[1, 1, 0], [1, 0, 0]])
    counts = micro_counts(logits, targets, 0.0)
    assert counts[0].tolist() == [1, 0, 1, 1] and counts[1].isnan().all()
    assert micro_counts(logits, targets, -1.0)[0].tolist() == [2, 0, 0, 1]
    assert micro_counts(logits, targets, None)[0].tolist() == [1, 0, 1, 1]
    assert scores_from_counts(counts[0]).tolist() == pytest.approx([2 / 3, 1, 0.5, 2 / 3])
    assert scores_from_counts(torch.tensor([0.0, 0, 0, 3]))[1:].isnan().all()
    assert image_f1(logits, targets).tolist()[0] == pytest.approx(2 / 3)


def test_classification_kept_compares_whole_and_masked(quadrants):
    _, weights = quadrants
    shifted = linear(weights, mean=0.5)  # logit = sum - 2
    images = torch.full((1, 3, SIDE, SIDE), 0.2, dtype=torch.float64)
    images[..., :2, :2] = 1
    mask = torch.zeros(1, SIDE, SIDE)
    metric = ClassificationKept(sweep=(0.5,))
    metric.update(shifted, images, mask, torch.tensor([[1, 0, 0, 0]]))
    result = {k: v.item() for k, v in metric.compute().items()}
    # Whole image: logits 2, -1.2, ...: right. All removed: 0 everywhere, above -1: four predictions.
    assert [result[f"original/{s}"] for s in ("accuracy", "precision", "recall", "f1")] == [1, 1, 1, 1]
    assert [result[f"masked/{s}"] for s in ("accuracy", "precision", "recall", "f1")] == pytest.approx([0.25, 0.25, 1, 0.4])
    assert result["masked@0.5/recall"] == 0 and math.isnan(result["masked@0.5/precision"])
    assert metric.total.item() == pytest.approx(0.4) and set(metric.summary()) == {"value", "used", "excluded"}
    single = ClassificationKept()
    single.update(linear(weights, task="multiclass", mean=0.5), images, torch.ones(1, SIDE, SIDE), torch.tensor([[1, 0, 0, 0]]))
    assert single.compute()["masked/f1"].item() == 1
    with pytest.raises(ConfigError, match="NaN"):
        ClassificationKept(sweep=(math.nan,))


# ------------------------------------------------------------------ monotonicity
def test_monotone_up_to_the_area_that_suffices():
    scores = torch.tensor(
        [[0.1, 0.3, 0.9, 0.2], [0.3, 0.1, 0.9, 1.0], [0.9, 0.1, 0.2, 0.9], [0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.8, math.nan]]
    )
    value = monotone_scores(scores, torch.full((5,), 0.8))
    assert value[:3].tolist() == [1, 0, 1], "what happens above a* does not matter"
    assert value[3:].isnan().all(), "the score is never reached, or unknown"
    with pytest.raises(ShapeError, match=r"\(B,A\)"):
        monotone_scores(scores, torch.zeros(3))


def test_monotonicity_of_masks(quadrants):
    net, _ = quadrants
    images = torch.ones(1, 3, SIDE, SIDE, dtype=torch.float64)
    growing = torch.zeros(1, 3, SIDE, SIDE, dtype=torch.float64)
    growing[0, 0, 0, 0] = growing[0, 1, 0, :2] = growing[0, 2, :2, :2] = 1
    index = torch.tensor([0])
    assert monotonicity(net, images, growing, index, fill="black").item() == 1
    assert monotonicity(net, images, growing[:, [1, 0, 2]], index, fill="black").item() == 0
    assert monotonicity(net, images, growing[:, :2], index, fill="black").isnan().all()
    with pytest.raises(ShapeError, match="one mask per area"):
        monotonicity(net, images, growing, index, areas=AREAS)
    with pytest.raises(ConfigError, match="must grow"):
        monotonicity(net, images, growing, index, areas=(0.2, 0.1, 0.3))


# ------------------------------------------------------------------ fidelity
def test_fidelity_is_one_for_the_exact_attribution():
    weights = uniform(2, SIDE, SIDE, seed=8) - 0.5
    net = linear(weights, mean=0.4, std=0.3)
    images = uniform(2, 3, SIDE, SIDE, seed=9)
    exact = ((images - 0.4) / 0.3).mean(1) * weights[[0, 1]]
    index = torch.tensor([0, 1])
    options = {"subsets": 20, "subset_size": 5}
    assert fidelity(net, images, exact, index, **options).tolist() == pytest.approx([1, 1])
    assert fidelity(net, images, -exact, index, **options).tolist() == pytest.approx([-1, -1])


def test_fidelity_against_scipy_and_its_seed():
    net = Explanandum(
        nn.Sequential(nn.Flatten(), nn.Linear(48, 6, dtype=torch.float64), nn.Tanh(), nn.Linear(6, 2, dtype=torch.float64)),
        2,
        mean=0.2,
        std=0.5,
    )
    images, saliency, index = uniform(2, 3, SIDE, SIDE), uniform(2, SIDE, SIDE, seed=1), torch.tensor([1, 0])
    for unit, units in (("pixel", 16), ("feature", 48)):
        value = fidelity(net, images, saliency, index, subsets=9, subset_size=4, fill="white", unit=unit, seed=3)
        generator = torch.Generator().manual_seed(3)
        draws = [torch.randperm(units, generator=generator)[:4].tolist() for _ in range(9)]
        for b in range(2):
            sums, drops = [], []
            for draw in draws:
                image, total = images[b].clone(), 0.0
                for unit_index in draw:
                    channel, pixel = divmod(unit_index, 16)
                    row, column = divmod(pixel, SIDE)
                    image[slice(None) if unit == "pixel" else channel, row, column] = 1.0
                    total += saliency[b, row, column].item()
                sums.append(total)
                drops.append((net(images[b : b + 1]) - net(image[None]))[0, index[b]].item())
            assert value[b].item() == pytest.approx(stats.pearsonr(sums, drops)[0], abs=1e-10)


def test_fidelity_without_variance_is_undefined():
    net, images, index = linear(uniform(2, SIDE, SIDE)), uniform(1, 3, SIDE, SIDE), torch.tensor([0])
    constant = torch.full((1, SIDE, SIDE), 0.1)
    assert fidelity(net, images, constant, index, subsets=4, subset_size=3).isnan().all()
    deaf = linear(torch.zeros(2, SIDE, SIDE))
    assert fidelity(deaf, images, uniform(1, SIDE, SIDE), index, subsets=4, subset_size=3).isnan().all()
    with pytest.raises(ConfigError, match=r"subset_size in 1\.\.16"):
        fidelity(net, images, constant, index, subset_size=17)


# ------------------------------------------------------------------ stability, infidelity, max-sensitivity
def test_stability_of_a_linear_map_by_hand():
    net = linear(torch.zeros(2, SIDE, SIDE), mean=0.5, std=0.25)
    images, index = uniform(2, 3, SIDE, SIDE, seed=2), torch.tensor([0, 1])

    def red(images, class_index):
        return images[:, 0] * 0.1 * (1 + class_index)[:, None, None]

    value = stability(red, net, images, index, samples=5, norm="none", seed=7)
    generator = torch.Generator().manual_seed(7)
    steps = [0.1 * torch.randn(3, SIDE, SIDE, generator=generator, dtype=torch.float64) for _ in range(5)]
    # The map moves by 0.1 (1+k) std times the red channel of the step; the image, in normalised units, by the step.
    ratio = max((step[0].norm() / step.norm()).item() for step in steps)
    assert value.tolist() == pytest.approx([0.025 * ratio, 0.05 * ratio], rel=1e-6)


def test_stability_prepares_all_maps_alike():
    net, images, index = linear(torch.zeros(2, SIDE, SIDE)), uniform(2, 3, SIDE, SIDE), torch.tensor([0, 1])
    assert stability(lambda x, c: torch.ones(len(x), 2, 2), net, images, index, samples=2).tolist() == [0, 0]
    base = stability(lambda x, c: x[:, 0], net, images, index, samples=4)
    torch.testing.assert_close(stability(lambda x, c: 50 * x[:, 0], net, images, index, samples=4), base)
    assert stability(lambda x, c: x[:, 0] * math.nan, net, images, index, samples=2).isnan().all()
    with pytest.raises(ConfigError, match="samples >= 1"):
        stability(lambda x, c: x[:, 0], net, images, index, samples=0)


def test_infidelity_is_zero_for_the_exact_gradient_and_grows():
    weights = uniform(2, SIDE, SIDE, seed=3) - 0.5
    net, images, index = linear(weights), uniform(2, 3, SIDE, SIDE, seed=4), torch.tensor([0, 1])
    exact = weights[[0, 1]]
    options = {"samples": 7, "normalize": False}
    assert infidelity(net, images, exact, index, **options).tolist() == pytest.approx([0, 0], abs=1e-20)
    assert infidelity(net, images, 3 * exact, index, samples=7).tolist() == pytest.approx([0, 0], abs=1e-15), (
        "normalised: units do not matter"
    )
    wrong = uniform(2, SIDE, SIDE, seed=5)
    shifts = 0.1 * torch.randn(7, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 0]
    expected = [((shifts * (wrong[b] - exact[b])).sum((1, 2)) ** 2).mean().item() for b in range(2)]
    assert infidelity(net, images, wrong, index, **options).tolist() == pytest.approx(expected, rel=1e-9)
    wrong[0, 0, 0] = math.nan
    assert infidelity(net, images, wrong, index, **options).isnan().tolist() == [True, False]


def test_max_sensitivity_by_hand():
    images, index = uniform(2, 3, SIDE, SIDE), torch.tensor([0, 1])
    radius = 0.05
    draws = torch.rand((4, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    steps = radius * (2 * draws - 1)

    def green(images, class_index):
        return images[:, 1] * (1 + class_index)[:, None, None]

    value = max_sensitivity(green, images, index, samples=4, radius=radius)
    expected = [max(step[1].norm().item() for step in steps) / images[b, 1].norm().item() for b in range(2)]
    assert value.tolist() == pytest.approx(expected, rel=1e-9)
    assert max_sensitivity(lambda x, c: 0 * x[:, 0], images, index, samples=2).isnan().all()
    needs_gradients = max_sensitivity(
        lambda x, c: torch.autograd.grad((y := x.requires_grad_()).square().sum(), y)[0][:, 1], images, index, samples=4, radius=radius
    )
    torch.testing.assert_close(needs_gradients, torch.tensor(expected, dtype=torch.float64))
