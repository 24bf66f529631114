"""What is known of a metric before it runs: its name, direction, bounds and optimum, declared once above its function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

from torch import Tensor

from explainer import plugins
from explainer.errors import ConfigError

PACKAGE = "explainer.metrics"
Function = Callable[..., Tensor]
F = TypeVar("F", bound=Function)
#: The arguments that a batch can give. A runner hands any metric those that it names; all other arguments are options with a default.
INPUTS: dict[str, str] = {
    "mask": "[B,H,W] in [0,1]",
    "saliency": "[B,H,W] raw map",
    "least_saliency": "[B,H,W] raw map of the least likely class",
    "other_saliency": "[B,H,W] raw map to compare with",
    "class_masks": "[B,K,H,W] in [0,1]",
    "class_saliency": "[B,K,H,W] raw maps",
    "area_masks": "[B,A,H,W] in [0,1], one mask per area",
    "truth": "[B,H,W] in [0,1]",
    "void": "[B,H,W] bool, pixels that do not count",
    "class_truth": "[B,K,H,W] in [0,1]",
    "images": "[B,3,H,W] in [0,1]",
    "class_index": "[B] the explained class",
    "targets": "[B,K] multi-hot",
    "logits": "[B,K] of the whole images",
    "explanandum": "the classifier, see explainer.metrics.classifier.Classifier",
    "attributor": "attributor(images, class_index) -> [B,H,W]",
}


@dataclass(frozen=True)
class Facts:
    """The facts of a metric; as a decorator, it declares them and leaves the function what it is.

    Args:
        name: how configurations and tables call the metric.
        higher_is_better: direction, or None when neither is better.
        bounds: smallest and largest possible value.
        optimum: the value of a perfect explanation, or None.
        columns: where the values are ``[B,T]``: the T names, or the option that lists T of them. None: values are ``[B]``.
    """

    name: str
    _: KW_ONLY
    higher_is_better: bool | None
    bounds: tuple[float, float]
    optimum: float | None
    columns: tuple[str, ...] | str | None = None

    def __call__(self, function: F) -> F:
        """Declare these facts of ``function``. Raises ConfigError for an argument that is neither an input nor an option."""
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name not in INPUTS and parameter.default is parameter.empty:
                raise ConfigError(
                    f"metric {self.name!r}: argument {parameter.name!r} needs a default, or a name that a batch gives: {', '.join(INPUTS)}."
                )
        vars(function).update(name=self.name, facts=self)
        return function

    def labels(self, options: dict[str, Any]) -> tuple[str, ...] | None:
        """Names of the T columns under these options; None where the metric is one number."""
        if isinstance(self.columns, str):
            return tuple(f"{value:g}" if isinstance(value, float) else str(value) for value in options[self.columns])
        return self.columns


def find(metric: Function | str, facts: Facts | None = None) -> tuple[Function, Facts]:
    """A metric's function and facts.

    Args:
        metric: the function, or its name.
        facts: facts of a function that declares none.

    Raises:
        ConfigError: an unknown name, a metric that is a class, or a function without facts.
    """
    function = plugins.find(PACKAGE, metric) if isinstance(metric, str) else metric
    if inspect.isclass(function):
        raise ConfigError(f"metric {metric!r} has a state of its own: use {function.__module__}.{function.__qualname__}.")
    found = getattr(function, "facts", None) if facts is None else facts
    if not isinstance(found, Facts):
        raise ConfigError(
            f"{getattr(function, '__name__', function)} declares no facts: put @Facts(...) above it, or pass facts=Facts(...)."
        )
    return function, found


def inputs(function: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of a metric that a batch gives, in its order."""
    return tuple(name for name in inspect.signature(function).parameters if name in INPUTS)


def options(function: Callable[..., Any]) -> dict[str, Any]:
    """The options of a metric with their defaults."""
    return {
        name: p.default for name, p in inspect.signature(function).parameters.items() if name not in INPUTS and p.default is not p.empty
    }
