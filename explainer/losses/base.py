"""What a loss term sees, and the adapter from a pure function to a weighted, scheduled, logged term."""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from explainer import plugins
from explainer.errors import ConfigError, NumericalError

Weight = float | Sequence[Sequence[float]]


@dataclass
class Explanation:
    """One training step's quantities, all float32.

    Attributes:
        images: ``[B,3,H,W]`` in [0,1].
        targets: ``[B,K]`` the images' labels.
        class_masks: ``[B,K,H,W]`` in [0,1]; with ``classes`` ``[B,n,H,W]``.
        target_mask, non_target_mask: ``[B,H,W]``, maxima over present and absent classes.
        logits_masked: ``[B,K]`` classifier on the image with only the shown classes' masks kept.
        logits_inverse: ``[B,K]`` classifier on the image with the shown classes' masks removed.
        shown: ``[B,K]`` the classes whose masks were shown: ``targets``, or a random part of them (``subset`` option).
        task: the Explanandum's task, ``multilabel`` or ``multiclass``.
        explanandum: the frozen classifier, for terms that query it themselves.
        generators: one CPU generator for each image, so that its draws do not depend on the others of its batch.
        progress: share of the training done, in [0,1].
        ids: identifiers of the images.
        teacher: like ``class_masks``, other methods' maps in [0,1], NaN where there is none; None while no term asks for them.
        order: the same of the teachers that teach an order of pixels.
        classes: ``[B,n]`` which classes the masks belong to, where only a sample of many classes is computed; None: all K in order.
        order_logits: like ``class_masks``: logits in the order that the trained network gives pixels, whose gradient reaches that order and
            not where masks end. None where the network does not tell the two apart.
        no_region: ``[K]`` bool, classes that no pixel belongs to (no defect, background). ``targets`` never has them, so that they have no
            mask, and an image of them alone only asks all masks to be empty. None: there are none.
    """

    images: Tensor
    targets: Tensor
    class_masks: Tensor
    target_mask: Tensor
    non_target_mask: Tensor
    logits_masked: Tensor
    logits_inverse: Tensor
    shown: Tensor
    task: Literal["multilabel", "multiclass"]
    explanandum: Any
    generators: Sequence[torch.Generator]
    progress: float = 0.0
    ids: tuple[str, ...] = ()
    teacher: Tensor | None = None
    order: Tensor | None = None
    classes: Tensor | None = None
    no_region: Tensor | None = None
    order_logits: Tensor | None = None

    def ranked(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Logits ``[P,H,W]`` of some masks, for terms that order pixels; finite where a mask is 0 or 1.

        Args:
            rows, columns: ``[P]`` each, where the masks are in ``class_masks``.
        """
        if self.order_logits is not None:
            return self.order_logits[rows, columns]
        masks = self.class_masks[rows, columns]
        tiny = torch.finfo(masks.dtype)
        return torch.logit(masks.clamp(tiny.tiny, 1 - tiny.eps / 2))

    def with_region(self, values: Tensor) -> Tensor:
        """The columns of ``[B,K]`` whose class has a region."""
        return values if self.no_region is None else values[:, ~self.no_region]

    @property
    def present(self) -> Tensor:
        """The columns of ``targets`` that belong to ``class_masks``: ``[B,K]``, or ``[B,n]`` with ``classes``."""
        return self.targets if self.classes is None else self.targets.gather(1, self.classes)

    def present_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Each present class of each image: the image, its column in ``class_masks``, and its class; ``[P]`` each."""
        image, column = (self.present > 0.5).nonzero(as_tuple=True)
        return image, column, column if self.classes is None else self.classes[image, column]


class LossTerm(abc.ABC):
    """A weighted term of the training loss.

    Args:
        weight: a number, or a piecewise linear schedule ``[[progress, weight], ...]`` over training progress in [0,1].

    Class attributes:
        needs_passes: the term reads ``logits_masked`` or ``logits_inverse``, through which its gradient reaches the masks; if no term
            does, the classifier is not run on them.
        needs_teacher: the term reads ``teacher``; if no term does, the teachers are not asked.
        needs_order: the term reads ``order``; if no term does, the teachers of an order are not asked.
        ranks: the term orders pixels by :meth:`Explanation.ranked`, in steps too small for float16.
        needs_classifier: the term asks ``explanandum`` itself.
    """

    name: ClassVar[str]
    needs_passes: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    needs_order: ClassVar[bool] = False
    ranks: ClassVar[bool] = False
    needs_classifier: ClassVar[bool] = False

    def __init__(self, weight: Weight = 1.0) -> None:
        self.schedule = _schedule(weight, type(self).name)

    def weight_at(self, progress: float) -> float:
        """Linear interpolation of the schedule; constant before its first and after its last point."""
        points = self.schedule
        if progress <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if progress <= x1:
                return y0 + (y1 - y0) * (progress - x0) / (x1 - x0)
        return points[-1][1]

    @abc.abstractmethod
    def value(self, e: Explanation) -> Tensor:
        """The unweighted term, a scalar."""


def _schedule(weight: Weight, name: str) -> list[tuple[float, float]]:
    try:
        points = [(0.0, float(weight))] if isinstance(weight, int | float) else [(float(x), float(y)) for x, y in weight]
    except (TypeError, ValueError):
        points = []
    rising = all(a[0] < b[0] for a, b in itertools.pairwise(points))
    if not points or not rising or not all(0 <= value < math.inf for _, value in points):  # NaN is in no range
        raise ConfigError(
            f"losses.{name}.weight must be a finite number of at least 0, or [[progress, weight], ...] with such weights and rising "
            f"progress, received {weight!r}."
        )
    return points


def build_terms(losses: dict[str, dict[str, Any]]) -> dict[str, LossTerm]:
    """Terms by name from ``{name: {weight: ..., options...}}``."""
    if not losses:
        raise ConfigError("losses is empty: name at least one term, for example losses: {classification: {weight: 1}}.")
    return {name: plugins.build("explainer.losses", name, **(options or {})) for name, options in losses.items()}


def total_loss(terms: dict[str, LossTerm], e: Explanation) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum and the unweighted values.

    Raises:
        NumericalError: a term is NaN or infinite; names the term and the images.
    """
    values: dict[str, Tensor] = {}
    total = e.class_masks.new_zeros(())
    for name, term in terms.items():
        weight = term.weight_at(e.progress)
        if weight == 0:
            continue
        values[name] = term.value(e)
        total = total + weight * values[name]
    # One synchronisation for the whole step; which term it was is asked only after the sum is known to be broken.
    if not torch.isfinite(total):
        broken = [name for name, value in values.items() if not torch.isfinite(value)]
        raise NumericalError(
            f"the loss is {float(total.detach())}: term(s) {', '.join(broken) or 'sum'} are not finite. "
            f"Images of the batch: {', '.join(e.ids)}. Lower the learning rate, use precision 32, or inspect these images."
        )
    return total, values
