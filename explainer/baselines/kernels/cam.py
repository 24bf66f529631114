"""The kernel of the class-activation maps: feature maps, weighted by a class, relu, size of the image.

A gradient method of the family is written as its difference, ``weigh(features, gradients) -> [B,h,w]``; the others as theirs,
``class_maps``.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from explainer.attribution import check_class_index, check_images
from explainer.baselines.kernels.base import LayerBaseline
from explainer.baselines.kernels.features import FeatureMap, feature_gradients, forward_features
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.baselines.kernels.maps import CAM_EPSILON, Interpolation, resize_map
from explainer.errors import ConfigError
from explainer.tensors import min_max

Convention = Literal["torchray", "captum", "pytorch_grad_cam"]
Target = Literal["logit", "contrast"]


class CamBaseline(LayerBaseline):
    """Base of the CAM family.

    Args:
        explanandum: the classifier, see :class:`~explainer.baselines.kernels.base.Baseline`.
        layer: module path relative to the user's classifier, several of them, or None for the last spatial stage
            (:func:`~explainer.attribution.stages.default_layer`).
        convention: what follows the weighted sum of a layer; None: the method's own (``default_convention``).

            - ``torchray``: relu, bilinear resize (pixel centres), mean over layers. Not rescaled.
            - ``captum``: nearest resize, mean over layers. No relu, so signed.
            - ``pytorch_grad_cam``: relu, min-max to [0,1] per image, bilinear resize, mean over layers, min-max again.
        relu: None: the convention's; else switches the relu.
        interpolation: None: the convention's; else ``bilinear`` or ``nearest``.

    :meth:`layer_maps` returns the weighted sums before any of that.
    """

    default_convention: ClassVar[Convention] = "pytorch_grad_cam"
    passes: ClassVar[str] = "1 forward + 1 backward from the layer"
    classes_share_work = True

    def __init__(
        self,
        explanandum: Any,
        layer: str | Sequence[str] | None = None,
        convention: Convention | None = None,
        relu: bool | None = None,
        interpolation: Interpolation | None = None,
    ) -> None:
        paths = (layer,) if isinstance(layer, str) else tuple(layer or ())
        super().__init__(explanandum, paths[0] if paths else None)
        for path in paths[1:]:
            find_layer(explanandum.classifier, path)
        if len({id(find_layer(explanandum.classifier, path)) for path in paths}) < len(paths):
            raise ConfigError(f"{self.name}: layer names a module twice: {', '.join(paths)}.")
        self.more_layers = paths[1:]
        self.convention: Convention = self.default_convention if convention is None else convention
        if self.convention not in get_args(Convention):
            raise ConfigError(f"{self.name}: convention must be one of {', '.join(get_args(Convention))}, received {convention!r}.")
        self.relu = (self.convention != "captum") if relu is None else relu
        self.interpolation: Interpolation = interpolation or ("nearest" if self.convention == "captum" else "bilinear")
        resize_map(torch.zeros(1, 1, 1), (2, 2), self.interpolation)

    def layers(self, images: Tensor) -> dict[str, nn.Module]:
        """The layers that are read, by path."""
        first = self.target_layer(images)
        assert self.layer is not None
        return {self.layer: first} | {p: find_layer(self.explanandum.classifier, p) for p in self.more_layers}

    @abc.abstractmethod
    def class_maps(self, images: Tensor, classes: Sequence[Tensor]) -> list[list[Tensor]]:
        """Per entry of ``classes`` (each ``[B]``), per layer: the map ``[B,h,w]`` before relu. One forward pass for all."""

    def layer_maps(self, images: Tensor, class_index: Tensor | int | list[int]) -> list[Tensor]:
        """The weighted sums ``[B,h,w]`` of each layer: before relu, rescaling and resizing."""
        check_images(images)
        with untouched(self.explanandum):
            (maps,) = self.class_maps(images, [check_class_index(class_index, images, self.num_classes)])
        return [m.detach() for m in maps]

    def combine(self, maps: list[Tensor]) -> Tensor:
        """Maps of several layers at the image's size, ``[B,H,W]`` each -> one: their mean."""
        return torch.stack(maps).mean(0)

    def finish(self, maps: list[Tensor], size: tuple[int, int] | torch.Size) -> Tensor:
        """What the convention says: ``[B,h,w]`` per layer -> ``[B,H,W]``."""
        if self.relu:
            maps = [m.clamp(min=0) for m in maps]
        rescale = self.convention == "pytorch_grad_cam"
        resized = self.combine([resize_map(min_max(m, CAM_EPSILON) if rescale else m, size, self.interpolation) for m in maps])
        return min_max(resized, CAM_EPSILON) if rescale else resized

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        (maps,) = self.class_maps(images, [class_index])
        return self.finish(maps, images.shape[-2:])

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Maps of several classes from one forward pass, ``[B,len(classes),H,W]``."""
        check_images(images)
        chosen = range(self.num_classes) if classes is None else classes
        indices = [check_class_index(k, images, self.num_classes) for k in chosen]
        if not indices:
            return images.new_zeros(images.shape[0], 0, *images.shape[-2:])
        with untouched(self.explanandum):
            maps = self.class_maps(images, indices)
            return torch.stack([self.finish(m, images.shape[-2:]) for m in maps], dim=1).detach()


class GradientCamBaseline(CamBaseline):
    """A :class:`CamBaseline` whose map is a function of the feature maps and the gradients of the class's :meth:`score` there.

    Args:
        target: what is differentiated. ``logit``: the class's own, as the papers have it. ``contrast``: what speaks for the class and not
            for the others, :func:`contrasted`; activations of several classes are often alike wherever there is something at all.
        against: with ``contrast`` the names of the classes that a class is held against (``[free]``: what makes a surface a defect,
            whichever else it might be); None: all others.
        explanandum, layer, convention, relu, interpolation: see :class:`CamBaseline`.
    """

    def __init__(
        self,
        explanandum: Any,
        layer: str | Sequence[str] | None = None,
        convention: Convention | None = None,
        relu: bool | None = None,
        interpolation: Interpolation | None = None,
        *,
        target: Target = "logit",
        against: Sequence[str] | None = None,
    ) -> None:
        super().__init__(explanandum, layer, convention, relu, interpolation)
        if target not in get_args(Target):
            raise ConfigError(f"{self.name}: target must be one of {', '.join(get_args(Target))}, received {target!r}.")
        self.target: Target = target
        self.against: list[int] | None = None
        if against is not None:
            names = list(explanandum.class_names)
            unknown = [name for name in against if name not in names]
            if target != "contrast" or isinstance(against, str) or not against or unknown:
                raise ConfigError(
                    f"{self.name}: against is a list of class names for target: contrast, received {against!r} with target {target!r}. "
                    f"Classes: {', '.join(names)}."
                )
            self.against = [names.index(name) for name in against]

    @abc.abstractmethod
    def weigh(self, features: Tensor, gradients: Tensor) -> Tensor:
        """``A`` and ``G = d s_k / d A``, each ``[B,C,h,w]`` -> the class's map ``[B,h,w]``, before relu."""

    def score(self, logits: Tensor, class_index: Tensor) -> Tensor:
        """What is differentiated, ``[B]``: see ``target``."""
        scores = logits
        if self.against is not None:
            # Of a class that is held against itself nothing is left, which is what there is to see.
            scores = logits - logits[:, self.against].logsumexp(dim=1, keepdim=True)
        elif self.target == "contrast":
            scores = contrasted(logits, self.explanandum.task)
        return scores.gather(1, class_index[:, None])[:, 0]

    def slopes(self, logits: Tensor, class_index: Tensor, features: Sequence[FeatureMap], retain_graph: bool = False) -> list[Tensor]:
        """Gradients of :meth:`score` at the feature maps, ``[B,C,h,w]`` each."""
        scores = self.score(logits, class_index)[:, None]
        return feature_gradients(scores, torch.zeros_like(class_index), features, retain_graph)

    def class_maps(self, images: Tensor, classes: Sequence[Tensor]) -> list[list[Tensor]]:
        """See :meth:`CamBaseline.class_maps`; one backward pass from the layer per entry."""
        with torch.enable_grad():
            logits, features = forward_features(self.explanandum, self.layers(images), images, self.known)
            result = []
            for n, index in enumerate(classes):
                gradients = self.slopes(logits, index, features, retain_graph=n + 1 < len(classes))
                result.append([self.weigh(a.values, g) for a, g in zip(features, gradients, strict=True)])
        return result


def contrasted(logits: Tensor, task: Literal["multilabel", "multiclass"]) -> Tensor:
    """Each class against the others.

    Args:
        logits: ``[B,K]``.
        task: ``multiclass``: the log odds of the softmax, ``z_k - log sum_{j != k} exp z_j``; ``multilabel``: ``z_k - mean_j z_j``.

    Returns:
        ``[B,K]``; with one class the logits themselves.
    """
    if logits.shape[1] == 1:
        return logits
    if task == "multilabel":
        return logits - logits.mean(dim=1, keepdim=True)
    top = logits.argmax(dim=1, keepdim=True)
    total = logits.logsumexp(dim=1, keepdim=True)
    runners_up = logits.scatter(1, top, -torch.inf).logsumexp(dim=1, keepdim=True)
    # Of every class but the greatest, the rest holds the greatest, so that the difference of exponentials is safe.
    share = (logits - total).exp().scatter(1, top, 0.0)
    rest = (total + torch.log1p(-share)).scatter(1, top, runners_up)
    return logits - rest
