"""Segmentation networks an Explainer can be made of: any architecture and encoder of segmentation-models-pytorch, and torchvision's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from explainer.attribution.stages import Stage
from explainer.errors import CheckpointError, ConfigError, UnknownNameError
from explainer.models.class_layer import with_class_layer
from explainer.models.classifiers import SmallVGG
from explainer.models.dpt import DPT
from explainer.models.shared import FeatureDecoder

_SMP = {
    "deeplabv3": "DeepLabV3",
    "deeplabv3plus": "DeepLabV3Plus",
    "unet": "Unet",
    "fpn": "FPN",
    "linknet": "Linknet",
    "manet": "MAnet",
    "pan": "PAN",
    "pspnet": "PSPNet",
    "segformer": "Segformer",
    "upernet": "UPerNet",
}


class _TorchvisionDeepLab(nn.Module):
    """torchvision's DeepLabV3-ResNet50 without the dictionary around its output. The auxiliary head is left out: unused
    parameters would stop DistributedDataParallel.
    """

    def __init__(self, num_classes: int, weights_backbone: str | None = None) -> None:
        super().__init__()
        from torchvision.models.segmentation import deeplabv3_resnet50

        self.net = deeplabv3_resnet50(weights=None, weights_backbone=weights_backbone, num_classes=num_classes, aux_loss=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images -> logits ``[B,K,H,W]``."""
        logits: Tensor = self.net(images)["out"]
        return logits


