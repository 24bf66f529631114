"""Selective explanation: an explanation is given where its quality score is above a calibrated threshold, else refined or withheld.

The score (:func:`explainer.inference.refinement.quality`) costs one extra classifier pass and knows no ground truth.
The threshold comes from calibration images with a loss in [0,1] per explanation (:func:`truth_loss`, or any other judgement).

What is drawn. One explanation per image, so that the calibration pairs are exchangeable with later ones: that of a class drawn at random
among the image's *predicted* classes (``classes: predicted``, what ``explainer explain`` explains; the loss is 1 where the image does not
have that class: no mask of it is right), or among its *true labels* (``classes: labels``, for a user who knows them). Images without such
a class are left out. "An explanation" below is such a pair of an image and a class: where all predicted classes of an image are explained,
the bounds hold for the image's mean over them, each image counting once. They do not hold for classes that a user names although they are
not predicted.

By one of two guarantees:

``marginal`` - split conformal risk control (Angelopoulos et al., ICLR 2024). For calibration and test images that are exchangeable,

    E[ loss * 1{accepted} ] <= alpha,

in expectation over both: no more than alpha of all explanations are given and bad. Exact for any n, score and distribution.

``selective`` - with probability at least 1 - delta over the calibration images (independent, like the test images; loss in {0,1}),

    P( bad | accepted ) <= alpha :

of the explanations that are given, no more than alpha are bad. By exact binomial tests at thresholds fixed in advance, with
Bonferroni's correction (after Geifman & El-Yaniv, NeurIPS 2017).

Neither says anything about images of another distribution; there the score may still flag them, which is measured, not guaranteed. Both
hold for the pipeline that was calibrated: the same Explainer and classifier (their fingerprints are stored, and another is refused), the
same image size, the same rule for predicted classes, the same fallback and refinement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from explainer.attribution import check_class_index
from explainer.errors import CheckpointError, ConfigError, ShapeError
from explainer.files import parse_json, write_json
from explainer.fills import FillKind
from explainer.inference.refinement import quality, refine, starting_masks
from explainer.metrics.classifier import predicted_classes
from explainer.tensors import Batch
from explainer.vocabulary import RefineMethod

Kind = Literal["marginal", "selective"]
Fallback = Literal["abstain", "refine"]
Classes = Literal["predicted", "labels"]
_GRID = 20
_ACCEPT_ALL = -2.0  # below every score


@dataclass(frozen=True)
class Selector:
    """A calibrated threshold: explanations with a larger score are given.

    Attributes:
        threshold: the score that has to be exceeded.
        alpha: bound on the risk.
        kind: which guarantee, see the module.
        delta: probability with which ``selective`` may fail; None for ``marginal``.
        images: calibration images.
        fallback: what the calibrated pipeline does with a mask that is not accepted.
        fill: what replaces removed pixels when the score is computed.
        refinement: options of the calibrated refinement.
        classes: which class of an image was drawn, see the module.
        predicted_from: probability from which a class counted as predicted (multi-label).
        explainer, classifier: fingerprints of what was calibrated; None: unknown.
        verdict: what the calibration images say about it, in words (:func:`explainer.inference.judging.selector_verdict`).
    """

    threshold: float
    alpha: float
    kind: Kind
    delta: float | None
    images: int
    fallback: Fallback = "abstain"
    fill: FillKind = "mean"
    refinement: dict[str, Any] | None = None
    classes: Classes = "predicted"
    predicted_from: float = 0.5
    explainer: str | None = None
    classifier: str | None = None
    verdict: Sequence[str] = ()

    def accepts(self, scores: Tensor) -> Tensor:
        """Bool, per score."""
        return scores > self.threshold

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Selector:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: it is not that, or a value is out of its range.
        """
        try:
            values = parse_json(Path(path).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError(f"a {type(values).__name__} instead of named values")
            words = values.get("verdict", ())
            selector = cls(  # the first selectors knew labels only
                **{"classes": "labels", **values, "verdict": tuple(words) if isinstance(words, list) else words}
            )
            if wrong := [name for name, fits in _FIELDS.items() if not fits(getattr(selector, name))]:
                raise ValueError(f"{wrong[0]} is {getattr(selector, wrong[0])!r}")
            if (selector.delta is None) != (selector.kind == "marginal"):
                raise ValueError(f"delta is {selector.delta!r} for kind {selector.kind}")
            return selector
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is not a selector ({error}). Write one with `explainer calibrate`.") from error

    def require_same_pipeline(self, description: dict[str, Any], explanandum: Any, predicted_from: float, source: str) -> None:
        """Refuse to judge by this selector what it was not calibrated for.

        Args:
            description: description of the Explainer (``Runtime.description``).
            explanandum: the classifier.
            predicted_from: probability from which classes count as predicted now.
            source: the selector's file.

        Raises:
            ConfigError: another Explainer, classifier, precision or rule; says what to do.
        """
        again = "Calibrate a selector for this pair with `explainer calibrate`, or give the one it was calibrated for."
        pairs = (("Explainer", self.explainer, description.get("weights")), ("classifier", self.classifier, explanandum.fingerprint()))
        for name, expected, actual in pairs:
            if expected is not None and expected != actual:
                raise ConfigError(f"{source} was calibrated for the {name} with fingerprint {expected}, received {actual}. {again}")
        if description.get("precision") == "int8":
            raise ConfigError(
                f"{source} was calibrated for the network itself, and int8 changes its masks. Explain with the .ckpt or fp32."
            )
        if self.classes == "predicted" and explanandum.task == "multilabel" and predicted_from != self.predicted_from:
            raise ConfigError(
                f"{source} was calibrated for classes predicted from probability {self.predicted_from:g}, received {predicted_from:g}. "
                f"Explain with --threshold {self.predicted_from:g}, or calibrate with --predicted_from {predicted_from:g}."
            )


def _number(low: float, high: float, least: float | None = None) -> Callable[[Any], bool]:
    """Within [low, high], or above ``least``; no truth value, not NaN."""
    return lambda v: isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high and (least is None or v > least)


def _among(names: Any) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, str) and v in get_args(names)


