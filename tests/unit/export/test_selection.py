"""Refinement and selective explanation: by hand, and their guarantees by simulation."""

import itertools
import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

import explainer
from explainer.errors import CheckpointError, ConfigError, ShapeError
from explainer.fills import judging_fill
from explainer.inference.judging import selector_verdict
from explainer.inference.refinement import _groups, quality, refine
from explainer.inference.selection import (
    Selector,
    accepted_loss,
    binomial_tail,
    calibrate,
    calibration_pairs,
    explain_selectively,
    truth_loss,
)
from explainer.metrics.classifier import predicted_classes
from explainer.tensors import Batch


class Corners(nn.Module):
    """Logits: 12 times the mean of the top left quarter less 6; the same for the bottom right."""

    def forward(self, x):
        half = x.shape[-1] // 2
        return torch.stack([x[..., :half, :half].mean((1, 2, 3)), x[..., half:, half:].mean((1, 2, 3))], dim=1) * 12 - 6


def model():
    return explainer.Explanandum(Corners(), 2, mean=0.0, std=1.0)


def square(top, left, side=16, size=32):
    mask = torch.zeros(size, size)
    mask[top : top + side, left : left + side] = 1.0
    return mask


class Net(nn.Module):
    """The right quarter for class 0, the whole right half (half of it useless) for class 1."""

    num_classes = 2

    def forward(self, images):
        masks = torch.stack([square(0, 0), square(0, 16) + square(16, 16)])
        return masks.expand(len(images), -1, -1, -1).clone()


def test_quality_by_hand():
    images = torch.ones(3, 3, 32, 32)
    masks = torch.stack([square(0, 0), square(16, 16), 0.5 * torch.ones(32, 32)])
    q = quality(model(), images, masks, torch.tensor([0, 0, 1]))
    high, low = 1 / (1 + math.exp(-6)), 1 / (1 + math.exp(6))
    torch.testing.assert_close(q.kept, torch.tensor([high, low, 0.5]))
    torch.testing.assert_close(q.left, torch.tensor([low, high, 0.5]))
    torch.testing.assert_close(q.score, torch.tensor([high - low, low - high, 0.0]))
    split = quality(model(), images, masks, torch.tensor([0, 0, 1]), batch_size=2)
    torch.testing.assert_close(split.score, q.score)


def test_areas_are_grouped_by_ratio():
    masks = torch.stack([torch.full((4, 4), a) for a in (0.03, 0.09, 0.028, 0.5)])
    assert [(a, rows.tolist()) for a, rows in _groups(masks, (0.025, 0.1, 0.4))] == [(0.025, [0, 2]), (0.1, [1]), (0.4, [3])]
    assert _groups(torch.zeros(1, 2, 2), (0.1, 0.2))[0][0] == 0.1


def test_refinement_improves_a_poor_start_and_never_harms():
    e, images = model(), torch.ones(2, 3, 32, 32)
    start = torch.stack([square(4, 8), square(12, 12)])  # shifted away from the corner that counts
    result = refine(None, e, images, [0, 1], start=start, iterations=30, areas=[0.25], perturbation="fade")
    assert (result.after.score > result.before.score + 0.1).all() and result.improved.all()
    torch.testing.assert_close(result.start, start)
    q = quality(e, images, result.masks, torch.tensor([0, 1]))
    torch.testing.assert_close(q.score, result.after.score)
    perfect = refine(Net(), e, images, 0, iterations=1)
    assert (perfect.after.score >= perfect.before.score).all() and perfect.after.score[0] > 0.99


def test_igos_refines_too_and_the_budget_ends_it():
    e, images = model(), torch.ones(1, 3, 32, 32)
    poor = square(4, 8)[None] * 0.6
    result = refine(None, e, images, 0, "igos_pp", iterations=3, start=poor, size=8, points=4, fill="black")
    assert result.after.score > result.before.score
    quick = refine(None, e, images, 0, iterations=100000, budget_s=0.2, start=poor)
    assert quick.seconds < 20