class VGGUNet(nn.Module):
    """A U-Net on the encoder of :class:`~explainer.models.classifiers.SmallVGG`: skips from every resolution, full-resolution masks.

    Args:
        num_classes: number of classes K.
        widths: channels per encoder stage, as in the classifier it may be initialised from.
        decoder_channels: per decoder stage, one fewer than encoder stages.
    """

    def __init__(
        self,
        num_classes: int,
        widths: tuple[int, ...] | list[int] = (32, 64, 96, 128),
        decoder_channels: tuple[int, ...] | list[int] = (64, 48, 32),
    ) -> None:
        super().__init__()
        if len(decoder_channels) != len(widths) - 1:
            raise ValueError(f"decoder_channels needs {len(widths) - 1} entries for {len(widths)} widths, received {len(decoder_channels)}")
        self.encoder = nn.Module()
        self.encoder.features = SmallVGG(num_classes, widths).features
        self.decoder = nn.ModuleList()
        channels = widths[-1]
        for skip, width in zip(reversed(widths[:-1]), decoder_channels, strict=True):
            block = [nn.Conv2d(channels + skip, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            self.decoder.append(nn.Sequential(*block))
            channels = width
        self.head = nn.Conv2d(channels, num_classes, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images -> logits ``[B,K,H,W]``."""
        skips: list[Tensor] = []
        x = images
        for layer in self.encoder.features:  # type: ignore[union-attr]
            if isinstance(layer, nn.MaxPool2d):
                skips.append(x)
            x = layer(x)
        for block in self.decoder:
            skip = skips.pop()
            x = block(torch.cat([nn.functional.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1))
        logits: Tensor = self.head(x)
        return logits


class VGGDeepLab(nn.Module):
    """DeepLabV3+ on the encoder of :class:`~explainer.models.classifiers.SmallVGG`: an atrous pyramid on its last stage, and the two finest
    stages on the way up (one in Chen et al., ECCV 2018; two in Panoptic-DeepLab, Cheng et al., CVPR 2020). Full-resolution masks.

    Args:
        num_classes: number of classes K.
        widths: channels per encoder stage, as in the classifier it may be initialised from.
        decoder_channels: numbers of channels of the pyramid and of the way up.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] | list[int] = (32, 64, 96, 128), decoder_channels: int = 64) -> None:
        super().__init__()
        if len(widths) < 3:
            raise ValueError(f"widths needs at least 3 entries, received {list(widths)}")
        self.encoder = nn.Module()
        self.encoder.features = SmallVGG(num_classes, widths).features
        stages = [Stage("", 1, widths[0]), Stage("", 2, widths[1]), Stage("", 2 ** (len(widths) - 1), widths[-1])]
        self.decoder = FeatureDecoder(stages, decoder_channels, "panoptic_deeplab")
        self.head = nn.Conv2d(decoder_channels, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images -> logits ``[B,K,H,W]``."""
        finest: list[Tensor] = []
        x = images
        for layer in self.encoder.features:  # type: ignore[union-attr]
            if isinstance(layer, nn.MaxPool2d) and len(finest) < 2:
                finest.append(x)
            x = layer(x)
        logits: Tensor = self.head(self.decoder([*finest, x]))
        return logits


def network_names() -> list[str]:
    """Names accepted by :func:`build_network`."""
    return [*_SMP, "dpt", "torchvision_deeplabv3", "vgg_deeplab", "vgg_unet"]


def _build(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    if name == "torchvision_deeplabv3":
        return _TorchvisionDeepLab(num_classes, **options)
    if name == "vgg_deeplab":
        return VGGDeepLab(num_classes, **options)
    if name == "vgg_unet":
        return VGGUNet(num_classes, **options)
    if name == "dpt":
        return drop_unused(DPT(num_classes, **options))
    if name not in _SMP:
        raise UnknownNameError(f"unknown Explainer network {name!r}. Known: {', '.join(network_names())}.")
    import segmentation_models_pytorch as smp

    chosen = {"encoder_name": "resnet34", "encoder_weights": None, **options}
    network = drop_unused(getattr(smp, _SMP[name])(classes=num_classes, **chosen))
    network.encoder_name = chosen["encoder_name"]
    return network


def build_network(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network from normalised images ``[B,3,H,W]`` to logits ``[B,K,h,w]``.

    Args:
        name: name of the network; see :func:`network_names`.
        num_classes: number of classes K.
        options: passed to the library (``encoder_name``, ``encoder_weights``, ``decoder_channels``, ...); encoder_weights is None by
            default, that is random.
    """
    try:
        return with_class_layer(_build(name, num_classes, options), num_classes)
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"network {name!r} could not be built with options {options}: {error}") from error
    except (OSError, ConnectionError) as error:
        raise CheckpointError(
            f"pretrained encoder weights for {name!r} could not be obtained ({error}). Without network, put the file into "
            f"{torch.hub.get_dir()}/checkpoints (or the Hugging Face cache), or set encoder_weights: null to train from scratch."
        ) from error


def encoder_of(network: nn.Module) -> nn.Module | None:
    """The part that turns the image into features; None for a network without such a part."""
    return getattr(network, "encoder", None) or getattr(getattr(network, "net", None), "backbone", None)


def drop_unused(network: nn.Module, side: int = 64) -> nn.Module:
    """Replace every submodule whose parameters cannot influence the output by an identity, in place; returns the network.

    Encoders of segmentation-models-pytorch keep the stages below ``encoder_depth`` and their classification heads. They would stop
    DistributedDataParallel ("unused parameters") and fill three quarters of a file. Which they are is asked of autograd, on one random
    image in eval mode; a network that cannot be asked is left as it is. Weights saved before still load: the dropped ones are ignored.

    Args:
        network: maps normalised images to logits.
        side: pixels of the probe image, a multiple of every stride.
    """
    training, required = network.training, {name: p.requires_grad for name, p in network.named_parameters()}
    network.eval().requires_grad_(True)
    used: set[int] = set()
    try:
        with torch.enable_grad():
            parameters = list(network.parameters())
            example = torch.zeros(1, 3, side, side, dtype=parameters[0].dtype, device=parameters[0].device)
            gradients = torch.autograd.grad(network(example).sum(), parameters, allow_unused=True)
        used = {id(p) for p, g in zip(parameters, gradients, strict=True) if g is not None}
    except RuntimeError:
        used = {id(p) for p in network.parameters()}
    finally:
        network.train(training)
        for name, p in network.named_parameters():
            p.requires_grad_(required[name])
    dropped: list[str] = []
    for name, module in list(network.named_modules()):
        own = list(module.parameters())
        covered = any(name.startswith(above + ".") for above in dropped)
        if name and own and not covered and not any(id(p) in used for p in own):
            parent = network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], nn.Identity())
            dropped.append(name)
    if dropped:
        network.register_load_state_dict_pre_hook(functools.partial(_forget, dropped=tuple(dropped)))
    return network


def _forget(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, dropped: tuple[str, ...]) -> None:
    """Remove the entries of dropped submodules from a state that is about to be loaded."""
    starts = tuple(f"{prefix}{name}." for name in dropped)
    for key in [k for k in state if k.startswith(starts)]:
        del state[key]