def _is_refinement(values: Any) -> bool:
    if not isinstance(values, dict):
        return values is None
    iterations = values.get("iterations", 1)
    return values.get("method") in (None, *get_args(RefineMethod)) and isinstance(iterations, int) and iterations >= 1


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "threshold": _number(_ACCEPT_ALL, 1.0),
    "alpha": _number(0.0, 1.0, 0.0),
    "kind": _among(Kind),
    "delta": lambda v: v is None or _number(0.0, 1.0, 0.0)(v),
    "images": lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0,
    "fallback": _among(Fallback),
    "fill": _among(FillKind),
    "refinement": _is_refinement,
    "classes": _among(Classes),
    "predicted_from": _number(0.0, 1.0),
    "explainer": lambda v: v is None or isinstance(v, str),
    "classifier": lambda v: v is None or isinstance(v, str),
    "verdict": lambda v: isinstance(v, list | tuple) and all(isinstance(s, str) for s in v),
}


def accepted_loss(scores: Tensor, losses: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """``(loss [n] of what is given, accepted [n])``: the first stage whose score exceeds the threshold is given; 0 where none does.

    Args:
        scores: ``[n,S]``, stage after stage (the Explainer's mask; then the refined mask).
        losses: ``[n,S]`` in [0,1].
    """
    passes = scores > threshold
    first = passes & (passes.cumsum(dim=1) == 1)
    return (losses * first).sum(dim=1), passes.any(dim=1)


def calibrate(scores: Tensor, losses: Tensor, alpha: float = 0.1, kind: Kind = "marginal", delta: float = 0.1, **facts: Any) -> Selector:
    """The smallest threshold that keeps the risk at ``alpha`` (guarantees: see the module).

    Args:
        scores: ``[n]``, or ``[n,S]`` for a pipeline with a fallback.
        losses: the same shape, in [0,1]; in {0,1} for ``selective``.
        alpha: bound on the risk, in (0,1).
        kind: ``marginal`` or ``selective``.
        delta: probability with which ``selective`` may fail.
        facts: stored in the selector (fallback, fill, refinement, classes, fingerprints).

    Raises:
        ConfigError: too few images for any threshold to be safe.
    """
    scores, losses = (t.detach().double().cpu().reshape(len(t), -1) for t in (scores, losses))
    if scores.shape != losses.shape or len(scores) == 0:
        raise ShapeError(f"scores and losses must have one shape [n] or [n,S], received {tuple(scores.shape)} and {tuple(losses.shape)}.")
    if not 0 < alpha < 1 or not 0 < delta < 1:
        raise ConfigError(f"alpha and delta must lie in (0,1), received {alpha} and {delta}.")
    if not bool(((losses >= 0) & (losses <= 1)).all()):
        raise ConfigError("losses must lie in [0,1].")
    if kind == "marginal":
        return Selector(_conformal(scores, losses, alpha), alpha, kind, None, len(scores), **facts)
    if kind == "selective":
        return Selector(_binomial(scores, losses, alpha, delta), alpha, kind, delta, len(scores), **facts)
    raise ConfigError(f"kind must be marginal or selective, received {kind!r}.")


def _conformal(scores: Tensor, losses: Tensor, alpha: float) -> float:
    """The smallest lambda with (sum_i L_i(lambda) + 1) / (n + 1) <= alpha.

    L_i must not rise with lambda. With a fallback it may (a stricter threshold can replace a good mask by a bad refined one), so each L_i
    is replaced by its largest value at this or any stricter threshold, which is monotone and no smaller.
    """
    n = len(scores)
    if 1 / (n + 1) > alpha:
        raise ConfigError(f"{n} calibration images are too few for alpha={alpha}: {math.ceil(1 / alpha) - 1} are the least. Take more.")
    best = float(scores.max())
    worst = torch.zeros(n, dtype=scores.dtype)
    # From strict to loose; between two scores nothing changes.
    for threshold in [*scores.unique().flip(0).tolist(), _ACCEPT_ALL]:
        worst = torch.maximum(worst, accepted_loss(scores, losses, threshold)[0])
        if (float(worst.sum()) + 1) / (n + 1) > alpha:
            break
        best = threshold
    return best


def _binomial(scores: Tensor, losses: Tensor, alpha: float, delta: float) -> float:
    """The smallest of fixed thresholds whose risk is shown to be at most alpha, each at level delta / number of thresholds."""
    if not bool(((losses == 0) | (losses == 1)).all()):
        raise ConfigError("kind 'selective' needs losses of 0 (good) or 1 (bad); use 'marginal' for graded ones.")
    safe = []
    for step in range(_GRID):
        threshold = -1.0 + 2.0 * step / _GRID
        loss, accepted = accepted_loss(scores, losses, threshold)
        if binomial_tail(int(accepted.sum()), int(loss.sum()), alpha) <= delta / _GRID:
            safe.append(threshold)
    if not safe:
        raise ConfigError(
            f"no threshold has a risk of at most alpha={alpha} with confidence {1 - delta:g} on {len(scores)} images: take more images, a "
            "larger alpha, or kind 'marginal'."
        )
    return min(safe)


def binomial_tail(n: int, k: int, p: float) -> float:
    """P(Bin(n, p) <= k): how likely so few bad ones among n are if the risk were p."""
    logs = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p) for i in range(k + 1)
    ]
    return min(1.0, math.fsum(math.exp(v) for v in logs))