class ScoresOnly:
    """An Explanandum without a gradient: the share of white in the left half of the image."""

    mean, num_classes, differentiable = torch.zeros(3), 1, False

    def __call__(self, images):
        return images[..., : images.shape[-1] // 2].mean((1, 2, 3))[:, None]

    def probabilities(self, logits):
        return logits


def test_the_guided_filter_takes_over_the_borders_of_the_image():
    """A white square on black and a mask that spills over it by two pixels on each side: cut at the square, from scores alone."""
    images = torch.zeros(1, 3, 32, 32)
    images[..., 8:20, 8:20] = 1.0
    truth = (images[:, 0] > 0).float()
    start = torch.zeros(1, 32, 32)
    start[:, 6:22, 6:22] = 0.9
    result = refine(None, ScoresOnly(), images, 0, "guided_filter", start=start, fill="black")
    assert bool(result.improved) and torch.equal(result.masks, truth)
    with pytest.raises(ConfigError, match="guided_filter has the options radius and eps, received smooth"):
        refine(None, ScoresOnly(), images, 0, "guided_filter", start=start, smooth=0.1)
    with pytest.raises(ConfigError, match="tolerance must be at least 0"):
        refine(None, ScoresOnly(), images, 0, "guided_filter", start=start, tolerance=-0.1)
    with pytest.raises(ConfigError, match=r"igos_pp needs gradients.*guided_filter"):
        refine(None, ScoresOnly(), images, 0, "igos_pp", start=start)
    nothing = refine(None, ScoresOnly(), images, 0, "guided_filter", start=start * 0.5, fill="black")
    assert not bool(nothing.improved) and torch.equal(nothing.masks, start * 0.5), "an empty mask is no improvement"
    # A white pixel far away, shown by 0.4, which the filter drops: of 512 pixels 0.4 less is kept and 0.4 more is left, 0.0016 together.
    images[..., 28, 2] = 1.0
    given = truth.clone()
    given[:, 28, 2] = 0.4
    for tolerance, kept in ((None, True), (0.0, False), (0.001, False), (0.002, True)):
        again = refine(None, ScoresOnly(), images, 0, "guided_filter", start=given, fill="black", tolerance=tolerance)
        assert again.improved.tolist() == [kept] and torch.equal(again.masks, truth if kept else given)


def test_refine_errors():
    e, images = model(), torch.ones(1, 3, 32, 32)
    with pytest.raises(ConfigError, match="refine method must be one of"):
        refine(Net(), e, images, 0, "rise")
    with pytest.raises(ShapeError, match=r"start must be \[B,H,W\]"):
        refine(Net(), e, images, 0, start=torch.ones(1, 8, 8))


def test_loss_against_truth():
    masks = torch.tensor([[[1.0, 0.5]], [[0.0, 0.0]], [[0.0, 0.0]]])
    truth = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    torch.testing.assert_close(truth_loss(masks, truth, None), torch.tensor([0.25, 0.0, 1.0]))
    assert truth_loss(masks, truth, 0.5).tolist() == [0.0, 0.0, 1.0] and truth_loss(masks, truth, 0.8).tolist() == [1.0, 0.0, 1.0]


def test_first_stage_that_passes_is_given():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.1, 0.2]])
    losses = torch.tensor([[0.3, 1.0], [1.0, 0.4], [1.0, 1.0]])
    loss, accepted = accepted_loss(scores, losses, 0.5)
    assert loss.tolist() == pytest.approx([0.3, 0.4, 0.0]) and accepted.tolist() == [True, True, False]


def test_conformal_threshold_by_hand():
    """n = 9, alpha = 0.3: the sum of accepted losses may reach 2, for (2 + 1) / 10 = 0.3."""
    scores = torch.arange(1, 10) / 10
    losses = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])  # bad: .1 .2 .4 .6
    assert calibrate(scores, losses, 0.3).threshold == pytest.approx(0.2)  # accepts .3 and above: two bad ones
    assert calibrate(scores, losses, 0.2).threshold == pytest.approx(0.4)
    assert calibrate(scores, torch.zeros(9), 0.2).threshold == -2.0
    assert calibrate(scores, losses, 0.101).threshold == pytest.approx(0.6)
    with pytest.raises(ConfigError, match=r"9 calibration images are too few for alpha=0\.05: 19 are the least"):
        calibrate(scores, losses, 0.05)


