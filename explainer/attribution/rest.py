"""A classifier at rest: in eval mode and frozen while it is explained, by one thread at a time, and afterwards as its user had it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Turn:
    """A lock that one thread can take several times. Copies and pickles of its owner get a new one.

    Attributes:
        resting: whoever holds the lock has already put the owner to rest.
    """

    def __init__(self) -> None:
        self.lock, self.resting = threading.RLock(), False

    def __deepcopy__(self, memo: Any) -> Turn:
        return Turn()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in eval mode and no parameter asks for gradients; what was otherwise before is so again afterwards.

    Models with a ``turn`` (:class:`Turn`, as every Explanandum has) are entered by one thread at a time, the others wait: hooks, modes and
    flags are the model's own. Entered again by the same thread, it costs nothing. Under ``torch.compile`` and ``torch.export``, which run
    no Python afterwards, it does nothing.
    """
    if torch.compiler.is_compiling():
        yield
        return
    turn: Turn = getattr(model, "turn", None) or Turn()
    with turn.lock:
        if turn.resting:
            yield
            return
        awake = [m for m in model.modules() if m.training]
        # Tensors that torch.func.functional_call has put in the parameters' place are someone's own variables.
        learning = [p for p in model.parameters() if p.requires_grad and isinstance(p, nn.Parameter)]
        turn.resting = True
        try:
            for module in awake:
                module.training = False
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            turn.resting = False
            for module in awake:
                module.training = True
            for parameter in learning:
                parameter.requires_grad_(True)
