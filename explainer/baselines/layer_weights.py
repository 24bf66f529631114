"""How much each layer counts where maps of several layers are combined.

S. Rebuffi, R. Fong, X. Ji, A. Vedaldi, "There and Back Again: Revisiting Backpropagation Saliency Methods", CVPR 2020, and Fong's thesis,
appendix C.2.

The numbers go into the option ``weights`` of ``norm_grad`` beside ``layer``. They belong to one classifier and are measured once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.attribution import check_class_index, check_images
from explainer.attribution.layouts import Known
from explainer.baselines.kernels.features import forward_features
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.errors import ConfigError, ShapeError

Kind = Literal["uniform", "linear", "spread", "accuracy"]
_BATCH = 32
_FOLDS = 5
_DECAY = 1e-4


def layer_weights(
    explanandum: Any, layers: Sequence[str], kind: Kind, *, images: Tensor | None = None, labels: Tensor | None = None, seed: int = 0
) -> list[float]:
    """One weight a layer, together 1.

    - ``uniform``: 1/J each. ``linear``: in proportion to j = 1..J, in the order of ``layers``.
    - ``spread``: ``(1/M) sum_i || |xbar^i - xbar| ||_1 / C_j``, with xbar^i the spatial mean of image i's features and xbar the mean
      over images: how much a layer's features differ between images.
    - ``accuracy``: share of images whose label a linear classifier on xbar^i finds, trained on the other four fifths (logistic
      regression, L2 1e-4, features of unit variance).

    Args:
        explanandum: the classifier.
        layers: module paths of feature maps, from the image to the logits.
        kind: which of the four rules above.
        images: ``[M,3,H,W]`` in [0,1], for ``spread`` and ``accuracy``; the paper takes as many of each class.
        labels: ``[M]``, classes, for ``accuracy``.
        seed: random seed of the folds.

    Raises:
        ConfigError: an unknown kind or layer, no images or labels where they are needed, or features that are all alike.
        ShapeError: labels and images do not belong together, or fewer than five images for ``accuracy``.
        UnsupportedLayerError: a layer returns no feature map.
    """
    if kind not in get_args(Kind):
        raise ConfigError(f"kind must be one of {', '.join(get_args(Kind))}, received {kind!r}.")
    if not layers:
        raise ConfigError("layers must name at least one layer, received none.")
    if kind in ("uniform", "linear"):
        return _normalized([1.0 if kind == "uniform" else float(j + 1) for j in range(len(layers))])
    if images is None or (kind == "accuracy" and labels is None):
        raise ConfigError(f"kind={kind!r} is measured: give images=" + (" and labels=." if kind == "accuracy" else "."))
    check_images(images)
    pooled = _pooled(explanandum, layers, images)
    if kind == "spread":
        return _normalized([float((p - p.mean(0)).abs().sum(1).mean() / p.shape[1]) for p in pooled])
    assert labels is not None
    index = check_class_index(labels, images, explanandum.num_classes)
    if len(images) < _FOLDS:
        raise ShapeError(f"kind='accuracy' trains on four fifths of the images: give at least {_FOLDS}, received {len(images)}.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    return _normalized([_accuracy(p[order], index[order]) for p in pooled])


def _pooled(explanandum: Any, layers: Sequence[str], images: Tensor) -> list[Tensor]:
    """Spatial means ``[M,C_j]`` of each layer."""
    modules = {path: find_layer(explanandum.classifier, path) for path in layers}
    known: Known = {}
    parts = []
    with untouched(explanandum), torch.no_grad():
        for batch in images.split(_BATCH):
            _, features = forward_features(explanandum, modules, batch, known)
            parts.append([f.values.mean((2, 3)) for f in features])
    return [torch.cat(of_layer) for of_layer in zip(*parts, strict=True)]


def _accuracy(features: Tensor, labels: Tensor) -> float:
    """Five-fold accuracy of a linear classifier. What never changes in the training part says nothing and is left out by its scale."""
    hits = 0
    for fold in range(_FOLDS):
        held = torch.arange(len(labels), device=labels.device) % _FOLDS == fold
        train, mean = features[~held], features[~held].mean(0)
        std = train.std(0, unbiased=False)
        scale = torch.where(std > 1e-8, 1 / std.clamp(min=1e-8), torch.zeros_like(std))
        weight, bias = _fitted((train - mean) * scale, labels[~held], int(labels.max()) + 1)
        hits += int((((features[held] - mean) * scale) @ weight.T + bias).argmax(1).eq(labels[held]).sum())
    return hits / len(labels)


def _fitted(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Logistic regression from zero, by L-BFGS."""
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + _DECAY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def _normalized(values: list[float]) -> list[float]:
    if not sum(values) > 0:
        raise ConfigError("no layer tells these images apart, so that none can be weighed: give other layers or other images.")
    return [v / sum(values) for v in values]