def test_conformal_counts_a_loss_that_comes_back_at_stricter_thresholds():
    """Loose: the good first mask is given. Stricter: the bad refined one. The threshold must pay for the worse."""
    scores = torch.tensor([[0.1, 0.9]] * 3 + [[0.5, 0.5]] * 6)
    losses = torch.tensor([[0.0, 1.0]] * 3 + [[0.0, 0.0]] * 6)
    assert calibrate(scores, losses, 0.3).threshold == pytest.approx(0.9)
    assert calibrate(scores, losses, 0.4).threshold == -2.0


def draw(n, generator):
    """Scores uniform in [0,1]; an explanation is bad with probability (1 - score)^2."""
    scores = torch.rand(n, generator=generator, dtype=torch.float64)
    return scores, (torch.rand(n, generator=generator, dtype=torch.float64) < (1 - scores) ** 2).double()


def test_marginal_guarantee_by_simulation():
    """True risk at threshold t is (1-t)^3 / 3. Its mean over 400 calibrations of 50 images must not exceed alpha, and come near it."""
    g = torch.Generator().manual_seed(0)
    risks = []
    for _ in range(400):
        t = max(0.0, calibrate(*draw(50, g), alpha=0.1).threshold)
        risks.append((1 - t) ** 3 / 3)
    assert 0.08 < sum(risks) / 400 < 0.1 + 2 * torch.tensor(risks).std().item() / 20


def test_selective_guarantee_by_simulation():
    """P(bad | score > t) = (1-t)^2 / 3 must exceed alpha in no more than delta of the calibrations."""
    g = torch.Generator().manual_seed(0)
    thresholds = [max(0.0, calibrate(*draw(800, g), alpha=0.15, kind="selective", delta=0.2).threshold) for _ in range(100)]
    failures = sum((1 - t) ** 2 / 3 > 0.15 for t in thresholds)
    assert failures <= 20 and min(thresholds) < 0.75


def test_binomial_tail_by_enumeration():
    for n, k, p in ((5, 2, 0.3), (6, 0, 0.5), (4, 4, 0.1)):
        exact = sum(math.prod(p if bit else 1 - p for bit in bits) for bits in itertools.product((0, 1), repeat=n) if sum(bits) <= k)
        assert binomial_tail(n, k, p) == pytest.approx(exact)
    assert binomial_tail(0, 0, 0.2) == 1.0


def test_pipeline_accepts_refines_or_withholds():
    e, images = model(), torch.ones(2, 3, 32, 32)
    images[1] = 0.0  # nothing to see: no mask can be good
    abstain = Selector(0.5, 0.1, "marginal", None, 50)
    result = explain_selectively(Net(), e, images, [0, 0], abstain)
    assert result.accepted.tolist() == [True, False] and not result.refined.any()
    torch.testing.assert_close(result.masks, Net()(images)[:, 0])
    retry = Selector(0.5, 0.1, "marginal", None, 50, "refine", refinement={"iterations": 30, "areas": [0.25], "perturbation": "fade"})
    start = torch.stack([square(4, 4), square(4, 4)])
    result = explain_selectively(None, e, images, [0, 0], retry, start=start)
    assert result.refined.all() and result.accepted.tolist() == [True, False] and result.scores[0] > 0.5


def test_calibration_pairs_take_one_label_an_image():
    e = model()
    images, targets = torch.ones(6, 3, 32, 32), torch.tensor([[1.0, 1.0]] * 3 + [[0.0, 1.0]] * 2 + [[0.0, 0.0]])
    truth = torch.stack([square(0, 0), square(16, 16)]).expand(6, -1, -1, -1)
    batch = Batch(images, targets, truth)
    scores, losses = calibration_pairs(Net(), e, [batch], loss=lambda m, t: truth_loss(m, t, None), classes="labels")
    assert scores.shape == losses.shape == (5, 1)
    assert set(losses.flatten().tolist()) <= {0.0, 0.5} and losses[3:].flatten().tolist() == [0.5, 0.5]
    both, worse = calibration_pairs(Net(), e, [batch], fallback="refine", refinement={"iterations": 1}, classes="labels")
    assert both.shape == worse.shape == (5, 2) and (both[:, 1] >= both[:, 0] - 1e-6).all()
    with pytest.raises(ConfigError, match="ground-truth masks"):
        calibration_pairs(Net(), e, [Batch(images, targets)])


