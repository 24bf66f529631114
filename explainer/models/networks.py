"""Segmentation networks an Explainer can be made of: any architecture and encoder of segmentation-models-pytorch, and torchvision's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from explainer.errors import CheckpointError, ConfigError, UnknownNameError

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
        from torchvision.models.segmentation import deeplabv3_resnet50  # noqa: TID251 - this package builds networks

        self.net = deeplabv3_resnet50(weights=None, weights_backbone=weights_backbone, num_classes=num_classes, aux_loss=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images -> logits ``[B,K,H,W]``."""
        return self.net(images)["out"]


def network_names() -> list[str]:
    """Names accepted by :func:`build_network`."""
    return [*_SMP, "torchvision_deeplabv3"]


def build_network(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network from normalised images ``[B,3,H,W]`` to logits ``[B,K,h,w]``.

    Args:
        name: see :func:`network_names`.
        num_classes: K.
        options: passed to the library (``encoder_name``, ``encoder_weights``, ``decoder_channels``, ...); encoder_weights is None by
            default, that is random.
    """
    try:
        if name == "torchvision_deeplabv3":
            return _TorchvisionDeepLab(num_classes, **options)
        if name not in _SMP:
            raise UnknownNameError(f"unknown Explainer network {name!r}. Known: {', '.join(network_names())}.")
        import segmentation_models_pytorch as smp

        return getattr(smp, _SMP[name])(classes=num_classes, **{"encoder_weights": None, **options})
    except (TypeError, ValueError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"network {name!r} could not be built with options {options}: {error}") from error
    except (OSError, ConnectionError) as error:
        raise CheckpointError(
            f"pretrained encoder weights for {name!r} could not be obtained ({error}). Without network, put the file into "
            f"{torch.hub.get_dir()}/checkpoints (or the Hugging Face cache), or set encoder_weights: null to train from scratch."
        ) from error
