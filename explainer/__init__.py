"""explainer: train one network that shows, for every class and in one forward pass, where a classifier finds its evidence."""

from __future__ import annotations

import importlib
from typing import Any

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
    "data",
    "evaluation",
    "export",
    "fills",
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
