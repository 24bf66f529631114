"""Metrics as torchmetrics has them: a function's values per image in, their mean with its number of images out.

``PerImageMetric(soft_iou)``, ``PerImageMetric("iou", threshold=0.3)`` and ``PerClassMetric(pointing_game, num_classes=K)`` take any
function that declares its facts (:class:`explainer.metrics.facts.Facts`). Its values are ``[B]``, NaN where it is undefined.

In a ``MetricCollection`` each metric takes its own of the keywords. Give the collection a dictionary, because all metrics have one class.
"""

from __future__ import annotations

import abc
import difflib
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from explainer.errors import ConfigError, ShapeError
from explainer.metrics.facts import INPUTS, Facts, Function, find, inputs, options


class ImageMean(Metric):
    """Mean over images of values per image; NaN values are left out and counted.

    State (all summed over processes): ``total`` float64, ``used`` and ``excluded`` numbers of images.

    Args:
        shape: shape of one image's value; ``()`` for a number.
        key: what tells this metric from others, with its options.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """

    name: str
    bounds: tuple[float, float]
    optimum: float | None
    is_differentiable = False
    full_state_update = False
    total: Tensor
    used: Tensor
    excluded: Tensor

    def __init__(self, shape: tuple[int, ...] = (), *, key: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("used", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("excluded", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")
        # A MetricCollection updates only one of several metrics whose states have equal names, and equal values after the first batch:
        # IoU at 0.3 and at 0.5 agree on a batch of binary masks. A state with a name of its own keeps them apart.
        self.add_state(f"is {key or self.name}", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Arguments of ``values`` and ``update``, in their order."""
        return inputs(self.values)

    @abc.abstractmethod
    def values(self, *args: Any, **kwargs: Any) -> Tensor:
        """The values per image ``[B]`` (or ``[B, *shape]``); changes no state."""

    def update(self, *args: Any, given: Tensor | None = None, **kwargs: Any) -> None:
        """Add a batch.

        Args:
            args: inputs in the order of :attr:`inputs`.
            given: what ``values`` would return, if it is known.
            kwargs: inputs by name; those of other metrics are ignored.
        """
        self._sum_up(self._of_batch(args, kwargs) if given is None else given)

    def add(self, values: Tensor) -> None:
        """Add values per image that were computed elsewhere; NaN counts as excluded."""
        self.update(given=values)

    def _of_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.values(*args, **self._own(kwargs))

    def _own(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keywords without those of other metrics; unknown ones stay, so that a typing error fails."""
        own = self.inputs
        return {name: value for name, value in kwargs.items() if name in own or name not in INPUTS}

    def _sum_up(self, values: Tensor) -> None:
        if values.shape[1:] != self.total.shape:
            expected = ",".join(["B", *map(str, self.total.shape)])
            raise ShapeError(f"{self.name} averages values of shape ({expected}), received {tuple(values.shape)}.")
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


class _FunctionMean(ImageMean):
    """What the metrics of a function share.

    Args:
        function: a metric's function, or its name.
        facts: facts of a function that declares none.
        settings: options of the function; others are arguments of :class:`torchmetrics.Metric`.
        num_classes: number of classes K for a state per class, or None.
    """

    def __init__(self, function: Function | str, facts: Facts | None, settings: dict[str, Any], num_classes: int | None = None) -> None:
        function, facts = find(function, facts)
        defaults = options(function)
        chosen = {name: value for name, value in settings.items() if name in defaults}
        others = {name: value for name, value in settings.items() if name not in defaults}
        labels = facts.labels({**defaults, **chosen})
        if labels is not None and num_classes is not None:
            raise ConfigError(f"{facts.name} has {len(labels)} values per image; a mean over classes needs one.")
        shape = () if labels is None else (len(labels),)
        key = ", ".join([facts.name, *(f"{name}={value}" for name, value in sorted(chosen.items()))])
        try:
            super().__init__(shape if num_classes is None else (num_classes,), key=key, **others)
        except ValueError as error:
            close = difflib.get_close_matches(next(iter(others)), defaults, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = f"Options of {facts.name}: {', '.join(defaults) or 'none'}; others are torchmetrics.Metric's."
            raise ConfigError(f"{error}.{hint} {known}") from error
        self.function, self.facts, self.options, self.labels = function, facts, chosen, labels
        self.name, self.bounds, self.optimum = facts.name, facts.bounds, facts.optimum

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """As the function's facts say."""
        return self.facts.higher_is_better

    @property
    def inputs(self) -> tuple[str, ...]:
        """Arguments that a batch gives to the function, in its order."""
        return inputs(self.function)

    def values(self, *args: Any, **kwargs: Any) -> Tensor:
        """The function's values under the options."""
        return self.function(*args, **kwargs, **self.options)


class PerImageMetric(_FunctionMean):
    """Mean over images of a function's values.

    Args:
        function: a metric's function, or its name.
        facts: facts of a function that declares none.
        settings: options of the function; others are arguments of :class:`torchmetrics.Metric`.

    Attributes:
        labels: names of the columns where the function has several values per image, else None.

    Raises:
        ConfigError: an unknown name or option, or a function without facts.
    """

    def __init__(self, function: Function | str, facts: Facts | None = None, **settings: Any) -> None:
        super().__init__(function, facts, settings)


class PerClassMetric(_FunctionMean):
    """Mean over classes of the mean over each class's images.

    Args:
        function: a metric's function with one value per image, or its name.
        num_classes: number of classes K.
        facts: facts of a function that declares none.
        average: ``classes`` (each class counts the same) or ``images`` (each image counts the same).
        absent: a class without any image is left out of the mean (``skip``) or counts as 0 (``zero``, as TorchRay does).
        settings: options of the function; others are arguments of :class:`torchmetrics.Metric`.

    State: ``total``, ``used``, ``excluded`` of shape ``[K]``.
    """

    def __init__(
        self,
        function: Function | str,
        num_classes: int,
        facts: Facts | None = None,
        *,
        average: Literal["classes", "images"] = "classes",
        absent: Literal["skip", "zero"] = "skip",
        **settings: Any,
    ) -> None:
        super().__init__(function, facts, settings, num_classes)
        if average not in ("classes", "images") or absent not in ("skip", "zero"):
            raise ConfigError(f"average must be 'classes' or 'images' and absent 'skip' or 'zero', received {average!r} and {absent!r}.")
        self.average, self.absent = average, absent

    def update(self, *args: Any, class_index: Tensor | None = None, given: Tensor | None = None, **kwargs: Any) -> None:
        """Add a batch.

        Args:
            args: inputs in the order of :attr:`inputs`.
            class_index: the class ``[B]`` that each image counts for; the function has it too if it asks for it.
            given: values ``[B]`` of these classes, if they are known; without ``class_index`` a column for each class, ``[B,K]``.
            kwargs: inputs by name; those of other metrics are ignored.
        """
        if class_index is None:
            if given is None:
                raise ConfigError(f"the mean of {self.name} over classes needs class_index=[B], the class of each image.")
            self._sum_up(given)
            return
        if given is None:
            own = {"class_index": class_index} if "class_index" in self.inputs[len(args) :] else {}
            given = self._of_batch(args, {**kwargs, **own})
        self._sum_up_by_class(given, class_index)

    def add_by_class(self, values: Tensor, class_index: Tensor) -> None:
        """Add values per image ``[B]`` of the classes ``[B]``."""
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
