"""What all metrics share: one value per image in, a mean with its number of images out.

A metric is a pure function ``f(...) -> [B]`` (NaN where it is undefined) and a class that averages it. The class's ``values`` takes
arguments from one vocabulary, so that a runner can hand any metric what it asks for:

- ``mask`` in [0,1], ``saliency`` (raw), ``least_saliency`` (of the least likely class), ``other_saliency`` (to compare with): ``[B,H,W]``;
- ``class_masks`` ``[B,K,H,W]``, ``area_masks`` ``[B,A,H,W]``, all in [0,1];
- ``truth`` in [0,1] and ``void`` bool: ``[B,H,W]``; ``class_truth`` ``[B,K,H,W]``;
- ``images`` ``[B,3,H,W]`` in [0,1], ``class_index`` ``[B]``, ``targets`` ``[B,K]`` multi-hot;
- ``explanandum``, and ``attributor(images, class_index) -> [B,H,W]``.
"""

from __future__ import annotations

import abc
import functools
import inspect
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from explainer.errors import ConfigError, ShapeError


class PerImageMetric(Metric):
    """Mean over images of a per-image value; NaN values are left out and counted.

    Class attributes:
        name: how configurations call it.
        higher_is_better: direction, or None when neither is better.
        bounds: smallest and largest possible value.
        optimum: the value of a perfect explanation, or None.

    State (all summed over processes): ``total`` float64, ``used`` and ``excluded`` numbers of images.
    """

    name: ClassVar[str]
    bounds: ClassVar[tuple[float, float]]
    optimum: ClassVar[float | None]
    is_differentiable = False
    full_state_update = False
    total: Tensor
    used: Tensor
    excluded: Tensor

    def __init__(self, columns: int | None = None, **kwargs: Any) -> None:
        """``columns``: T for metrics whose value per image is a curve ``[B,T]``; ``kwargs`` go to :class:`torchmetrics.Metric`."""
        super().__init__(**kwargs)
        shape = () if columns is None else (columns,)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("used", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("excluded", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give ``update`` the signature of ``values``: MetricCollection hands each metric the keywords that its ``update`` names."""
        super().__init_subclass__(**kwargs)
        inner = cls.update

        @functools.wraps(inner)
        def update(self: PerImageMetric, *args: Any, **kwargs: Any) -> None:
            inner(self, *args, **kwargs)

        update.__signature__ = cls._signature()  # type: ignore[attr-defined]
        cls.update = update  # type: ignore[method-assign]

    @classmethod
    def _signature(cls) -> inspect.Signature:
        return inspect.signature(cls.values)

    @abc.abstractmethod
    def values(self, *args: Any, **kwargs: Any) -> Tensor:
        """The per-image values ``[B]`` (or ``[B,T]``); changes no state."""

    def update(self, *args: Any, given: Tensor | None = None, **kwargs: Any) -> None:
        """Add a batch; the arguments are those of ``values``, or ``given`` holds what it would return."""
        self._sum_up(self.values(*args, **kwargs) if given is None else given)

    def add(self, values: Tensor) -> None:
        """Add per-image values that were computed elsewhere; NaN counts as excluded."""
        self.update(given=values)

    def _sum_up(self, values: Tensor) -> None:
        if values.shape[1:] != self.total.shape:
            raise ShapeError(f"{self.name} averages values of shape (B, *{tuple(self.total.shape)}), received {tuple(values.shape)}.")
        values = values.detach().to(self.total)
        undefined = values.isnan()
        self.total = self.total + values.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(0)
        self.used = self.used + (~undefined).sum(0)
        self.excluded = self.excluded + undefined.sum(0)

    def compute(self) -> Tensor:
        """Mean over the images used; NaN when there is none."""
        return self.total / self.used

    def _over_processes(self) -> AbstractContextManager[None]:
        """The states hold the sums of all processes inside this context, and this process's own after it."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, distributed_available=self.distributed_available_fn)

    def summary(self) -> dict[str, Tensor]:
        """``value``, ``used`` and ``excluded``, over all processes."""
        with self._over_processes():
            return {"value": type(self).compute(self), "used": self.used.clone(), "excluded": self.excluded.clone()}


class PerClassMetric(PerImageMetric):
    """Mean over classes of the mean over each class's images.

    Args:
        num_classes: K.
        average: ``classes`` (each class counts the same) or ``images`` (each image counts the same).
        absent: a class without any image is left out of the mean (``skip``) or counts as 0 (``zero``, as TorchRay does).

    State: ``total``, ``used``, ``excluded`` of shape ``[K]``.
    """

    def __init__(
        self, num_classes: int, average: Literal["classes", "images"] = "classes", absent: Literal["skip", "zero"] = "skip", **kwargs: Any
    ) -> None:
        super().__init__(columns=num_classes, **kwargs)
        if average not in ("classes", "images") or absent not in ("skip", "zero"):
            raise ConfigError(f"average must be 'classes' or 'images' and absent 'skip' or 'zero', received {average!r} and {absent!r}.")
        self.average, self.absent = average, absent

    def update(self, *args: Any, class_index: Tensor | None = None, given: Tensor | None = None, **kwargs: Any) -> None:
        """Add a batch: the arguments of ``values`` and the class ``[B]`` that each image counts for."""
        values = self.values(*args, **kwargs) if given is None else given
        if class_index is None:
            self._sum_up(values)
        else:
            self._sum_up_by_class(values, class_index)

    @classmethod
    def _signature(cls) -> inspect.Signature:
        own = inspect.signature(cls.values)
        index = inspect.Parameter("class_index", inspect.Parameter.KEYWORD_ONLY, annotation=Tensor)
        others = [p for p in own.parameters.values() if p.name != index.name]
        # A signature lists keywords last, and ``**kwargs`` after them.
        return own.replace(parameters=sorted([*others, index], key=lambda p: p.kind))

    def add_by_class(self, values: Tensor, class_index: Tensor) -> None:
        """Add per-image values ``[B]`` of the classes ``[B]``."""
        self.update(given=values, class_index=class_index)

    def _sum_up_by_class(self, values: Tensor, class_index: Tensor) -> None:
        columns = torch.full((len(values), len(self.total)), torch.nan, dtype=torch.float64, device=self.total.device)
        columns[torch.arange(len(values)), class_index.to(self.total.device)] = values.to(columns)
        before = self.excluded
        self._sum_up(columns)
        undefined = torch.bincount(class_index.to(self.total.device)[values.isnan().to(self.total.device)], minlength=len(self.total))
        self.excluded = before + undefined

    def compute(self) -> Tensor:
        """The mean as ``average`` and ``absent`` say; NaN when no image was used."""
        if self.average == "images":
            return self.total.sum() / self.used.sum()
        if self.absent == "zero":
            return (self.total / self.used.clamp(min=1)).mean() if bool(self.used.any()) else self.total.sum() * torch.nan
        return (self.total / self.used).nanmean()

    def per_class(self) -> Tensor:
        """Mean of each class ``[K]`` over all processes, NaN for a class without images."""
        with self._over_processes():
            return self.total / self.used
