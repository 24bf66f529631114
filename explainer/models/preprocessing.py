"""What a classifier of a library was trained with: normalisation and image size, as timm and torchvision record them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from explainer.models.explanandum import IMAGENET_MEAN, IMAGENET_STD
from explainer.models.pretrained import EFFICIENTNET_LITES

log = logging.getLogger(__name__)
_TOLERANCE = 0.01


@dataclass(frozen=True)
class Preprocessing:
    """Input of a classifier.

    Attributes:
        mean, std: per channel, in units of [0,1] images.
        size: side in pixels of the images it was trained with.
        fixed: it takes no other size.
        source: who says so.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    fixed: bool
    source: str


def recorded(arch: str, options: dict[str, Any] | None = None) -> Preprocessing | None:
    """What the library records for an architecture (and the weights that ``options`` name); None for a network that is not a library's.

    Nothing is built or fetched.
    """
    options = options or {}
    prefix, _, rest = arch.partition(":")
    if arch in EFFICIENTNET_LITES:
        return _timm(f"tf_{arch}", {})
    if prefix == "timm" and rest:
        return _timm(rest, options)
    if arch in ("vgg16", "resnet50") or (prefix == "torchvision" and rest):
        return _torchvision(rest or arch, options)
    return None


def _timm(name: str, options: dict[str, Any]) -> Preprocessing | None:
    import timm

    try:
        found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        return None
    if found is None:
        return None
    values = found.to_dict()
    for key in ("pretrained_cfg", "pretrained_cfg_overlay"):
        own = options.get(key)
        values |= own if isinstance(own, dict) else {}
    fixed = bool(values.get("fixed_input_size")) and not {"img_size", "dynamic_img_size"} & set(options)
    mean, std, size = values.get("mean"), values.get("std"), values.get("input_size")
    if mean is None or std is None or not size:
        return None
    return Preprocessing(tuple(mean), tuple(std), int(size[-1]), fixed, f"timm's {name}")


def _torchvision(name: str, options: dict[str, Any]) -> Preprocessing | None:
    from torchvision import models

    try:
        every = models.get_model_weights(name)
        chosen = options.get("weights")
        weights: Any = every.DEFAULT if chosen is None else every[str(chosen).rpartition(".")[2]]
        transforms = weights.transforms()
        mean, std, size = transforms.mean, transforms.std, transforms.crop_size
    except (ValueError, KeyError, AttributeError, TypeError):
        return None  # not a classifier, or without weights
    fixed = name.startswith("vit_") and "image_size" not in options
    return Preprocessing(tuple(mean), tuple(std), int(size[0]), fixed, f"torchvision's {name}")


def normalization(
    arch: str, options: dict[str, Any] | None, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation as given, else the model's, else ImageNet's. Other ones than the weights' own are warned of.

    Args:
        arch, options: name and options of the classifier; ``options`` tell whether it starts from trained weights.
        mean, std: what the configuration gives, or None.
    """
    known = recorded(arch, options)
    trained = bool((options or {}).get("weights") or (options or {}).get("pretrained"))
    if known is not None and trained:
        for label, value, right in (("mean", mean, known.mean), ("std", std, known.std)):
            if differ(value, right):
                log.warning(
                    "classifier.%s is %s, but the weights were trained with %s (%s): their scores will be worse than they could be. "
                    "Leave classifier.%s out to use the model's own.",
                    label,
                    list(value or ()),
                    list(right),
                    known.source,
                    label,
                )
    default = known or Preprocessing(IMAGENET_MEAN, IMAGENET_STD, 224, False, "ImageNet")
    return list(default.mean if mean is None else mean), list(default.std if std is None else std)


def differ(given: Sequence[float] | None, right: Sequence[float]) -> bool:
    """Whether one was given, and it is another."""
    if given is None:
        return False
    wide = list(given) * (len(right) if len(given) == 1 else 1)
    return len(wide) != len(right) or any(abs(a - b) > _TOLERANCE for a, b in zip(wide, right, strict=True))