class Sure(nn.Module):
    """Logits 3, 1, -1, -3 for class 0 by the image's brightness 0, 0.1, 0.2, 0.3; always -1 for class 1."""

    def forward(self, x):
        return torch.stack([3 - 20 * x.mean((1, 2, 3)), -torch.ones(len(x))], dim=1)


def test_calibration_draws_what_explain_explains():
    e = explainer.Explanandum(Sure(), 2, mean=0.0, std=1.0)
    images = torch.stack([torch.full((3, 32, 32), level) for level in (0.0, 0.1, 0.2, 0.3)])
    targets = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    truth = torch.stack([square(0, 0), square(16, 16)]).expand(4, -1, -1, -1)
    # Predicted: class 0 on the first two images. The first has it (a perfect mask), the second does not; labels alone would miss that.
    _, losses = calibration_pairs(Net(), e, [Batch(images, targets, truth)])
    assert losses.flatten().tolist() == [0.0, 1.0]
    _, losses = calibration_pairs(Net(), e, [Batch(images, targets, truth)], predicted_from=0.9)
    assert losses.flatten().tolist() == [0.0]
    # A mask of a class that is not there is bad even where the loss would call two empty masks equal.
    _, losses = calibration_pairs(Net(), e, [Batch(images, targets, truth * 0)], loss=lambda m, t: torch.zeros(len(m)))
    assert losses.flatten().tolist() == [0.0, 1.0]
    with pytest.raises(ConfigError, match="no calibration image has a predicted class"):
        calibration_pairs(Net(), e, [Batch(images, targets, truth)], predicted_from=0.99)
    with pytest.raises(ConfigError, match="predicted or labels"):
        calibration_pairs(Net(), e, [Batch(images, targets, truth)], classes="all")
    single = explainer.Explanandum(Sure(), 2, task="multiclass", mean=0.0, std=1.0)
    assert predicted_classes(single(images[[0, 1, 3]]), "multiclass").tolist() == [[True, False]] * 2 + [[False, True]]


def test_marginal_guarantee_where_the_classifier_invents_classes():
    """Half of what is predicted is not there, at any score: a threshold from labels would give it all, one from predictions holds alpha."""
    g = torch.Generator().manual_seed(0)
    given = []
    for _ in range(200):
        scores, bad = torch.rand(50, generator=g), (torch.rand(50, generator=g) < 0.5).float()
        assert calibrate(scores, torch.zeros(50)).threshold == -2.0  # labels: every mask of a class that is there is right
        t = max(0.0, calibrate(scores, bad).threshold)
        given.append((1 - t) * 0.5)
    assert 0.08 < sum(given) / 200 <= 0.1 + 2 * torch.tensor(given).std().item() / math.sqrt(200)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threshold", "high"),
        ("threshold", float("nan")),
        ("threshold", 1.5),
        ("threshold", True),
        ("alpha", -1),
        ("kind", "sure"),
        ("delta", 2),
        ("delta", None),
        ("images", 0),
        ("images", 1.5),
        ("fallback", "guess"),
        ("fill", "pink"),
        ("fill", ["mean"]),
        ("refinement", [1]),
        ("refinement", {"method": "x"}),
        ("refinement", {"iterations": "many"}),
        ("classes", "all"),
        ("predicted_from", "0.5"),
        ("explainer", 3),
        ("classifier", {}),
        ("surprise", 1),
    ],
)
def test_a_selector_with_a_wrong_value_is_refused(tmp_path, key, value):
    good = asdict(Selector(0.25, 0.1, "selective", 0.05, 40, "refine", "blur", {"iterations": 5}))
    (tmp_path / "s.json").write_text(json.dumps({**good, key: value}))
    with pytest.raises(CheckpointError, match="is not a selector"):
        Selector.load(tmp_path / "s.json")


