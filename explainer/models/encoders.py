"""The encoder of the Explainer's network as the classifier's own: chosen by name and filled with its weights."""

from __future__ import annotations

import copy
import difflib
import logging

import torch
from torch import Tensor, nn

from explainer.errors import ConfigError
from explainer.models.flow import copy_by_flow, first_difference, plain_name
from explainer.models.networks import encoder_of
from explainer.models.pretrained import EFFICIENTNET_LITES

log = logging.getLogger(__name__)
AUTO = "auto"
_REGNETS = {"400mf": "004", "800mf": "008", "1_6gf": "016", "3_2gf": "032", "8gf": "080", "16gf": "160", "32gf": "320"}
#: torchvision's names for networks that timm has under another.
_IN_TIMM = {
    **{f"efficientnet_b{i}": f"efficientnet_b{i}" for i in range(8)},
    **{f"convnext_{s}": f"convnext_{s}" for s in ("tiny", "small", "base", "large")},
    **{
        f"regnet_{x}_{a}": f"regnet{x}_{b}" for x in "xy" for a, b in (("400mf", "004"), ("1_6gf", "016"), ("3_2gf", "032"), ("8gf", "080"))
    },
    **{f"regnet_{x}_{a}": f"regnet{x}_{b}" for x in "xy" for a, b in (("800mf", "008"), ("16gf", "160"), ("32gf", "320"))},
    "regnet_x_400mf": "regnetx_004_tv",
    "regnet_y_800mf": "regnety_008_tv",
    "regnet_y_8gf": "regnety_080_tv",
    "mobilenet_v3_large": "mobilenetv3_large_100",
    "mobilenet_v3_small": "mobilenetv3_small_100",
    "wide_resnet50_2": "wide_resnet50_2",
    "wide_resnet101_2": "wide_resnet101_2",
}


def encoder_for(arch: str | None) -> str:
    """Name of the encoder of segmentation-models-pytorch that is the classifier itself (``encoder_name: auto``).

    Args:
        arch: name of the classifier, as :func:`~explainer.models.classifiers.build_classifier` takes it.

    Raises:
        ConfigError: there is none.
    """
    from segmentation_models_pytorch.encoders import encoders

    prefix, _, rest = (arch or "").partition(":")
    if arch in EFFICIENTNET_LITES:
        return f"tu-tf_{arch}"
    if prefix == "timm" and rest:
        import timm

        if timm.is_model(rest.partition(".")[0]):
            return f"tu-{rest}"
        close = difflib.get_close_matches(rest, timm.list_models(), n=1)
        raise ConfigError(f"encoder_name: auto: timm has no model {rest!r}.{f' Did you mean {close[0]}?' if close else ''}")
    name = rest if prefix == "torchvision" else arch or ""
    if name in encoders:
        return name
    if prefix == "torchvision" and name in _IN_TIMM:
        return f"tu-{_IN_TIMM[name]}"
    advice = "Name one with explainer.options.encoder_name."
    if arch == "small_vgg":
        advice = "Use explainer.network: vgg_deeplab or vgg_unet, whose encoder it is."
    raise ConfigError(f"encoder_name: auto: no encoder of segmentation-models-pytorch is the classifier {arch!r}. {advice}")


def init_encoder(network: nn.Module, classifier: nn.Module) -> int:
    """Copy the classifier's weights into the network's encoder, e.g. a ResNet-50 classifier into a DeepLabV3 with a ResNet-50 encoder.
    The Explainer then starts with features that know the classes, and learns far faster than from random weights; at inference it
    remains a network of its own.

    Tensors with the same names (up to timm's and smp's changes of names) and shapes are copied. Where names differ, as between
    torchvision and timm, layers are paired by what flows through them (:mod:`explainer.models.flow`), which proves that the encoder
    computes the classifier's features.

    Returns:
        Number of tensors copied.

    Raises:
        ConfigError: it is another architecture.
    """
    inner = encoder_of(network)
    if inner is None:
        raise ConfigError(f"{type(network).__name__} has no encoder to initialise; set explainer.init_encoder to false.")
    own = inner.state_dict()
    found = _same_names(own, classifier.state_dict())
    whole = _undilated(network)
    if 2 * len(found) >= len(own):
        inner.load_state_dict({**own, **found})
        if whole is not None and len(found) == len(own):
            _check_features(whole, inner, classifier)
        return len(found)
    if whole is None:
        raise ConfigError(
            f"explainer.init_encoder: only {len(found)} of the encoder's {len(own)} tensors exist in the classifier with the same name and "
            "shape. Choose an encoder of the classifier's own architecture, or set explainer.init_encoder to false."
        )
    copy_by_flow(whole, classifier, f"explainer.init_encoder ({network.encoder_name})")
    filled = whole.state_dict()
    inner.load_state_dict({name: filled[name] for name in own})
    return len(own)


def _same_names(own: dict[str, Tensor], source: dict[str, Tensor]) -> dict[str, Tensor]:
    """The classifier's tensors under the encoder's names."""
    plain = {plain_name(name): value for name, value in source.items()}
    pairs = {name: source.get(name, plain.get(plain_name(name))) for name in own}
    return {name: value for name, value in pairs.items() if value is not None and value.shape == own[name].shape}


def _undilated(network: nn.Module) -> nn.Module | None:
    """The network's encoder anew, as the library builds it without a decoder's dilation: only so its features are the classifier's."""
    name = getattr(network, "encoder_name", None)
    if name is None:
        return None
    from segmentation_models_pytorch.encoders import get_encoder

    with torch.random.fork_rng():
        encoder: nn.Module | None = get_encoder(name, weights=None, depth=5)
        return encoder


def _check_features(whole: nn.Module, inner: nn.Module, classifier: nn.Module) -> None:
    """Warn where the encoder, with all of the classifier's weights, computes something else than the classifier."""
    whole.load_state_dict({**copy.copy(whole.state_dict()), **_same_names(whole.state_dict(), classifier.state_dict())})
    layer = first_difference(whole, classifier)
    if layer is not None:
        log.warning(
            "explainer.init_encoder: the encoder has the classifier's weights and computes other features from the layer %s on (another "
            "padding or epsilon). It starts better from the classifier's own network: --explainer.options.encoder_name auto.",
            layer,
        )
