"""A classifier that is given shifted numbers and takes the shift off again: the same function of the picture, written otherwise.

P. Kindermans et al., "The (Un)reliability of saliency methods", 2019 (input invariance).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer.errors import UnsupportedLayerError

#: Largest difference of the logits that rounding may leave, relative to the largest logit.
_TOLERANCE = 1e-4


class _Surround(nn.Module):
    """Pads with one value a channel (``nn.ConstantPad2d`` has one for all)."""

    def __init__(self, sides: Sequence[int], values: Tensor) -> None:
        super().__init__()
        self.sides = list(sides)
        self.register_buffer("values", values.view(1, -1, 1, 1))

    values: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """``[B,C,H,W]`` -> padded."""
        return F.pad(images - self.values, self.sides) + self.values


def first_convolution(explanandum: Any, images: Tensor) -> str:
    """Path, below the classifier, of the convolution that is given the normalised image.

    Raises:
        UnsupportedLayerError: there is none.
    """
    seen: list[tuple[str, Tensor]] = []
    convolutions = {name: m for name, m in explanandum.classifier.named_modules() if isinstance(m, nn.Conv2d)}
    handles = [
        m.register_forward_pre_hook(lambda _m, given, name=name: seen.append((name, given[0].detach()))) for name, m in convolutions.items()
    ]
    try:
        with torch.no_grad():
            explanandum(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    side = explanandum.input_size
    shown = images[:1] if side is None else F.interpolate(images[:1], (side, side), mode="bilinear", align_corners=False)
    given = explanandum.normalize(shown)
    for name, value in seen:
        if value.shape == given.shape and torch.allclose(value, given):
            return name
    raise UnsupportedLayerError("constant_shift: no convolution is given the normalised image, so that no bias could take a shift off.")


def shifted(attributor: Any, images: Tensor, shift: Tensor) -> Any:
    """A copy of a method whose classifier is given ``normalised + shift`` and answers the same.

    The copy's mean is moved, so that its images are the same pictures in [0,1]; the bias of its first convolution takes the shift off, and
    zero padding becomes padding with the shift.

    Args:
        attributor: a method that holds its classifier as ``explanandum``; left as it was.
        images: ``[B,3,H,W]`` in [0,1], on which the equality is checked.
        shift: ``[C]``, in normalised units.

    Raises:
        UnsupportedLayerError: the first convolution cannot take the shift off, or the logits differ.
    """
    path = first_convolution(attributor.explanandum, images)
    twin = copy.deepcopy(attributor)
    model = twin.explanandum
    convolution = model.classifier.get_submodule(path)
    if convolution.groups != 1 or isinstance(convolution.padding, str) or convolution.padding_mode != "zeros":
        raise UnsupportedLayerError(f"constant_shift: the first convolution ({path}) has groups, or padding that no shift can replace.")
    values = shift.to(convolution.weight)
    with torch.no_grad():
        model.mean = (model.mean - values.to(model.mean) * model.std).expand(len(values)).clone()
        taken = torch.einsum("oihw,i->o", convolution.weight, values)
        bias = -taken if convolution.bias is None else convolution.bias - taken
    vertical, horizontal = convolution.padding
    changed = convolution
    changed.bias = nn.Parameter(bias, requires_grad=convolution.weight.requires_grad)
    if vertical or horizontal:
        changed.padding = (0, 0)
        sides = (horizontal, horizontal, vertical, vertical)
        same = bool((values == values[0]).all())
        pad: nn.Module = nn.ConstantPad2d(sides, float(values[0])) if same else _Surround(sides, values)
        parent, _, name = path.rpartition(".")
        setattr(model.classifier.get_submodule(parent), name, nn.Sequential(pad, changed).eval())
    with torch.no_grad():
        before, after = attributor.explanandum(images), model(images)
    difference = float((after - before).abs().max()) / (1 + float(before.abs().max()))
    if not difference <= _TOLERANCE:
        raise UnsupportedLayerError(
            f"constant_shift: the shifted classifier's logits differ by {difference:.1e} of the largest, so it is another."
        )
    return twin
