"""Ranking: the estimate of insertion and deletion by hand, and an order that is known for a linear classifier."""

import math

import pytest
import torch
from torch import nn

import explainer
from explainer.errors import ConfigError, ShapeError
from explainer.losses.base import build_terms
from explainer.losses.ranking import ranking_loss, straight_through
from explainer.metrics.perturbation_curves import area_under, even_fractions, perturbation_curve
from explainer.models.black_box import BlackBox
from tests.unit.losses.test_paper_losses import explanation

SIZE = 4


def weights():
    """A different weight for every pixel, in an order that has nothing to do with their places; sum 1."""
    values = torch.randperm(SIZE * SIZE, generator=torch.Generator().manual_seed(3)).float() + 1
    return (values / values.sum()).view(SIZE, SIZE)


class Linear(nn.Module):
    """Two classes: probability 0.02 + 0.96 * sum(w x) (as a logit), with w and with its mirror image. Counts its images."""

    def __init__(self):
        super().__init__()
        w = weights()
        self.register_buffer("w", torch.stack([w, w.flip(1)]))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return torch.logit(0.02 + 0.96 * torch.einsum("bhw,khw->bk", x.mean(1), self.w))


def scene(logits, targets, model=None, **changes):
    model = model or explainer.Explanandum(Linear(), 2, mean=0.0, std=1.0)
    generators = [torch.Generator().manual_seed(i) for i in range(len(targets))]
    images = torch.ones(len(targets), 3, SIZE, SIZE)
    return explanation(
        images=images, class_masks=logits.sigmoid(), targets=targets, shown=targets, explanandum=model, generators=generators, **changes
    )


def term(**options):
    (built,) = build_terms({"ranking": {"insertion_fill": "mean", **options}}).values()
    return built


def correlation(logits, k):
    """Spearman's of the order of a class's logits and of the weights."""
    ranks = [v.flatten().argsort().argsort().float() for v in (logits, weights().flip(1) if k else weights())]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def test_loss_by_hand():
    value = ranking_loss(torch.tensor([0.9, 1.0, 0.0]), torch.tensor([0.3, 0.0, 1.0]))
    torch.testing.assert_close(value, torch.tensor([0.4, 0.0, 2.0]))