def truth_loss(masks: Tensor, truth: Tensor, least_iou: float | None = 0.5) -> Tensor:
    """Loss ``[N]`` of masks ``[N,H,W]`` against ground truth ``[N,H,W]``: 1 - soft IoU (least_iou None), or 1 where that IoU is too small.

    An empty mask of an empty truth has IoU 1.
    """
    low, high = torch.minimum(masks, truth).flatten(1).sum(dim=1), torch.maximum(masks, truth).flatten(1).sum(dim=1)
    iou = torch.where(high > 0, low / high.clamp_min(torch.finfo(masks.dtype).tiny), 1.0)
    return 1 - iou if least_iou is None else (iou < least_iou).to(masks.dtype)


@dataclass(frozen=True)
class Selected:
    """Explanations with their fate.

    Attributes:
        masks: ``[B,H,W]``; those that are not accepted are returned too, to look at.
        scores: ``[B]`` of these masks.
        accepted: ``[B]`` bool.
        refined: ``[B]`` bool, the mask was refined because the Explainer's was not accepted.
    """

    masks: Tensor
    scores: Tensor
    accepted: Tensor
    refined: Tensor


def explain_selectively(
    net: Any, explanandum: Any, images: Tensor, classes: Tensor | int | list[int], selector: Selector, *, start: Tensor | None = None
) -> Selected:
    """Masks of one class per image, each accepted, refined and then accepted, or withheld.

    Args:
        net, explanandum, images, classes, start: the pipeline and what it explains; see :func:`explainer.inference.refinement.refine`.
        selector: its ``fallback`` and ``refinement`` say what happens to masks that are not accepted.
    """
    index = check_class_index(classes, images, explanandum.num_classes)
    masks = starting_masks(net, images, index) if start is None else start.to(images)
    scores = quality(explanandum, images, masks, index, fill=selector.fill).score
    refined = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    weak = ~selector.accepts(scores)
    if selector.fallback == "refine" and bool(weak.any()):
        options = {"fill": selector.fill, **(selector.refinement or {})}
        better = refine(net, explanandum, images[weak], index[weak], start=masks[weak], **options)
        masks, scores = masks.clone(), scores.clone()
        masks[weak], scores[weak], refined[weak] = better.masks, better.after.score.to(scores), True
    return Selected(masks, scores, selector.accepts(scores), refined)


