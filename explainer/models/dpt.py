"""DPT (Ranftl et al., ICCV 2021): an Explainer on the encoder of a vision transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class DPT(nn.Module):
    """Dense prediction transformer of segmentation-models-pytorch on one of timm's vision transformers, for images of any size.

    Its encoder is timm's own network under timm's own names, so that a timm classifier of the same architecture can initialise it
    (``explainer.init_encoder``). Position embeddings are resampled to the image's grid.

    Args:
        num_classes: number of classes K.
        encoder_name: ``tu-`` and a vision transformer of timm.
        encoder_weights: None, or anything else for timm's pretrained weights.
        options: ``decoder_intermediate_channels``, ``decoder_fusion_channels``, ``decoder_readout``, ``encoder_depth``; others go to timm
            (``img_size`` must be the classifier's for its position embeddings to fit).
    """

    def __init__(
        self, num_classes: int, encoder_name: str = "tu-vit_base_patch16_224", encoder_weights: str | None = None, **options: Any
    ) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        options = {"decoder_readout": "ignore", "dynamic_img_size": True, **options}
        self.net = smp.DPT(encoder_name=encoder_name, encoder_weights=encoder_weights, classes=num_classes, **options)

    @property
    def encoder(self) -> nn.Module:
        """The vision transformer itself, as timm builds it."""
        encoder: nn.Module = self.net.encoder.model
        return encoder

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[B,3,H,W]``, H and W multiples of twice the patch size -> logits ``[B,K,H,W]``."""
        logits: Tensor = self.net(images)
        return logits
