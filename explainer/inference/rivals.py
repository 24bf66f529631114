"""Whether masks keep and remove their class better than what knows less: a constant, another picture's mask, another method, no training.

The comparison is fair by construction: every rival has the masks' own values, and only puts them elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explainer.fills import FillKind
from explainer.inference.refinement import quality

CONSTANT, OTHERS = "a constant", "the masks of other pictures"
#: Of an Explainer that knows nothing before it is trained, and of one whose masks begin as class activations.
UNTRAINED, START = "the untrained network", "the masks that training began with"
LEAST = 8
"""Pictures below which nothing is compared."""


def placed(masks: Tensor, order: Tensor) -> Tensor:
    """The masks' own values, in the order in which other maps rank the pixels: equal area and greys, another place.

    Args:
        masks: ``[N,H,W]``.
        order: ``[N,H,W]``, any values.
    """
    values = masks.flatten(1).sort(dim=1).values
    ranks = order.flatten(1).argsort(dim=1, stable=True)
    return torch.empty_like(values).scatter(1, ranks, values).view_as(masks)


@dataclass(frozen=True)
class Comparison:
    """What the classifier answers behind the masks and their rivals.

    Attributes:
        images: N.
        whole: mean probability of the class, whole picture.
        kept, left: the same of what the masks show and of what they leave.
        scores: kept minus left, by name, the masks' own first (``own``).
        better, equal, worse: rivals by how the masks compare with them; the 95 % interval of the mean difference decides.
    """

    images: int
    whole: float
    kept: float
    left: float
    scores: dict[str, float]
    better: tuple[str, ...]
    equal: tuple[str, ...]
    worse: tuple[str, ...]

    def sentences(self, advice: Sequence[str] = ()) -> list[str]:
        """In words; a warning where a rival that knows nothing of the picture is not beaten.

        Args:
            advice: what to try then.
        """
        parts = (("better than", self.better), ("not told apart from", self.equal), ("worse than", self.worse))
        told = "; ".join(f"{words} {', '.join(f'{n} ({self.scores[n]:.2f})' for n in names)}" for words, names in parts if names)
        found = [
            f"The classifier on {self.images} val pictures, mean probability of the class shown: whole picture {self.whole:.2f}, only what "
            f"the mask shows {self.kept:.2f}, without it {self.left:.2f}. The difference of the last two, {self.scores['own']:.2f}, is "
            f"{told} (the masks' own values, placed by each)."
        ]
        unbeaten = [name for name in (*self.equal, *self.worse) if name in (CONSTANT, OTHERS, UNTRAINED)]
        if unbeaten:
            next_steps = f" Not set yet: {'; '.join(advice)}." if advice else ""
            found.append(
                f"WARNING: the masks keep and remove their class no better than {', '.join(unbeaten)}. They do not show where its evidence "
                f"is. The guide's page Train says what to try (When masks show nothing).{next_steps}"
            )
        elif START in self.worse:
            found.append(
                f"WARNING: the masks keep and remove their class less well than {START}, which are the classifier's own activations. Train "
                "more gently: a lower optimizer.lr, fewer steps, other weights of the area losses."
            )
        return found


@torch.no_grad()
def compare(
    explanandum: Any, images: Tensor, masks: Tensor, classes: Tensor, rivals: Mapping[str, Tensor], *, fill: FillKind = "mean"
) -> Comparison:
    """Masks against a constant of their area, the masks of other pictures, and the given maps.

    Args:
        explanandum: the classifier.
        images: ``[N,3,H,W]``.
        masks: ``[N,H,W]`` in [0,1], of ``classes`` ``[N]``.
        rivals: maps ``[N,H,W]`` by name; only their order counts.
        fill: what replaces removed pixels.
    """
    shown = {
        "own": masks,
        CONSTANT: masks.mean(dim=(1, 2), keepdim=True).expand_as(masks),
        OTHERS: placed(masks, masks.roll(1, 0)),
        **{name: placed(masks, maps) for name, maps in rivals.items()},
    }
    found = {name: quality(explanandum, images, m, classes, fill=fill, batch_size=8) for name, m in shown.items()}
    scores = {name: q.score.double() for name, q in found.items()}
    sides: dict[str, list[str]] = {"better": [], "equal": [], "worse": []}
    for name in list(shown)[1:]:
        difference = scores["own"] - scores[name]
        middle, reach = float(difference.mean()), 1.96 * float(difference.std()) / math.sqrt(len(difference))
        sides["better" if middle > reach else "worse" if middle < -reach else "equal"].append(name)
    whole = torch.cat([explanandum.probabilities(explanandum(part)) for part in images.split(8)]).gather(1, classes[:, None])
    own = found["own"]
    return Comparison(
        images=len(images),
        whole=float(whole.mean()),
        kept=float(own.kept.mean()),
        left=float(own.left.mean()),
        scores={name: float(values.mean()) for name, values in scores.items()},
        better=tuple(sides["better"]),
        equal=tuple(sides["equal"]),
        worse=tuple(sides["worse"]),
    )


def pinned(areas: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[str]:
    """A warning where most masks have the smallest or the largest area that a bound allows: then the bound says how large they are.

    Args:
        areas: areas of the masks, as shares of the picture.
        low, high: bounds of each one's class.
    """
    found = []
    for bounds, word, other in ((high, "largest", "max_area"), (low, "smallest", "min_area")):
        at = [abs(area - bound) <= 0.1 * bound and bound > 0 for area, bound in zip(areas, bounds, strict=True)]
        if areas and sum(at) >= 0.8 * len(at):
            found.append(
                f"WARNING: {sum(at)} of {len(at)} masks have the {word} area that losses.area_bound allows (mean "
                f"{sum(areas) / len(areas):.3f}): the bound decides how large they are, not the evidence. Move {other}, or set it to auto."
            )
    return found


def weaker_than_majority(probabilities: Tensor, targets: Tensor, names: Sequence[str]) -> list[str]:
    """A warning where the classifier's first class is right no more often than one answer for all pictures would be.

    Args:
        probabilities: ``[N,K]``.
        targets: multi-hot ``[N,K]``; pictures without a label are left out.
        names: names of the classes.
    """
    labelled = targets.sum(dim=1) > 0
    probabilities, targets = probabilities[labelled], targets[labelled]
    if len(targets) == 0 or targets.shape[1] < 2:
        return []
    right = float(targets.gather(1, probabilities.argmax(dim=1, keepdim=True)).mean())
    share, best = targets.mean(dim=0).max(dim=0)
    if right > float(share):
        return []
    return [
        f"WARNING: the classifier's first class is right for {100 * right:.0f} % of {len(targets)} val pictures, always answering "
        f"{names[int(best)]} for {100 * float(share):.0f} %. A mask can only show what the classifier knows: train it first."
    ]
