"""The stages of a classifier: the last one, which class-activation maps read, and the last feature map of each stride.

A network's modules do not say which of them ends a stage: a branch of the last block may come later than all others, an
activation inside it may have the right shape. What distinguishes the last stage is that everything the scores know about the image
has passed through it. So a second image's output there is replaced by the first one's: the scores must become the first one's
(:func:`default_layer`). A decoder that reads several strides (:func:`find_stages`) needs no such proof: it takes what leaves a stride last.

Both look at one recording of a forward pass, and read its outputs as :mod:`~explainer.attribution.layouts` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from explainer.attribution.layouts import CHANNELS_FIRST, Call, Layout, Recording, candidates, decide, probed, readings, record, record_run
from explainer.attribution.rest import at_rest
from explainer.attribution.watching import out_of_place, refuse_compiled
from explainer.errors import ConfigError, UnsupportedLayerError

STRIDES = (4, 8, 16, 32)
PATCHES = (8, 14, 16, 32)
_MOST_PREFIX = 8  # class, distillation and register tokens
_LEAST_BLOCKS = 2
_POWERS = (1, 2, 4, 8, 16, 32, 64)
_SAME = 1e-3  # of the difference between two images' scores: what may remain where everything passes through a layer
_SEED = 7919_2711  # no user's random image is the second one
_SILENT = 1e-6  # of that difference: rounding
_LOUD = 1e3  # patch tokens are replaced by this many times another image's, so that weak ways to the scores (layer scale) are heard


def default_layer(explanandum: Any, images: Tensor) -> str:
    """Path of the output of the last spatial stage: ``layer4`` of a ResNet, ``features`` of a ConvNeXt, ``norm`` of a Swin transformer.

    It is the last feature map with more than one position that all evidence passes through, named by the outermost module that returns it;
    pooling and dropout at its end do not count (VGG-16: ``features.29``). Where the class token alone is read, the patches of the last
    layers have no say: there it is the last norm whose patch tokens the scores depend on, ``blocks.11.norm1`` of a ViT.

    Args:
        explanandum: the classifier, called without gradients.
        images: ``[B,C,H,W]``; one image is used.

    Raises:
        UnsupportedLayerError: no such layer; the message lists those that can be read.
    """
    if not any(path for path, _ in explanandum.classifier.named_modules()):
        raise UnsupportedLayerError(
            f"{type(explanandum.classifier).__name__} has no modules inside, so no feature map: name no layer of it."
        )
    refuse_compiled(explanandum.classifier, "the search for the last feature map")
    return _Search(explanandum, images).find()


class _Search:
    """One search; see :func:`default_layer`."""

    def __init__(self, explanandum: Any, images: Tensor) -> None:
        self.explanandum, self.classifier = explanandum, explanandum.classifier
        first = images[:1].detach()
        noise = torch.rand(first.shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float32).to(first)
        self.images = torch.cat([first, noise, first])
        self.head: nn.Module | None = None
        self.recording, logits = record(explanandum, self.images[:2])
        self.natural = self._difference(logits, 0, 1)
        if not self.natural > 1e-6 * float(logits.abs().max()):
            # a head of zeros, as fresh networks of some families have it: what enters it tells the images apart
            self.head = self._last_with_weights()
            self.natural = self._difference(self._run(2), 0, 1)

    def find(self) -> str:
        """Walk back from the scores."""
        recording, dead, failed = self.recording, "", ""
        for group in reversed(_groups(recording)):
            call = group.read
            if call is None or group.minor or not (layout := self._layout(call)):
                continue
            norm_of_tokens = bool(dead) and group.norm and layout.prefix > 0
            if failed and call.path.startswith(failed) and not norm_of_tokens:
                continue  # inside a module that evidence gets around
            whole, patches = self._experiment(call.module, layout)
            if patches and (whole or norm_of_tokens):
                return call.path
            if whole:
                dead = dead or call.path
            else:
                failed = call.path + "."
        why = f" (the patches of {dead!r} have no influence)" if dead else ""
        raise UnsupportedLayerError(
            f"no layer of {type(self.classifier).__name__} was found that is a feature map and that all evidence passes through{why}: name "
            f"one with layer=, {candidates(recording, self.classifier)}"
        )

    def _layout(self, call: Call) -> Layout | None:
        options = self.recording.readings(call, self.classifier)
        sizes = [layout.grid_of(call.shape) for layout in options]
        options = [layout for layout, (h, w) in zip(options, sizes, strict=True) if h * w > 1]
        if len(options) < 2:
            return options[0] if options else None
        try:
            return decide(
                self.explanandum, call.path, call.module, options=options, shape=call.shape, images=self.images, recording=self.recording
            )
        except UnsupportedLayerError:
            return None

    def _experiment(self, module: nn.Module, layout: Layout) -> tuple[bool, bool]:
        """Whether all evidence passes through the module, and whether its patches have influence."""

        def replace(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            output, other = output.clone(), output[1].clone()
            output[1] = output[0]
            if layout.prefix:
                layout.spatial(output)[2] = layout.spatial(other[None])[0] * _LOUD + 1
            return output

        handle = module.register_forward_hook(replace)
        try:
            scores = self._run(3 if layout.prefix else 2)
        finally:
            handle.remove()
        whole = self.natural > 0 and self._difference(scores, 0, 1) <= _SAME * self.natural
        if not layout.prefix:
            return whole, whole
        floor = 64 * torch.finfo(scores.dtype).eps * float(scores[0].abs().max()) + _SILENT * self.natural
        return whole, not self._difference(scores, 0, 2) <= floor  # NaN counts: the loud patches have been heard

    def _run(self, count: int) -> Tensor:
        """What is compared, for the first ``count`` images: the logits, or what enters the head."""
        seen: list[Tensor] = []
        hook = lambda _, args: seen.append(args[0].detach().flatten(1)) if args and isinstance(args[0], Tensor) else None  # noqa: E731
        handles = [] if self.head is None else [self.head.register_forward_pre_hook(hook)]
        try:
            with torch.no_grad(), out_of_place(self.classifier):
                logits = self.explanandum(self.images[:count])
        finally:
            for handle in handles:
                handle.remove()
        return seen[-1] if seen else logits

    def _last_with_weights(self) -> nn.Module | None:
        """The linear layer or convolution that is called last."""
        last: list[nn.Module] = []
        leaves = [m for m in self.classifier.modules() if next(m.parameters(recurse=False), None) is not None]
        handles = [m.register_forward_pre_hook(lambda m, _: last.append(m)) for m in leaves]
        try:
            with torch.no_grad():
                self.explanandum(self.images[:1])
        finally:
            for handle in handles:
                handle.remove()
        return last[-1] if last else None

    @staticmethod
    def _difference(values: Tensor, a: int, b: int) -> float:
        return float((values[a] - values[b]).abs().max())


class _Group(NamedTuple):
    """Calls that returned one and the same tensor.

    Attributes:
        read: the outermost of them whose module is called once; None: there is none.
        minor: the tensor comes from a pooling, dropout or single linear layer (keys and values of a pooling by attention).
        norm: it comes from a normalisation.
    """

    read: Call | None
    minor: bool
    norm: bool


def _groups(recording: Recording) -> list[_Group]:
    times = Counter(call.module for call in recording.calls)
    grouped: dict[int, list[Call]] = {}
    for call in recording.calls:
        grouped.setdefault(call.group, []).append(call)
    result = []
    for calls in grouped.values():
        once = [c for c in calls if times[c.module] == 1]
        read = min(once, key=lambda c: c.path.count(".")) if once else None
        result.append(_Group(read, _is_minor(calls[0].module), "Norm" in type(calls[0].module).__name__))
    return result


def _is_minor(module: nn.Module) -> bool:
    kind = type(module).__name__
    return next(module.children(), None) is None and ("Pool" in kind or "Dropout" in kind or isinstance(module, nn.Linear))


@dataclass(frozen=True)
class Stage:
    """The output of one stage.

    Attributes:
        path: path of the module inside the classifier.
        stride: pixels of the image per position of the map that the decoder makes of it.
        channels: C.
        layout: which axis of a map is which.
        prefix: the module returns tokens ``[B,N,C]``, the first ``prefix`` of which have no place in the image; None: a map.
        factor: factor of enlargement from the module's own map to the decoder's.
    """

    path: str
    stride: int
    channels: int
    layout: Layout = CHANNELS_FIRST
    prefix: int | None = None
    factor: int = 1

    def spatial(self, output: Tensor, size: Sequence[int]) -> Tensor:
        """The module's output for images of ``size`` (height, width) as ``[B,C,h,w]``."""
        if self.prefix is None:
            return self.layout.spatial(output)
        grid = [side // (self.stride * self.factor) for side in size]
        placed: Tensor = output[:, self.prefix :].transpose(1, 2).unflatten(2, grid)
        return placed


def find_stages(classifier: nn.Module, side: int = 224, strides: Sequence[int] = STRIDES, *, square: bool = True) -> list[Stage]:
    """The last feature map of each stride, in the order of the strides; of a transformer with one resolution, four of its depths.

    The latter are those of DPT (Ranftl et al., ICCV 2021): after each quarter of the blocks. The shallowest is enlarged to stride 8.

    A module inside a block that changes the stride (an expansion before the strided convolution, a downsampling norm) does not end a
    stage, so it is left out.

    Args:
        classifier: takes normalised images ``[1,3,side,side]``.
        side: side in pixels of the image it is run on; the stages of another size are the same.
        strides: those looked for.
        square: maps with as many channels as rows count, too. False: they are left out, as decoders were built until they counted.

    Raises:
        UnsupportedLayerError: fewer than two are found (a scripted network, a transformer whose blocks return more than tokens).
    """
    calls = [call for call in _calls(classifier, side) if square or not _is_square(call.shape)]
    crossing = [call.path + "." for call in calls if (square or not _is_square(call.given)) and _changes_stride(call, side)]
    found: dict[int, Stage] = {}
    last: dict[int, Call] = {}
    for call in calls:
        stage = _stage(call.path, call.shape, side)
        if stage is not None and stage.prefix is None and not any(call.path.startswith(prefix) for prefix in crossing):
            found[stage.stride], last[stage.stride] = stage, call
    read = [_read(classifier, found[stride], last[stride], side) for stride in strides if stride in found]
    stages = [stage for stage in read if stage is not None]
    if len(stages) < 2 and (blocks := _blocks(classifier, calls, side)):
        return blocks
    if len(stages) < 2:
        listing = ", ".join(f"{s.path} (stride {s.stride})" for s in found.values()) or "none"
        raise UnsupportedLayerError(
            f"{type(classifier).__name__} has feature maps of {len(stages)} of the strides {', '.join(map(str, strides))} (found: "
            f"{listing}), at least two are needed. Name them with explainer.options.layers, or use an encoder of its own."
        )
    return stages


def _blocks(classifier: nn.Module, calls: Sequence[Call], side: int) -> list[Stage]:
    """Four depths of the longest list of modules that give tokens, fine to coarse; empty without such a list."""
    lists: dict[str, list[Stage]] = {}
    for call in calls:
        stage, parent = _stage(call.path, call.shape, side), call.path.rpartition(".")[0]
        if stage is not None and stage.prefix is not None and isinstance(classifier.get_submodule(parent), nn.Sequential | nn.ModuleList):
            lists.setdefault(parent, []).append(stage)
    blocks = max(lists.values(), key=len, default=[])
    if len(blocks) < _LEAST_BLOCKS:
        return []
    depths = sorted({max(1, round(len(blocks) * quarter / 4)) - 1 for quarter in (1, 2, 3, 4)})
    return _with_fine_first([blocks[i] for i in depths])


def _with_fine_first(stages: list[Stage]) -> list[Stage]:
    """The first of several stages of tokens is enlarged to stride 8."""
    first, *rest = stages
    factor = 1 if first.prefix is None or not rest else max(1, round(first.stride / 8))
    return [replace(first, stride=first.stride // factor, factor=factor), *rest]


def named_stages(classifier: nn.Module, layers: Sequence[str], side: int = 224, option: str = "layers") -> list[Stage]:
    """The stages that the user names, in the order of their strides; of equal ones the order is the user's.

    Args:
        classifier: as in :func:`find_stages`.
        layers: module paths.
        side: as in :func:`find_stages`.
        option: the member of ``explainer.options`` that names them, for the message.

    Raises:
        UnsupportedLayerError: a path does not exist, or its output is no feature map.
        ConfigError: fewer than two different layers.
    """
    calls = {call.path: call for call in _calls(classifier, side)}
    known = {path: stage for path, call in calls.items() if (stage := _stage(path, call.shape, side)) is not None}
    chosen: dict[str, Stage] = {}
    for path in layers:
        if path not in known:
            raise UnsupportedLayerError(
                f"explainer.options.{option} names {path!r}, which gives no feature map of this classifier. Some that do: "
                f"{', '.join(list(known)[-8:])}."
            )
        stage = _read(classifier, known[path], calls[path], side)
        if stage is None:
            raise UnsupportedLayerError(
                f"explainer.options.{option} names {path!r}, which returns {calls[path].shape}: its rows and columns cannot be told from "
                "its channels. Name another layer."
            )
        chosen[path] = stage
    if len(set(layers)) < 2:
        raise ConfigError(f"explainer.options.{option} must name at least two different layers, received {list(layers)}.")
    return _with_fine_first(sorted((chosen[path] for path in layers), key=lambda stage: stage.stride))


def _calls(classifier: nn.Module, side: int) -> list[Call]:
    """Every module call on one image, in the order of completion."""
    parameter = next(classifier.parameters())
    example = torch.zeros(1, 3, side, side, dtype=parameter.dtype, device=parameter.device)
    with at_rest(classifier):
        return record_run(classifier, lambda: classifier(example), 1, (side, side))[0].calls


def _stage(path: str, shape: Sequence[int], side: int) -> Stage | None:
    """The feature map that an output of this shape is, or None. With as many channels as rows its layout is a guess: see :func:`_read`.

    A stride divides the side, up to rounding; one position alone has lost the place.
    """
    if len(shape) == 3:
        left = {patch: shape[1] - (side // patch) ** 2 for patch in PATCHES if side // patch > 1}
        fits = [(n, side % patch, patch) for patch, n in left.items() if 0 <= n <= _MOST_PREFIX]
        return Stage(path, min(fits)[2], int(shape[2]), prefix=min(fits)[0]) if fits else None
    if len(shape) != 4:
        return None
    for layout in readings(shape, (side, side)):
        (h, w), channels = layout.grid_of(shape), shape[layout.channels]
        if h == w > 1 and h <= side and -(-side // h) in _POWERS:
            return Stage(path, -(-side // h), int(channels), layout)
    return None


def _is_square(shape: Sequence[int]) -> bool:
    return len(shape) == 4 and len(set(shape[1:])) == 1


def _read(classifier: nn.Module, stage: Stage, call: Call, side: int) -> Stage | None:
    """The stage with the layout that its map really has: where shapes leave two, the network is asked; None where it gives no answer."""
    options = readings(call.shape, (side, side)) if len(call.shape) == 4 else []
    if len(options) < 2 or stage.channels != call.shape[2]:
        return stage
    parameter = next(classifier.parameters())
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(_SEED)).to(parameter)
    with at_rest(classifier):
        layout = probed(classifier, call.module, options, image)
    return None if layout is None else replace(stage, layout=layout)


def _changes_stride(call: Call, side: int) -> bool:
    """Whether the module is one block that leaves the stride it entered with; a sequence of blocks is looked into."""
    entered, left = _stage(call.path, call.given, side), _stage(call.path, call.shape, side)
    return entered is not None and left is not None and not isinstance(call.module, nn.Sequential) and left.stride != entered.stride


def linear_head(
    classifier: nn.Module, stage: Stage, num_classes: int, side: int = 224, logits_of: Callable[[Any, int], Tensor] | None = None
) -> nn.Linear | None:
    """The classifier's last linear layer, if its scores are that layer's on the mean of the stage's features: then
    ``W @ features`` at a position is the class's activation there (Zhou et al. 2016). None otherwise.

    Args:
        classifier: as in :func:`find_stages`.
        stage: the last one.
        num_classes: number of classes K.
        side: as in :func:`find_stages`.
        logits_of: what the classifier returns, and K -> logits ``[B,K]``; None: it returns them.
    """
    heads = [m for m in classifier.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not heads or heads[-1].in_features != stage.channels:
        return None
    head = heads[-1]
    generator = torch.Generator().manual_seed(0)
    example = torch.rand(1, 3, side, side, generator=generator).to(head.weight)
    kept: list[Tensor] = []
    handle = classifier.get_submodule(stage.path).register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        with at_rest(classifier), torch.no_grad():
            output = classifier(example)
    finally:
        handle.remove()
    logits = output if logits_of is None else logits_of(output, num_classes)
    if not isinstance(logits, Tensor):
        return None
    pooled = head(stage.spatial(kept[-1], (side, side)).mean(dim=(2, 3)))
    return head if torch.allclose(pooled, logits, atol=1e-3 * float(logits.abs().max()), rtol=1e-3) else None
