"""Verdicts in words: on the masks that ``explain`` wrote (do they keep and remove their class, do they show anything) and on selectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from explainer.fills import FillKind
from explainer.inference.formats import Array
from explainer.inference.refinement import Quality, quality
from explainer.inference.selection import accepted_loss

CHECKED = 32
"""Pictures on which the classifier is asked, the first ones: four passes each."""
_LEAST = 4  # pictures below which nothing is said: two masks may be alike by chance
_POOLED = 16  # side of the small masks that are compared with each other
ALIKE = 0.9
GREY = 0.5


class Judge:
    """Collects the first chosen mask of each picture.

    Args:
        explanandum: the classifier; without one, or with one that gives scores only (each may have its price), it is not asked.
        class_names: names of the model's classes.
        fill: what replaces removed pixels; the training's.
        batch_size: most pictures in one pass of the classifier: the explaining's own, so that judging takes no more memory than that.
    """

    def __init__(self, explanandum: Any, class_names: Sequence[str], fill: FillKind = "mean", batch_size: int = 16) -> None:
        self.explanandum: Any = explanandum if explanandum is not None and explanandum.differentiable else None
        self.class_names, self.fill, self.batch_size = list(class_names), fill, batch_size
        self.small: list[NDArray[np.float64]] = []
        self.areas: list[float] = []
        self.grey: list[float] = []
        self.kept: list[tuple[Array, Array, int]] = []

    def add(self, image: Array, masks: Array, chosen: Sequence[int], names: Sequence[str]) -> None:
        """One picture ``[3,H,W]`` with masks ``[n,H,W]`` of the classes ``names``; nothing is kept where no class is chosen."""
        if not chosen:
            return
        mask = np.asarray(masks[chosen[0]], dtype=np.float32)
        pooled = F.adaptive_avg_pool2d(torch.from_numpy(mask)[None], _POOLED)[0]
        self.small.append(pooled.numpy().astype(np.float64).ravel())
        self.areas.append(float(mask.mean()))
        self.grey.append(float(((mask > 0.1) & (mask < 0.9)).mean()))
        if self.explanandum is not None and len(self.kept) < CHECKED:
            self.kept.append((np.asarray(image, dtype=np.float32), mask, self.class_names.index(names[chosen[0]])))

    def sentences(self) -> list[str]:
        """What is to be said; warnings begin with WARNING. Empty for fewer than four pictures."""
        if len(self.areas) < _LEAST:
            return []
        return self._asked() + self._signs()

    def _signs(self) -> list[str]:
        n, found = len(self.areas), []
        similar, area, grey = _alike(self.small), float(np.mean(self.areas)), float(np.mean(self.grey))
        if similar > ALIKE:
            found.append(
                f"WARNING: the masks of different pictures are alike (correlation {similar:.2f}): they follow the position, not the "
                "picture."
            )
        if area < 0.002 or area > 0.95:
            kind = "empty" if area < 0.002 else "full"
            found.append(f"WARNING: the masks are {kind}: they cover {100 * area:.1f} % of a picture on average ({n} pictures).")
        elif grey > GREY:
            found.append(
                f"WARNING: the masks are grey: {100 * grey:.0f} % of their values lie between 0.1 and 0.9. They tell no pixel from another."
            )
        return found

    @torch.no_grad()
    def _asked(self) -> list[str]:
        """What the classifier answers behind the masks, and behind those of another picture, which is the fair comparison: equal areas."""
        n = len(self.kept)
        if n < _LEAST:
            return []
        e = self.explanandum
        images = torch.from_numpy(np.stack([image for image, _, _ in self.kept])).to(e.mean)
        masks = torch.from_numpy(np.stack([mask for _, mask, _ in self.kept])).to(e.mean)
        classes = torch.tensor([k for *_, k in self.kept], device=images.device)
        whole = torch.cat([e.probabilities(e(part)) for part in images.split(self.batch_size)]).gather(1, classes[:, None]).mean()
        own, other = (quality(e, images, m, classes, fill=self.fill, batch_size=self.batch_size) for m in (masks, masks.roll(1, 0)))
        said = [
            f"The classifier on {n} pictures, mean probability of the class shown: whole picture {float(whole):.2f}; only what the mask "
            f"shows {_mean(own.kept)} (another picture's mask: {_mean(other.kept)}); without it {_mean(own.left)} (another's: "
            f"{_mean(other.left)})."
        ]
        if _gain(own, other) <= 0:
            said.append(
                "WARNING: the masks keep and remove their class no better than masks of other pictures do. They do not show where its "
                "evidence is. The guide's page Train says what to try (When masks show nothing)."
            )
        return said


def _mean(values: torch.Tensor) -> str:
    return f"{float(values.mean()):.2f}"


def _gain(own: Quality, other: Quality) -> float:
    """By how much own masks keep more and leave less than the others', in probability."""
    return float((own.kept - own.left - other.kept + other.left).mean())


def _alike(masks: Sequence[NDArray[np.float64]]) -> float:
    """Mean correlation of neighbouring masks that are not flat; 0 where fewer than two are left."""
    centred = [m - m.mean() for m in masks]
    unit = [m / np.linalg.norm(m) for m in centred if np.linalg.norm(m) > 1e-3]
    return float(np.mean([a @ b for a, b in zip(unit[1:], unit[:-1], strict=True)])) if len(unit) > 1 else 0.0


def selector_verdict(scores: torch.Tensor, losses: torch.Tensor, threshold: float) -> list[str]:
    """What a threshold lets through, in words: a bound on the risk holds as well where only wrong masks, but few of them, are accepted.

    Args:
        scores, losses: ``[n,S]``, see :func:`~explainer.inference.selection.accepted_loss`.
        threshold: that was chosen.
    """
    loss, accepted = accepted_loss(scores, losses, threshold)
    n, every = int(accepted.sum()), float(losses[:, 0].mean())
    if n == 0:
        return [
            f"WARNING: nothing is accepted: of {len(scores)} masks none has a score above the threshold. Look at the masks first "
            "(explainer evaluate), or take a larger alpha."
        ]
    bad = float(loss.sum()) / n
    if bad > 0.999:
        return [f"WARNING: only wrong masks are accepted, {n} of {n}. The bound holds because they are few. Do not use this selector."]
    found = []
    if bad > 0.5:
        found.append(f"WARNING: most of what is accepted is wrong: mean loss {bad:.2f} over {n} masks. Take a smaller alpha.")
    if n < len(scores) and bad >= every > 0:
        found.append(
            f"WARNING: what is accepted is no better than what is not: mean loss {bad:.2f}, {every:.2f} of all masks. The score does not "
            "tell good masks from bad ones here; another fill may (--fill)."
        )
    return found or [f"{n} of {len(scores)} masks are accepted, mean loss {bad:.2f} ({every:.2f} of all masks)."]
