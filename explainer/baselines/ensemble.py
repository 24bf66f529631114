"""The mean of several methods' maps, over mirror images and enlarged copies of the picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from explainer import plugins
from explainer.attribution import Attributor, one_map
from explainer.baselines import build
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.maps import Interpolation, resize_map, shares
from explainer.errors import ConfigError, ExplainerError

Flips = Literal["none", "horizontal", "both"]

#: Image axes that are turned around.
_AXES: dict[Flips, tuple[tuple[int, ...], ...]] = {"none": ((),), "horizontal": ((), (-1,)), "both": ((), (-1,), (-2,), (-2, -1))}


class Ensemble(Baseline):
    """``sum_j w_j mean_s max(M_js, 0) / max(M_js)``: M_js is the mean of method j's maps of the picture and its mirror images, turned back,
    at scale s of the picture.

    Methods err at different places, so their mean is more often right than each of them (Rieger and Hansen 2020, "Aggregating explanation
    methods for stable and robust explainability", AGG-Mean; for mirror images ``aug_smooth`` of pytorch-grad-cam). A map that is nowhere
    positive counts 0. On an enlarged picture a classifier of convolutions has a finer feature map, so that class activations have more
    positions (mean over scales: Ahn and Kwak, CVPR 2018).

    Args:
        explanandum: the classifier.
        methods: baselines: names, or mappings with ``name`` and ``options``.
        weights: one a method, at least 0; together they count as 1. None: all alike.
        flips: mirror images besides the picture itself: ``none``; ``horizontal``; ``both`` (left and right, top and bottom, and both at
            once, for pictures without an up and down).
        scales: factors of the picture's height and width; its copies are resized bilinearly, their maps back to the picture's size. Factors
            other than 1 ask for a classifier that takes pictures of any size, without ``input_size``.
    """

    name = "ensemble"
    passes: ClassVar[str] = "those of the methods inside (grad_cam, gradient), a mirror image and scale"
    classes_share_work = True

    def __init__(
        self,
        explanandum: Any,
        methods: Sequence[str | Mapping[str, Any]] = ("grad_cam", "gradient"),
        *,
        weights: Sequence[float] | None = None,
        flips: Flips = "none",
        scales: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__(explanandum)
        if flips not in get_args(Flips):
            raise ConfigError(f"ensemble: flips must be one of {', '.join(get_args(Flips))}, received {flips!r}.")
        self.scales = _scales(scales)
        side = getattr(explanandum, "input_size", None)
        if side is not None and self.scales != [1.0]:
            raise ConfigError(
                f"ensemble: scales {self.scales} would change nothing: the classifier resizes every picture to {side} px (input_size). "
                "Leave scales at 1, or load the classifier without input_size."
            )
        members = _members(methods)
        self.members: list[Attributor] = [one_map(build(name, explanandum, **options)) for name, options in members]
        self.weights = shares([1] * len(members) if weights is None else weights, len(members), self.name, "methods")
        self.axes = _AXES[flips]
        for fact, of in (
            ("needs_gradients", any),
            ("deterministic", all),
            ("class_specific", any),
            ("needs_masks", any),
            ("reference", all),
        ):
            setattr(self, fact, of(getattr(member, fact) for member in self.members))

    @classmethod
    def inner_methods(cls, options: Mapping[str, Any]) -> list[tuple[str, type, Mapping[str, Any]]]:
        """See :meth:`Attributor.inner_methods`."""
        return [(name, plugins.find("explainer.baselines", name), inside) for name, inside in _members(options["methods"])]

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        def one(member: Attributor, seen: Tensor, truth: Tensor | None) -> Tensor:
            return member(seen, class_index, generator=generator, masks=truth)

        return self._combined(one, images, generator, masks)

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Attributor.all_classes`; the methods inside share what they share."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator

        def one(member: Attributor, seen: Tensor, truth: Tensor | None) -> Tensor:
            return member.all_classes(seen, classes, generator=generator, masks=truth)

        return self._combined(one, images, generator, masks)

    def _combined(
        self, one: Callable[[Attributor, Tensor, Tensor | None], Tensor], images: Tensor, generator: torch.Generator, masks: Tensor | None
    ) -> Tensor:
        """``[B,H,W]``, or ``[B,n,H,W]`` where ``one``, given a method, images and their masks, answers with maps of n classes."""
        start, found, (height, width) = generator.get_state(), [], images.shape[-2:]
        for scale in self.scales:
            size = (max(1, round(scale * height)), max(1, round(scale * width)))
            seen, truth = _resized(images, size), None if masks is None else _resized(masks.to(images), size, "nearest")
            for member, weight in zip(self.members, self.weights, strict=True):
                generator.set_state(start)  # a method's noise does not depend on the methods before it
                with _taken(scale, size, changed=size != (height, width)):
                    turned = [one(member, seen.flip(axes), None if truth is None else truth.flip(axes)).flip(axes) for axes in self.axes]
                mean = torch.stack(turned).mean(0).clamp_min(0)
                top = mean.amax(dim=(-2, -1), keepdim=True)
                found.append(weight / len(self.scales) * _resized(torch.where(top > 0, mean / top, mean), (height, width)))
        return torch.stack(found).sum(0)


@contextlib.contextmanager
def _taken(scale: float, size: tuple[int, int], changed: bool) -> Iterator[None]:
    """A classifier that is made for one size of picture refuses others in its own words."""
    try:
        yield
    except ExplainerError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        if not changed or any(words in str(error) for words in ("out of memory", "can't allocate memory", "CUDA error")):
            raise
        raise ConfigError(
            f"ensemble: with scales {scale:g} the classifier gets pictures of {size[0]} x {size[1]} px and refuses them ({error}). Leave "
            "scales at 1 for a classifier that is made for one size of picture."
        ) from error


def _resized(x: Tensor, size: tuple[int, int], mode: Interpolation = "bilinear") -> Tensor:
    """``[...,H,W]``."""
    return x if x.shape[-2:] == size else resize_map(x.flatten(0, -3), size, mode).unflatten(0, x.shape[:-2])


def _members(methods: Any) -> list[tuple[str, dict[str, Any]]]:
    """Names and options."""
    if isinstance(methods, (str, Mapping)) or not isinstance(methods, Sequence) or not methods:
        raise ConfigError(f"ensemble: methods must be a list of names, or of mappings with name and options, received {methods!r}.")
    members = []
    for method in methods:
        entry = {"name": method} if isinstance(method, str) else dict(method) if isinstance(method, Mapping) else {}
        name, options = entry.pop("name", None), entry.pop("options", None) or {}
        if not isinstance(name, str) or name == Ensemble.name or entry or not isinstance(options, Mapping):
            raise ConfigError(
                f"ensemble: each of methods is a name of another method, or a mapping with name and options, received {method!r}."
            )
        members.append((name, dict(options)))
    return members


def _scales(scales: Any) -> list[float]:
    """Factors above 0."""
    found = [] if not isinstance(scales, Sequence) or isinstance(scales, str) else list(scales)
    if not found or any(isinstance(s, bool) or not isinstance(s, (int, float)) or not 0 < s <= 8 for s in found):
        raise ConfigError(f"ensemble: scales must be a list of factors above 0 and at most 8, e.g. [1, 1.5], received {scales!r}.")
    return [float(s) for s in found]