def test_masks_of_a_share_are_binary_and_move_soft_ones():
    """Four pixels, half of them: the two highest. m = sigmoid(S - t), dm_i/dS_j = s_i (1[i = j] - s_j / sum s) with s = m (1 - m)."""
    logits = torch.tensor([[[2.0, -1.0], [0.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    masks = straight_through(logits, torch.tensor([0.5], dtype=torch.float64))
    assert torch.equal(masks.detach(), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64))
    (grad,) = torch.autograd.grad((masks * torch.tensor([[1.0, 0.0], [0.0, 0.0]])).sum(), logits)
    # By symmetry t = 0.5: the logits lie at +-1.5 and +-0.5 of it.
    far, near = (p * (1 - p) for p in (1 / (1 + math.exp(-1.5)), 1 / (1 + math.exp(-0.5))))
    total = 2 * far + 2 * near
    expected = [[[far - far * far / total, -far * far / total], [-far * near / total, -far * near / total]]]
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert abs(grad.sum().item()) < 1e-9  # a common offset changes no order
    with torch.no_grad():
        assert torch.equal(straight_through(logits, torch.tensor([0.01], dtype=torch.float64)).sum(), torch.tensor(1.0).double())
    with pytest.raises(ShapeError, match=r"logits must be \[N,H,W\]"):
        straight_through(logits, torch.tensor([0.5, 0.5]))


def test_saturated_masks_have_finite_logits_and_keep_their_order():
    masks = torch.tensor([0.0, 1e-30, 0.5, 1 - 6e-8, 1.0])
    e = explanation(class_masks=masks.expand(1, 2, 1, 5))
    logits = e.ranked(torch.tensor([0]), torch.tensor([1]))[0, 0]
    assert logits.isfinite().all() and (logits.diff() >= 0).all() and (logits.diff()[:3] > 0).all() and logits[2] == 0


def test_mean_over_areas_is_the_area_between_the_curves():
    """Many areas, one in each part of (0,1), against the curves that the evaluation draws."""
    logits = torch.randn(1, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    e = scene(logits, torch.tensor([[0.0, 1.0]]))
    with torch.no_grad():
        value = term(draws=400).value(e).item()
    fractions = even_fractions(SIZE * SIZE)
    label = torch.tensor([1])
    ins, dele = (
        area_under(perturbation_curve(e.explanandum, e.images, logits[:, 1], label, fractions, reveal=reveal, fill="mean"), fractions)
        for reveal in (True, False)
    )
    assert value == pytest.approx(float(1 - ins + dele), abs=0.01)


@pytest.mark.parametrize("gradient", ["straight_through", "perturbation"])
def test_gradient_orders_pixels_by_their_weight(gradient):
    """For a linear classifier both curves are best in the order of the weights."""
    logits = torch.zeros(2, 2, SIZE, SIZE) + 1e-3 * torch.randn(2, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    built = term(gradient=gradient, draws=4, grid=SIZE, sigma=0.3)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    e = scene(logits, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    if gradient == "perturbation":  # its noise is averaged over time
        optimizer = torch.optim.Adam([logits], lr=0.05, betas=(0.95, 0.999))
    for _ in range(60 if gradient == "straight_through" else 200):
        e.class_masks = logits.sigmoid()
        optimizer.zero_grad()
        built.value(e).backward()
        optimizer.step()
    least = 0.95 if gradient == "straight_through" else 0.8
    assert correlation(logits.detach()[0, 0], 0) > least and correlation(logits.detach()[1, 1], 1) > least
    assert abs(correlation(logits.detach()[0, 1], 1)) < 0.5  # an absent class learns nothing


def test_scores_alone_give_the_same_value_and_the_slope_of_the_smoothed_loss():
    """One cell: every perturbation moves all pixels alike, the order stays, the slope is exactly 0."""
    asked = []

    def answer(images):
        asked.append(len(images))
        return Linear()(images)

    model = BlackBox(answer, 2, mean=0.0, std=1.0, cache_size=0)
    logits = torch.randn(2, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(2), requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    built = term(grid=1)
    value = built.value(scene(logits, targets, model))
    assert sum(asked) == 3 * 2 * 2  # the value and two perturbed orders, two images each
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.abs().max() == 0
    with_gradients = built.value(scene(logits, targets))
    assert value.item() == pytest.approx(with_gradients.item(), abs=1e-5)
    with torch.no_grad():
        asked.clear()
        built.value(scene(logits, targets, model))
        assert sum(asked) == 2 * 2  # without gradient no perturbation is asked
    with pytest.raises(ConfigError, match="gives scores only"):
        term(gradient="straight_through").value(scene(logits, targets, model))


def test_an_images_draws_do_not_depend_on_its_neighbours():
    logits = torch.randn(3, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(4))
    targets = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    whole = term(draws=2).value(scene(logits, targets))
    e = scene(logits, targets)
    parts = []
    for i in (0, 2):
        one = scene(logits[i : i + 1], targets[i : i + 1])
        one.generators = e.generators[i : i + 1]
        parts.append(term(draws=2).value(one))
    assert whole.item() == pytest.approx(float(sum(parts)) / 2, abs=1e-6)


def test_a_sample_of_classes_is_asked_by_its_numbers():
    """Masks of class 1 alone give what the masks of both give where class 1 is the only label."""
    logits = torch.randn(1, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(5))
    targets = torch.tensor([[0.0, 1.0]])
    whole = term().value(scene(logits, targets))
    part = scene(logits[:, 1:], targets, classes=torch.tensor([[1]]))
    assert term().value(part).item() == pytest.approx(whole.item(), abs=1e-6)


def test_no_labels_ask_nothing_and_options_are_checked():
    e = scene(torch.zeros(1, 2, SIZE, SIZE), torch.zeros(1, 2))
    assert term().value(e).item() == 0 and e.explanandum.classifier.seen == 0
    for options, message in (
        ({"draws": 0}, "draws and grid must be at least 1"),
        ({"temperature": 0.0}, "temperature and sigma must be positive"),
        ({"gradient": "exact"}, "gradient must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            term(**options)
