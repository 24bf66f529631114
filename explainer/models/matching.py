"""Which tensor of a foreign file belongs to which tensor of a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from explainer.errors import CheckpointError

#: What training scripts put in front of the names of a network's tensors.
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "net.", "network.", "encoder.")
#: What they put the state_dict into, in the order in which it is looked for.
WRAPPERS = ("state_dict", "model_state_dict", "model", "ema", "model_ema", "state_dict_ema", "ema_state_dict", "net", "network")


def unwrapped(content: dict[Any, Any], path: str | Path) -> dict[str, Tensor]:
    """The tensors by name in what a training script saved: a state_dict, or a dictionary around one (:data:`WRAPPERS`).

    Raises:
        CheckpointError: there are none.
    """
    for _ in range(3):  # {"model": {"state_dict": ...}} exists
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(
            f"{path} holds no tensors under any of {', '.join(WRAPPERS)} nor at the top (its keys: {', '.join(map(str, content))[:200]}). "
            "Save model.state_dict() alone."
        )
    return state


def by_name(source: dict[str, Tensor], own: dict[str, Tensor], path: str | Path) -> dict[str, str]:
    """``{own name: name in the file}`` of all tensors with the same name, or the same up to prefixes, and the same shape.

    Raises:
        CheckpointError: two of the file's tensors have the name, up to prefixes, and the shape of one of the network's.
    """
    short: dict[str, list[str]] = {}
    for theirs in source:
        short.setdefault(without_prefixes(theirs), []).append(theirs)
    pairs = {}
    for mine, value in own.items():
        found = [mine] if mine in source else short.get(without_prefixes(mine), [])
        fitting = [theirs for theirs in found if source[theirs].shape == value.shape]
        if len(fitting) > 1:
            raise CheckpointError(
                f"{path} holds two tensors for {mine}: {fitting[0]} and {fitting[1]}. Keep one network's tensors in the file, "
                "without what stands before their names."
            )
        if fitting:
            pairs[mine] = fitting[0]
    return pairs


def without_prefixes(name: str) -> str:
    """A tensor's name without what stands before it."""
    while True:
        start = next((p for p in PREFIXES if name.startswith(p) and "." in name[len(p) :]), None)
        if start is None:
            return name
        name = name[len(start) :]


def by_order(source: dict[str, Tensor], own: dict[str, Tensor], body: set[str]) -> dict[str, str] | None:
    """Pairs one after another, or None unless all tensors of the body agree; a last module (head) of another shape is left out."""
    if len(source) != len(own):
        return None
    pairs = {}
    for (theirs, value), (mine, expected) in zip(source.items(), own.items(), strict=True):
        fits = value.shape == expected.shape and theirs.rpartition(".")[2] == mine.rpartition(".")[2]
        if not fits and mine in body:
            return None
        if fits:
            pairs[mine] = theirs
    return pairs
