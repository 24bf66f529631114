"""What whoever watches a classifier run needs: tensors that stay what they were, and modules that can be seen into."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from explainer.errors import UnsupportedLayerError


@contextlib.contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """In-place activations write to a fresh tensor inside, so that what a hook has seen stays what it was."""
    changed = [m for m in model.modules() if getattr(m, "inplace", False) and not isinstance(m, torch.jit.ScriptModule)]
    for module in changed:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in changed:
            module.inplace = True  # type: ignore[assignment]


def refuse_compiled(classifier: nn.Module, method: str) -> None:
    """Raise :class:`UnsupportedLayerError` for scripted or compiled parts, whose functions cannot be seen."""
    for path, module in classifier.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
            raise UnsupportedLayerError(
                f"{method} must see every activation, but {place_of(path, module)} is scripted or compiled: pass the original "
                "one, a plain nn.Module."
            )


def place_of(path: str, module: nn.Module) -> str:
    """How a message names a module."""
    return f"{type(module).__name__} at {path!r}" if path else type(module).__name__
