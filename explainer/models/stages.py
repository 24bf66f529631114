"""The stages of a classifier: where its feature maps of each stride come from, and whether its head is a class activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from explainer.errors import UnsupportedLayerError

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Stage:
    """The output of one stage.

    Attributes:
        path: of the module inside the classifier.
        stride: pixels of the image per position.
        channels: C.
        channels_last: the module returns ``[B,h,w,C]``.
    """

    path: str
    stride: int
    channels: int
    channels_last: bool = False

    def spatial(self, output: Tensor) -> Tensor:
        """The module's output as ``[B,C,h,w]``."""
        return output.permute(0, 3, 1, 2) if self.channels_last else output


@dataclass
class _Seen:
    path: str
    module: nn.Module
    stride_in: int | None
    stage: Stage | None


def find_stages(classifier: nn.Module, side: int = 224, strides: Sequence[int] = STRIDES) -> list[Stage]:
    """The last feature map of each stride, in the order of the strides.

    A module inside a block that changes the stride (an expansion before the strided convolution, a downsampling norm) does not end a
    stage, so it is left out.

    Args:
        classifier: takes normalised images ``[1,3,side,side]``.
        side: of the image it is run on, in pixels; the stages of another size are the same.
        strides: those looked for.

    Raises:
        UnsupportedLayerError: fewer than two are found (a transformer of one resolution, a scripted network).
    """
    seen = _record(classifier, side)
    crossing = [s.path + "." for s in seen if _changes_stride(s)]
    found: dict[int, Stage] = {}
    for s in seen:
        if s.stage is not None and not any(s.path.startswith(prefix) for prefix in crossing):
            found[s.stage.stride] = s.stage
    stages = [found[stride] for stride in strides if stride in found]
    if len(stages) < 2:
        listing = ", ".join(f"{s.path} (stride {s.stride})" for s in found.values()) or "none"
        raise UnsupportedLayerError(
            f"{type(classifier).__name__} has feature maps of {len(stages)} of the strides {', '.join(map(str, strides))} (found: "
            f"{listing}), at least two are needed. Name them with explainer.options.layers, or use an encoder of its own."
        )
    return stages


def named_stages(classifier: nn.Module, layers: Sequence[str], side: int = 224) -> list[Stage]:
    """The stages that the user names, in the order of their strides.

    Args:
        classifier: as in :func:`find_stages`.
        layers: module paths.
        side: as in :func:`find_stages`.

    Raises:
        UnsupportedLayerError: a path does not exist, or its output is no feature map.
    """
    known = {s.path: s.stage for s in _record(classifier, side) if s.stage is not None}
    for path in layers:
        if path not in known:
            raise UnsupportedLayerError(
                f"explainer.options.layers names {path!r}, which gives no feature map of this classifier. Some that do: "
                f"{', '.join(list(known)[-8:])}."
            )
    return sorted((known[path] for path in layers), key=lambda stage: stage.stride)


def _record(classifier: nn.Module, side: int) -> list[_Seen]:
    """Every module call on one image, in the order of completion."""
    names = {module: path for path, module in classifier.named_modules() if path}
    seen: list[_Seen] = []

    def note(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        given = next((_stage(names[module], a, side) for a in args if isinstance(a, Tensor)), None)
        stage = _stage(names[module], output, side) if isinstance(output, Tensor) else None
        seen.append(_Seen(names[module], module, None if given is None else given.stride, stage))

    parameter = next(classifier.parameters())
    example = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
    handles = [module.register_forward_hook(note) for module in names]
    modes = {module: module.training for module in classifier.modules()}
    try:
        classifier.eval()
        with torch.no_grad():
            classifier(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return seen


def _stage(path: str, output: Tensor, side: int) -> Stage | None:
    if output.ndim != 4:
        return None
    for last, (channels, h, w) in ((False, output.shape[1:]), (True, (output.shape[3], output.shape[1], output.shape[2]))):
        # A stride divides the side, up to rounding; one position alone has lost the place.
        if h == w > 1 and h <= side and -(-side // h) in (1, 2, 4, 8, 16, 32, 64) and channels != h:
            return Stage(path, -(-side // h), int(channels), last)
    return None


def _changes_stride(seen: _Seen) -> bool:
    """Whether the module is one block that leaves the stride it entered with; a sequence of blocks is looked into."""
    if seen.stage is None or seen.stride_in is None or isinstance(seen.module, nn.Sequential):
        return False
    return seen.stage.stride != seen.stride_in


def linear_head(classifier: nn.Module, stage: Stage, num_classes: int, side: int = 224) -> nn.Linear | None:
    """The classifier's last linear layer, if its scores are that layer's on the mean of the stage's features: then
    ``W @ features`` at a position is the class's activation there (Zhou et al. 2016). None otherwise.

    Args:
        classifier: as in :func:`find_stages`.
        stage: the last one.
        num_classes: K.
        side: as in :func:`find_stages`.
    """
    heads = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not heads or heads[-1].in_features != stage.channels:
        return None
    head = heads[-1]
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(1, 3, side, side, generator=generator).to(head.weight)
    kept: list[Tensor] = []
    handle = classifier.get_submodule(stage.path).register_forward_hook(lambda _, __, output: kept.append(output))
    training = classifier.training
    try:
        classifier.eval()
        with torch.no_grad():
            logits = classifier(example)
    finally:
        handle.remove()
        classifier.train(training)
    if not isinstance(logits, Tensor):
        return None
    pooled = head(stage.spatial(kept[-1]).mean(dim=(2, 3)))
    return head if torch.allclose(pooled, logits, atol=1e-3 * float(logits.abs().max()), rtol=1e-3) else None
