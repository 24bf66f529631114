"""Which pixels of a training batch are removed, as ``classifier.occlusion`` says."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from explainer.attribution import Attributor
from explainer.baselines import build
from explainer.config import ClassifierConfig, OcclusionConfig
from explainer.models.explanandum import Explanandum
from explainer.models.occlusion import cutout_squares, hide_and_seek_grid, random_masks, salient_squares
from explainer.tasks.draws import Draws
from explainer.tensors import Batch


class Occluder:
    """Masks ``[B,H,W]`` in {0,1} for a batch, 1 keeps. No module: it holds the classifier that is trained, and is no part of the
    checkpoint.

    Args:
        config: configuration of the classifier; its mean and std are numbers.
        classifier: the network in training; ``saliency`` reads it in eval mode and leaves it as it was.
        num_classes: number of classes K.
        task: ``multilabel`` or ``multiclass``.
    """

    def __init__(
        self, config: ClassifierConfig, classifier: nn.Module, num_classes: int, task: Literal["multilabel", "multiclass"]
    ) -> None:
        self.config, self.classifier, self.num_classes, self.task = config, classifier, num_classes, task
        self._norm_grad: Attributor | None = None

    def __call__(self, batch: Batch, draws: Draws) -> Tensor:
        """The masks; every image's own random numbers."""
        o = self.config.occlusion
        if o.kind == "saliency":
            return self._salient(batch, draws)
        return torch.cat([_one_mask(o, (batch.images.shape[-2], batch.images.shape[-1]), g) for g in draws.each])

    def _salient(self, batch: Batch, draws: Draws) -> Tensor:
        """0 on the square that matters most to one of the image's labels; an image without a label stays whole."""
        o, c = self.config.occlusion, self.config
        if self._norm_grad is None:
            assert c.mean is not None and c.std is not None
            wrapped = Explanandum(self.classifier, self.num_classes, self.task, mean=c.mean, std=c.std, input_size=c.input_size)
            self._norm_grad = build("norm_grad", wrapped, layer=o.layer)
        # One label of an image, drawn evenly: the largest of uniform numbers.
        among = batch.targets.cpu() * (draws.uniform(batch.targets.shape[1]) + 1)
        saliency = self._norm_grad(batch.images, among.argmax(1).to(batch.images.device))
        masks = salient_squares(saliency, draws.each, o.side, o.jitter)
        masks[among.amax(1) == 0] = 1.0
        return masks


def _one_mask(o: OcclusionConfig, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """``[1,H,W]``."""
    if o.kind == "cutout_squares":
        return cutout_squares(1, size, generator, o.squares, o.side)
    if o.kind == "hide_and_seek_grid":
        return hide_and_seek_grid(1, size, generator, o.grid, o.keep)
    assert o.kind != "saliency"
    return random_masks(1, size, generator, o.kind, o.max_share)
