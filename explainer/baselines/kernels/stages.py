"""The layer that class-activation maps read by default: the output of the last spatial stage, found by experiment.

A network's modules do not say which of them ends a stage: a branch of the last block may come later than all others, an
activation inside it may have the right shape. What distinguishes the stage is that everything the scores know about the image
has passed through it. So a second image's output there is replaced by the first one's: the scores must become the first one's.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from explainer.baselines.kernels.functions import refuse_compiled
from explainer.baselines.kernels.hooks import out_of_place
from explainer.baselines.kernels.layouts import Call, Layout, Recording, candidates, decide, record
from explainer.errors import UnsupportedLayerError

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
        sizes = [layout.spatial(torch.empty(call.shape, device="meta")).shape[-2:] for layout in options]
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
