"""explainer: train one network that shows, for every class and in one forward pass, where a classifier finds its evidence."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which do not follow __getattr__
    from explainer.export.safetensors import from_pretrained, push_to_hub, save_pretrained
    from explainer.inference.loading import load
    from explainer.models.explanandum import Explanandum
    from explainer.tensors import Batch

__version__ = "0.1.0"
__all__ = ["Batch", "Explanandum", "__version__", "from_pretrained", "load", "push_to_hub", "save_pretrained"]

# Importing torch takes seconds; the command line's --help must not wait for it.
_LAZY = {
    "Batch": ("explainer.tensors", "Batch"),
    "Explanandum": ("explainer.models.explanandum", "Explanandum"),
    "load": ("explainer.inference.loading", "load"),
    "from_pretrained": ("explainer.export.safetensors", "from_pretrained"),
    "push_to_hub": ("explainer.export.safetensors", "push_to_hub"),
    "save_pretrained": ("explainer.export.safetensors", "save_pretrained"),
}
_SUBPACKAGES = (
    "attribution",
    "baselines",
    "concepts",
    "data",
    "evaluation",
    "export",
    "fills",
    "inference",
    "look",
    "losses",
    "metrics",
    "models",
    "report",
    "tasks",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"explainer.{name}")
    raise AttributeError(f"module 'explainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What completion offers: the public names and the rooms, not what this file imports for itself."""
    own = [name for name in globals() if name.startswith("__")]
    return sorted({*own, *_LAZY, *_SUBPACKAGES})