def test_the_first_selectors_were_calibrated_on_labels(tmp_path):
    old = {k: v for k, v in asdict(Selector(0.25, 0.1, "marginal", None, 40)).items() if k not in ("classes", "explainer", "classifier")}
    (tmp_path / "s.json").write_text(json.dumps(old))
    assert Selector.load(tmp_path / "s.json").classes == "labels"
    (tmp_path / "s.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="is not a selector"):
        Selector.load(tmp_path / "s.json")


def test_a_selector_is_refused_for_another_pipeline():
    e = model()
    selector = Selector(0.25, 0.1, "marginal", None, 40, explainer="aa", classifier=e.fingerprint())
    selector.require_same_pipeline({"weights": "aa", "precision": "fp16"}, e, 0.5, "s.json")
    for description, classifier, threshold, words in (
        ({"weights": "bb"}, e, 0.5, "calibrated for the Explainer with fingerprint aa, received bb.*explainer calibrate"),
        ({"weights": "aa"}, explainer.Explanandum(Corners(), 2), 0.5, "calibrated for the classifier with fingerprint"),
        ({"weights": "aa", "precision": "int8"}, e, 0.5, "int8"),
        ({"weights": "aa"}, e, 0.3, "--threshold 0.5, or calibrate with --predicted_from 0.3"),
    ):
        with pytest.raises(ConfigError, match=words):
            selector.require_same_pipeline(description, classifier, threshold, "s.json")
    Selector(0.25, 0.1, "marginal", None, 40, classes="labels").require_same_pipeline({}, e, 0.3, "s.json")


def test_fills_that_a_single_mask_can_be_judged_by():
    assert [judging_fill(v) for v in ("blur", "grey", "shuffle", "random", None, ["x"])] == ["blur", "grey", "mean", "mean", "mean", "mean"]


def test_selector_files_and_errors(tmp_path):
    selector = Selector(0.25, 0.1, "selective", 0.05, 40, "refine", "blur", {"iterations": 5}, "labels", 0.4, "aa", "bb")
    selector.save(tmp_path / "s.json")
    assert Selector.load(tmp_path / "s.json") == selector
    (tmp_path / "bad.json").write_text("{}")
    for name in ("bad.json", "none.json"):
        with pytest.raises(CheckpointError, match="is not a selector"):
            Selector.load(tmp_path / name)
    with pytest.raises(ConfigError, match="losses of 0 "):
        calibrate(torch.rand(9), torch.full((9,), 0.5), kind="selective")
    with pytest.raises(ConfigError, match="no threshold has a risk"):
        calibrate(torch.rand(9), torch.ones(9), kind="selective")
    with pytest.raises(ConfigError, match=r"must lie in \[0,1\]"):
        calibrate(torch.rand(9), torch.full((9,), 1.5), 0.2)
    with pytest.raises(ShapeError, match="one shape"):
        calibrate(torch.rand(9), torch.rand(8))


def test_a_calibration_that_accepts_only_wrong_masks_says_so(tmp_path):
    """The marginal bound holds: 1 of 20 masks is accepted, and it is wrong."""
    scores = torch.linspace(0, 0.95, 20)[:, None]
    losses = torch.cat([torch.zeros(18), torch.ones(2)])[:, None]  # the best scores belong to wrong masks
    selector = calibrate(scores, losses, 0.1)
    said = selector_verdict(scores, losses, selector.threshold)
    assert accepted_loss(scores, losses, selector.threshold)[1].sum() == 1
    assert said == ["WARNING: only wrong masks are accepted, 1 of 1. The bound holds because they are few. Do not use this selector."]
    kept = Selector(**{**asdict(selector), "verdict": tuple(said)})
    kept.save(tmp_path / "s.json")
    assert Selector.load(tmp_path / "s.json") == kept
    assert selector_verdict(scores, losses, 1.0)[0].startswith("WARNING: nothing is accepted: of 20 masks none")
    assert selector_verdict(scores, losses, 0.66)[0] == (  # scores 0.7 to 0.95: six, two of them wrong
        "WARNING: what is accepted is no better than what is not: mean loss 0.33, 0.10 of all masks. The score does not tell good masks "
        "from bad ones here; another fill may (--fill)."
    )
    assert selector_verdict(scores, 1 - losses, 0.71)[0].startswith(
        "WARNING: most of what is accepted is wrong: mean loss 0.60 over 5 masks."
    )
    assert selector_verdict(scores, losses.flip(0), 0.52) == ["9 of 20 masks are accepted, mean loss 0.00 (0.10 of all masks)."]