def calibration_pairs(
    net: Any,
    explanandum: Any,
    batches: Iterable[Batch],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = truth_loss,
    fallback: Fallback = "abstain",
    fill: FillKind = "mean",
    refinement: dict[str, Any] | None = None,
    generator: torch.Generator | None = None,
    classes: Classes = "predicted",
    predicted_from: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Scores and losses ``[n,S]`` for :func:`calibrate`: one class per image, drawn at random, so that the pairs are exchangeable.

    Args:
        net, explanandum: the Explainer and the classifier of the pipeline.
        batches: labelled images with ground-truth masks.
        loss: (masks ``[N,H,W]``, truth ``[N,H,W]``) -> ``[N]`` in [0,1].
        fallback, fill, refinement: settings of the pipeline; with ``refine`` every mask is refined too (S = 2).
        generator: CPU generator of the classes drawn; None: seed 0.
        classes: among which; a predicted class that the image does not have is a loss of 1. Images without any are left out.
        predicted_from: probability from which a class is predicted (multi-label; single-label: the most probable).
    """
    if classes not in get_args(Classes):
        raise ConfigError(f"classes must be predicted or labels, received {classes!r}.")
    generator = generator or torch.Generator().manual_seed(0)
    scores, losses = [], []
    for batch in batches:
        if batch.masks is None:
            raise ConfigError(
                "calibration needs ground-truth masks: use a data set that has them, or give scores and losses to calibrate()."
            )
        candidates = labels = batch.targets > 0.5
        if classes == "predicted":
            with torch.no_grad():
                logits = explanandum(batch.images)
            candidates = predicted_classes(logits, explanandum.task, predicted_from, at_least_one=False)
        usable = candidates.any(dim=1).nonzero()[:, 0]
        if len(usable) == 0:
            continue
        images = batch.images[usable]
        index = torch.multinomial(candidates[usable].cpu().float(), 1, generator=generator)[:, 0].to(images.device)
        truth, absent = batch.masks[usable, index], ~labels[usable, index]

        def judged(masks: Tensor, truth: Tensor = truth, absent: Tensor = absent) -> Tensor:
            return torch.where(absent, 1.0, loss(masks, truth))

        masks = starting_masks(net, images, index)
        stages = [(quality(explanandum, images, masks, index, fill=fill).score, judged(masks))]
        if fallback == "refine":
            better = refine(net, explanandum, images, index, start=masks, **{"fill": fill, **(refinement or {})})
            stages.append((better.after.score, judged(better.masks)))
        scores.append(torch.stack([s.cpu() for s, _ in stages], dim=1))
        losses.append(torch.stack([v.cpu() for _, v in stages], dim=1))
    if not scores:
        raise ConfigError(f"no calibration image has a {'label' if classes == 'labels' else 'predicted class'}.")
    return torch.cat(scores), torch.cat(losses)
