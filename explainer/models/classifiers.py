"""Builders of classifiers that become Explananda: the paper's VGG-16 and ResNet-50, a small net for the quickstart, timm's, your own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from explainer.errors import CheckpointError, ConfigError, ExplainerError, UnknownNameError
from explainer.models.pretrained import LITE_BUILDERS


class SmallVGG(nn.Module):
    """VGG-style: 3x3 convolutions with BatchNorm and ReLU, max pooling after each stage but the last, global average pooling, one
    linear layer. 0.4 M parameters by default; the last feature map of a 64 px image is 8x8.

    Args:
        num_classes: number of classes K.
        widths: channels per stage (two convolutions each).
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] | list[int] = (32, 64, 96, 128)) -> None:
        super().__init__()
        if not widths:
            raise ConfigError("small_vgg: widths must hold the channels of at least one stage, received none.")
        layers: list[nn.Module] = []
        channels = 3
        for stage, width in enumerate(widths):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
            if stage < len(widths) - 1:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[B,3,H,W]`` -> logits ``[B,K]``."""
        logits: Tensor = self.head(torch.flatten(self.avgpool(self.features(images)), 1))
        return logits


def vgg16(
    num_classes: int, weights: str | None = None, freeze_features: bool = True, dropout: float = 0.5, name: str = "vgg16"
) -> nn.Module:
    """Torchvision's VGG-16 (or the VGG called ``name``) with a new MLP head; the convolutions are frozen as in Stalder et al. 2022 when
    pretrained weights are given.

    Args:
        weights: a torchvision weights name such as "IMAGENET1K_V1", or None for random weights (nothing is frozen then).
    """
    net = _torchvision(name, weights)
    net.classifier = nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(4096, num_classes),
    )
    if weights is not None and freeze_features:
        net.features.requires_grad_(False)
    built: nn.Module = net
    return built


def resnet50(num_classes: int, weights: str | None = None) -> nn.Module:
    """Torchvision ResNet-50 with a new linear head, all layers trained."""
    net = _torchvision("resnet50", weights)
    net.fc = nn.Linear(net.fc.in_features, num_classes)
    built: nn.Module = net
    return built


#: Activations of Han et al. 2024, Table 4.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}


def cifar_resnet50(num_classes: int, activation: str = "relu") -> nn.Module:
    """ResNet-50 for images of 32 px: a 3x3 stem without stride or pooling, and any of :data:`ACTIVATIONS`; random weights.

    Raises:
        ConfigError: an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation must be one of {', '.join(ACTIVATIONS)}, received {activation!r}.")
    net = _torchvision("resnet50", None)
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out")
    net.fc = nn.Linear(net.fc.in_features, num_classes)
    for module in list(net.modules()):
        for child, inner in list(module.named_children()):
            if isinstance(inner, nn.ReLU):
                setattr(module, child, ACTIVATIONS[activation]())
    built: nn.Module = net
    return built


def _from_torchvision(name: str, num_classes: int, weights: Any = None, **options: Any) -> nn.Module:
    """A model of torchvision; with trained weights and another number of classes than theirs, its last layer is a fresh one."""
    if weights is None:
        plain: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
        return plain
    net: nn.Module = _torchvision(name, weights, **options)
    path, layer = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    if len(layer.weight) == num_classes:
        return net
    fresh: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        fresh = nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
    else:  # SqueezeNet's
        fresh = nn.Conv2d(layer.in_channels, num_classes, kernel_size=1, bias=layer.bias is not None)
    nn.init.normal_(fresh.weight, std=0.01)
    if fresh.bias is not None:
        nn.init.zeros_(fresh.bias)
    parent, _, own = path.rpartition(".")
    setattr(net.get_submodule(parent), own, fresh)
    return net


def _torchvision(name: str, weights: Any, **options: Any) -> Any:
    if isinstance(weights, str) and name in models.list_models():
        known = list(models.get_model_weights(name).__members__)
        if weights.rpartition(".")[2] not in known:
            raise UnknownNameError(f"torchvision has no weights {weights!r} of {name}. It has {', '.join(known)}.")
    try:
        return models.get_model(name, weights=weights, **options)
    except (OSError, ValueError, KeyError) as error:
        hub = torch.hub.get_dir()
        raise CheckpointError(
            f"pretrained weights {weights!r} of {name} could not be obtained ({error}). Without network, download the file that "
            f"torchvision names for {name} elsewhere and put it into {hub}/checkpoints, or set weights: null to start from scratch."
        ) from error


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "small_vgg": SmallVGG,
    "vgg16": vgg16,
    "vgg19": partial(vgg16, name="vgg19"),
    "resnet50": resnet50,
    "cifar_resnet50": cifar_resnet50,
    **LITE_BUILDERS,
}


def build_classifier(arch: str, num_classes: int, **options: Any) -> nn.Module:
    """A classifier by name.

    Args:
        arch: one of :data:`BUILDERS`; ``torchvision:<model>`` or ``timm:<model>`` (options go to the library's builder); or the import
            path of your own callable, ``package.module:function``, called with ``num_classes`` and the options.
        num_classes: number of classes K.

    Raises:
        UnknownNameError: no such builder, library model or import path.
    """
    prefix, _, rest = arch.partition(":")
    if arch in BUILDERS:
        builder = BUILDERS[arch]
    elif prefix == "torchvision" and rest:
        builder = partial(_from_torchvision, rest)
    elif prefix == "timm" and rest:
        import timm

        builder = lambda num_classes, **kw: timm.create_model(rest, num_classes=num_classes, **kw)  # noqa: E731
    elif rest:
        try:
            builder = getattr(importlib.import_module(prefix), rest)
        except (ImportError, AttributeError) as error:
            raise UnknownNameError(
                f"classifier {arch!r} cannot be imported ({error}): check the path, or add its folder to PYTHONPATH."
            ) from error
    else:
        raise UnknownNameError(
            f"unknown classifier {arch!r}. Known: {', '.join(BUILDERS)}; or torchvision:<model>, timm:<model>, package.module:function."
        )
    try:
        return builder(num_classes=num_classes, **options)
    except ExplainerError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, OSError) as error:
        raise ConfigError(f"classifier {arch!r} could not be built with options {options}: {error}") from error
