"""Feature maps of every layout as ``[B,C,h,w]``: channels first, channels last, and tokens with or without prefix tokens.

A layer's output has no label that says which axis is which. The shape decides where it can: rows and columns must be the
image's size divided by one stride. Where two readings fit (8 channels of 8x8), the network is asked: a change at the top of
the image must be felt higher up in the map than one at the bottom. What neither can decide is refused.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from explainer.attribution.watching import out_of_place
from explainer.errors import UnsupportedLayerError

Size = tuple[int, int]
_MOST_PREFIX_TOKENS = 16
_COMMON_PREFIXES = (0, 1, 2, 5)  # none; class; class and distillation; class and four registers
_SHOWN = 12  # candidates that a message lists
_FELT, _CLEARLY = 0.1, 2.0  # shift of the centre of change (1: the whole height), and how much more than under the other reading


@dataclass(frozen=True)
class Layout:
    """Which axis of a layer's output is which.

    Attributes:
        channels: axis of the channels.
        grid: rows and columns of tokens, row by row; None: rows and columns are axes of their own.
        prefix: tokens in front that have no place in the image (class, distillation, registers).
    """

    channels: int
    grid: Size | None = None
    prefix: int = 0

    def spatial(self, output: Tensor) -> Tensor:
        """The layer's output as ``[B,C,h,w]``, prefix tokens left out: a view, so that writing into it writes into ``output``."""
        if self.grid is None:
            return output if self.channels == 1 else output.permute(0, 3, 1, 2)
        tokens = output if self.channels == 2 else output.transpose(1, 2)
        maps: Tensor = tokens[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return maps

    def grid_of(self, shape: Sequence[int]) -> Size:
        """Rows and columns of an output of this shape."""
        return self.grid or ((shape[2], shape[3]) if self.channels == 1 else (shape[1], shape[2]))


CHANNELS_FIRST = Layout(1)


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass.

    Attributes:
        path, module: the module and its path; paths are relative to the user's classifier.
        shape: shape of its output, batch first.
        group: calls that returned one and the same tensor, one after the other (a stage and its last block), share a number.
        grids: sizes of the feature maps seen so far, latest first.
        given: shape of its first tensor argument; empty without one.
    """

    path: str
    module: nn.Module
    shape: tuple[int, ...]
    group: int
    grids: tuple[Size, ...]
    given: tuple[int, ...] = ()


@dataclass
class Recording:
    """What one forward pass called, in the order of completion.

    Attributes:
        size: size of the image that the classifier received.
        calls: those that returned one tensor with the batch in front.
    """

    size: Size = (0, 0)
    calls: list[Call] = field(default_factory=list)

    def readings(self, call: Call, classifier: nn.Module) -> list[Layout]:
        """How the output of ``call`` can be read."""
        return readings(call.shape, self.size, call.grids, prefix_tokens(classifier, call.path))


def input_size(explanandum: Any, images: Tensor) -> Size:
    """Height and width at which the classifier itself sees the images."""
    side = getattr(explanandum, "input_size", None)
    return (side, side) if side is not None else (int(images.shape[-2]), int(images.shape[-1]))


def record(explanandum: Any, images: Tensor) -> tuple[Recording, Tensor]:
    """Run ``images`` once and note every module's output; returns it with the logits."""
    return record_run(explanandum.classifier, lambda: explanandum(images), len(images), input_size(explanandum, images))


def record_run(classifier: nn.Module, run: Callable[[], Tensor], batch: int, size: Size) -> tuple[Recording, Tensor]:
    """Note every module's output during ``run()``; returns it with what ``run`` returned.

    Args:
        classifier: whose modules are watched, called without gradients.
        run: calls it once.
        batch: number of images.
        size: size of the image that the classifier receives.
    """
    found = Recording(size)
    last: list[Any] = [None]
    grids: list[Size] = []

    def note(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or output.shape[:1] != (batch,):
            last[0] = None
            return
        group = found.calls[-1].group if found.calls and output is last[0] else len(found.calls)
        last[0] = output
        shape, given = tuple(output.shape), next((tuple(a.shape) for a in args if isinstance(a, Tensor)), ())
        found.calls.append(Call(path, module, shape, group, tuple(reversed(grids)), given))
        if output.ndim == 4 and len(read := readings(shape, found.size)) == 1:
            h, w = read[0].grid_of(shape)
            if h * w > 1 and h <= found.size[0] and w <= found.size[1] and (not grids or grids[-1] != (h, w)):
                grids.append((h, w))

    handles = [
        module.register_forward_hook(lambda m, args, out, path=path: note(path, m, args, out))
        for path, module in classifier.named_modules()
        if path
    ]
    try:
        with torch.no_grad(), out_of_place(classifier):
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    return found, result


def readings(shape: Sequence[int], size: Size, grids: Iterable[Size] = (), prefix: int | None = None) -> list[Layout]:
    """All layouts that an output of this shape can have.

    Args:
        shape: shape of the output, batch first.
        size: height and width of the image.
        grids: sizes of feature maps that the network had before; a token grid is looked for there first.
        prefix: number of prefix tokens that the network says it has.
    """
    if len(shape) == 4:
        options = {Layout(1): (shape[2], shape[3]), Layout(3): (shape[1], shape[2])}
        exact = [layout for layout, (h, w) in options.items() if h * size[1] == w * size[0] or (h, w) in _strided(size)]
        return exact or [layout for layout, (h, w) in options.items() if abs(h * size[1] - w * size[0]) <= sum(size)]
    if len(shape) != 3:
        return []
    place = _token_grid(shape[1], size, tuple(grids), prefix)
    found = [] if place is None else [Layout(2, *place)]
    # Channels before tokens: only inside a block, so without prefix tokens, and on a grid that the network is known to have.
    same = next((grid for grid in grids if grid[0] * grid[1] == shape[2] > 1), None)
    return found if same is None or shape[1] < 2 else [*found, Layout(1, same)]


@functools.lru_cache
def _strided(size: Size) -> frozenset[Size]:
    """The image's size divided by every stride, rounded up or down."""
    strides = range(1, max(size) + 1)
    return frozenset((-(-size[0] // s), -(-size[1] // s)) for s in strides) | {(size[0] // s, size[1] // s) for s in strides}


def _token_grid(number: int, size: Size, grids: tuple[Size, ...], prefix: int | None) -> tuple[Size, int] | None:
    """Grid and number of prefix tokens of ``number`` tokens, or None."""
    strided = {h * w: (h, w) for h, w in _strided(size) if h * w > 1}
    seen = {h * w: (h, w) for h, w in reversed(grids) if h * w > 1}
    if prefix is not None and (grid := seen.get(number - prefix, strided.get(number - prefix))):
        return grid, prefix
    for extra in range(_MOST_PREFIX_TOKENS + 1):
        if number - extra in seen:
            return seen[number - extra], extra
    for extra in _COMMON_PREFIXES:
        if number - extra in strided:
            return strided[number - extra], extra
    return None


def prefix_tokens(classifier: nn.Module, path: str) -> int | None:
    """``num_prefix_tokens`` of the innermost module around ``path`` that has it (timm's transformers do); None where nothing says it."""
    parts = path.split(".")
    for depth in range(len(parts), -1, -1):
        around = classifier.get_submodule(".".join(parts[:depth]))
        value = getattr(around, "num_prefix_tokens", None)
        if isinstance(value, int):
            return value
    return None


Known = dict[tuple[Any, ...], Layout]  # what was found out, by path, size of the image and shape


def layout_of(
    explanandum: Any, path: str, module: nn.Module, *, shape: Sequence[int], images: Tensor, known: Known | None = None
) -> Layout:
    """The layout of a layer's output of ``shape``.

    Args:
        explanandum: the classifier; asked again (one image, no gradients) only where the shape alone does not decide.
        path, module: the layer.
        shape: shape of its output for ``images``.
        images: ``[B,C,H,W]``.
        known: answers of earlier calls for this classifier; this one is added.

    Raises:
        UnsupportedLayerError: it is no feature map, or two readings fit equally well.
    """
    size = input_size(explanandum, images)
    if len(shape) == 4 and len(fitting := readings(shape, size)) == 1:
        return fitting[0]
    known, key = {} if known is None else known, (path, size, *shape[1:])
    if key not in known:
        with torch.no_grad():
            recording, _ = record(explanandum, images[:1])
        call = next((c for c in reversed(recording.calls) if c.module is module and c.shape[1:] == tuple(shape[1:])), None)
        options = [] if call is None else recording.readings(call, explanandum.classifier)
        known[key] = decide(explanandum, path, module, options=options, shape=shape, images=images, recording=recording)
    return known[key]


def decide(
    explanandum: Any, path: str, module: nn.Module, *, options: list[Layout], shape: Sequence[int], images: Tensor, recording: Recording
) -> Layout:
    """The one of ``options`` under which the top of the image is at the top of the map. Raises :class:`UnsupportedLayerError`."""
    if options and (found := probed(explanandum, module, options, images)) is not None:
        return found
    why = "whose rows and columns cannot be told from its channels" if options else "which is no feature map"
    raise UnsupportedLayerError(
        f"layer {path!r} returns {tuple(shape)}, {why} of images of {recording.size[0]}x{recording.size[1]} px: name another with layer=, "
        f"{candidates(recording, explanandum.classifier)}"
    )


def probed(run: Callable[[Tensor], Any], module: nn.Module, options: list[Layout], images: Tensor) -> Layout | None:
    """The reading of the output of ``module`` under which the top of the image is at the top of the map, or None where that is not clear.

    Args:
        run: calls the network that holds ``module`` on images like ``images``.
        module: the layer.
        options: the readings, at least one.
        images: ``[B,C,H,W]``; one is used.
    """
    if len(options) == 1:
        return options[0]
    shifts = _vertical_shifts(run, module, options, images)
    best, second = sorted(shifts, reverse=True)[:2]
    return options[shifts.index(best)] if best > _FELT and best > _CLEARLY * second else None


def candidates(recording: Recording, classifier: nn.Module) -> str:
    """The layers that can be read, last ones first, for a message."""
    names: dict[int, str] = {}
    times = Counter(call.module for call in recording.calls)
    for call in recording.calls:
        if times[call.module] == 1 and len(recording.readings(call, classifier)) == 1:
            known = names.get(call.group, call.path)
            names[call.group] = min(known, call.path, key=lambda p: p.count("."))
    last = list(dict.fromkeys(reversed(names.values())))
    if not last:
        return "but none of this classifier's modules returns a feature map (scripted and compiled parts cannot be looked into)."
    more = f", and {len(last) - _SHOWN} more" if len(last) > _SHOWN else ""
    return f"for example one of these, which can be read: {', '.join(last[:_SHOWN])}{more}."


def _vertical_shifts(run: Callable[[Tensor], Any], module: nn.Module, options: list[Layout], images: Tensor) -> list[float]:
    """Per reading: how far the centre of what changes moves down, in heights of the map, when the change of the image does."""
    first = images[:1]
    rows = max(1, first.shape[-2] // 4)
    top, bottom = first.clone(), first.clone()
    top[..., :rows, :] = 1 - top[..., :rows, :]
    bottom[..., -rows:, :] = 1 - bottom[..., -rows:, :]
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    try:
        with torch.no_grad():
            run(torch.cat([first, top, bottom]))
    finally:
        handle.remove()
    return [_center(m[2] - m[0]) - _center(m[1] - m[0]) for m in (layout.spatial(seen[-1]).double() for layout in options)]


def _center(change: Tensor) -> float:
    """Mean row of a change ``[C,h,w]``, from 0 (top) to 1 (bottom)."""
    weight = change.abs().sum((0, 2))
    steps = torch.linspace(0, 1, len(weight), dtype=weight.dtype, device=weight.device)
    return float((weight * steps).sum() / weight.sum()) if bool(weight.sum() > 0) else 0.5
