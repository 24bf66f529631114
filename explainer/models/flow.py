"""Which layers of two networks compute the same: found by what flows through them, whatever they are called.

Both networks see one random image. A layer of the copy is paired with the layer of the original that has tensors of the same
shapes and receives the same input; its weights are copied before it computes, so that what it hands on is the original's again. What is
found this way is proved: every paired layer has the same input, hence the same output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from explainer.errors import ConfigError

_TOLERANCE = 1e-4
SIDE = 64


class _Seen:
    """A call of a module: its name, itself, and a fingerprint of its input that does not depend on the order of the axes."""

    def __init__(self, name: str, module: nn.Module, inputs: Tensor) -> None:
        self.name, self.module = name, module
        self.print = fingerprint(inputs)

    def same_input(self, other: Tensor) -> bool:
        """Whether the inputs agree, up to rounding."""
        scale = self.print.abs().clamp_min(float(self.print[2]))  # rounding is relative to the values' size, also where one is near 0
        return bool(self.print[0] == other[0]) and bool(((self.print - other).abs() <= _TOLERANCE * scale).all())


def fingerprint(values: Tensor) -> Tensor:
    """Number of values, mean magnitude, root of the mean square, mean fourth power's root, least and greatest."""
    flat = values.detach().flatten().double()
    size = flat.new_tensor(float(flat.numel()))
    return torch.stack([size, flat.abs().mean(), flat.square().mean().sqrt(), flat.pow(4).mean().pow(0.25), flat.min(), flat.max()])


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors (not those of its parts), without counters."""
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: value for name, value in own.items() if value.is_floating_point()}


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of its tensors, without axes of length 1 beside others (a scale ``[C,1,1]`` is one ``[C]``)."""
    return [tuple(value.shape) if value.ndim == 4 else tuple(n for n in value.shape if n > 1) for value in _tensors(module).values()]


@contextmanager
def _watched(net: nn.Module, hook: Any) -> Iterator[None]:
    """``hook(name, module, input)`` before every call of a module that has tensors of its own."""
    handles = []
    for name, module in net.named_modules():
        if _tensors(module):
            handles.append(module.register_forward_pre_hook(lambda m, x, name=name: hook(name, m, x[0]) if x else None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calls(net: nn.Module, image: Tensor) -> list[_Seen]:
    """All calls of modules with tensors of their own, in order."""
    seen: list[_Seen] = []
    with torch.no_grad(), _watched(net, lambda name, m, x: seen.append(_Seen(name, m, x))):
        net(image)
    return seen


def probe() -> Tensor:
    """The random image ``[1,3,S,S]``, always the same."""
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def copy_by_flow(target: nn.Module, original: nn.Module, what: str) -> dict[str, str]:
    """Copy weights into ``target`` in place; returns ``{module of target: module of original}``.

    Where BatchNorm layers differ in ``eps``, the copied weight is scaled so that the layer computes the same in eval mode.

    Args:
        target: an encoder; what it hands on must be a part of what ``original`` computes.
        original: a classifier.
        what: name of the pair in messages.

    Raises:
        ConfigError: a layer has no counterpart, or several that cannot be told apart.
    """
    image = probe()
    source = calls(copy.deepcopy(original).float().eval(), image)
    trial = copy.deepcopy(target).float().eval()
    free = list(source)
    pairs: dict[str, str] = {}

    def fill(name: str, module: nn.Module, inputs: Tensor) -> None:
        if name in pairs:
            return
        shapes, mark = _shapes(module), fingerprint(inputs)
        alike = [s for s in free if _shapes(s.module) == shapes and _kind(s.module) == _kind(module)]
        found = [s for s in alike if s.same_input(mark)]
        if len(found) != 1:
            reason = (
                f"{len(found)} layers of the classifier have the same shapes and input ({', '.join(s.name for s in found[:3])})"
                if found
                else f"{len(alike)} layers of the classifier have these shapes, none receives the same values"
            )
            raise ConfigError(
                f"{what}: the encoder's layer {name} {[list(s) for s in shapes]} could not be paired: {reason}. They are not the same "
                "network. Choose the classifier's own architecture as encoder (encoder_name: auto), or set explainer.init_encoder to false."
            )
        _copy_layer(module, found[0].module)
        pairs[name] = found[0].name
        free.remove(found[0])

    with torch.no_grad(), _watched(trial, fill):
        trial(image)
    target.load_state_dict({k: v.to(target.state_dict()[k].dtype) for k, v in trial.state_dict().items()})
    return pairs


def _kind(module: nn.Module) -> object:
    """A layer's family: names of classes differ between libraries (LayerNorm2d, BatchNormAct2d), their families do not. Of a convolution
    also stride and groups, which tell a shortcut from the layer beside it.
    """
    if isinstance(module, nn.Conv2d):
        return nn.Conv2d, module.stride, module.groups
    for family in (nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm):
        if isinstance(module, family):
            return family
    return None


def _copy_layer(mine: nn.Module, theirs: nn.Module) -> None:
    for own, value in zip(_tensors(mine).values(), _tensors(theirs).values(), strict=True):
        own.copy_(value.reshape(own.shape))
    norm = nn.modules.batchnorm._BatchNorm
    if isinstance(mine, norm) and isinstance(theirs, norm) and mine.running_var is not None and mine.affine:
        mine.weight.mul_(((mine.running_var + mine.eps) / (mine.running_var + theirs.eps)).sqrt())


def first_difference(target: nn.Module, original: nn.Module) -> str | None:
    """The first layer that has a counterpart of its own name in ``original`` and another input than it, or None.

    Args:
        target: an encoder whose modules have the original's names, up to what :func:`plain_name` takes away.
        original: a classifier.
    """
    image = probe()
    marks = {plain_name(s.name): s for s in calls(copy.deepcopy(original).float().eval(), image)}
    for seen in calls(copy.deepcopy(target).float().eval(), image):
        other = marks.get(plain_name(seen.name))
        if other is not None and not other.same_input(seen.print):
            return seen.name
    return None


def plain_name(name: str) -> str:
    """A module's or tensor's name without timm's and smp's changes: the prefix ``model.``, and ``stages_0`` for ``stages.0``."""
    return name.removeprefix("model.").replace("_", ".").lstrip(".")
