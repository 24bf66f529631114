"""Predictions from binarised activations: Figure 6 of Han et al., ICLR 2024 (SRD). A property of the classifier, not of a method."""

from __future__ import annotations

from typing import Any

import torch

from explainer.attribution.rest import at_rest
from explainer.errors import ConfigError, UnsupportedLayerError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.apop import activation_calls, binarized_call_logits, top_k_hits


class Binarized(Protocol):
    """One row per label of an image: is it recognised when one activation call passes 1 where a unit is active, and 0 elsewhere?

    Calls of a shared module count one by one, in the order of the forward pass. The vectors ``top1`` and ``top5`` hold one entry a
    position. Chance is 1/K and 5/K for K classes.

    Args:
        mode: no differences.
        positions: at least 2, spread evenly from the first call to the last; as many as the classifier makes (VGG-16: 15, ResNet-50: 49)
            are all of them. Of a classifier with fewer, some calls stand at several positions.
    """

    name = "binarized"
    heading = "What one binarised activation leaves"
    question = "Accuracy when one layer passes only which of its units are active."
    source = "Han et al. 2024, Figure 6"
    uses_maps = False

    def __init__(self, mode: Mode = "corrected", positions: int = 15) -> None:
        super().__init__(mode)
        if positions < 2:
            raise ConfigError(f"binarized: positions must be at least 2, received {positions}.")
        self.positions = positions

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Where a call stands: 0 is the first, 1 the last."""
        return {name: [round(i / (self.positions - 1), 4) for i in range(self.positions)] for name in ("top1", "top5")}

    def columns(self) -> dict[str, Column]:
        """Top-1 and top-5 accuracy: at the first call, and the mean of all positions."""
        return {f"{which}_top{k}": Column(f"{which}, top-{k}", True, percent=True) for which in ("first", "mean") for k in (1, 5)}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Hits of the label when one activation is binarised, by its position: one row per image and label."""
        rows, classes = scene.labels.nonzero(as_tuple=True)
        if len(rows) == 0:
            return []
        model = scene.explanandum
        size = getattr(model, "input_size", None)
        images = scene.images
        if size is not None and images.shape[-2:] != (size, size):
            images = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        with at_rest(model):
            given = model.normalize(images)
            count = activation_calls(model.classifier, given)
            if count == 0:
                raise UnsupportedLayerError("binarized: the classifier calls no activation that could be binarised.")
            # Integers: a rounded float would choose another call on another machine.
            chosen = [(2 * i * (count - 1) + self.positions - 1) // (2 * (self.positions - 1)) for i in range(self.positions)]
            found = {call: binarized_call_logits(model.classifier, given, call)[rows] for call in dict.fromkeys(chosen)}
            logits = [found[call] for call in chosen]
        labels = classes.to(given.device)
        hits = {k: torch.stack([top_k_hits(y, labels, k) for y in logits], 1).double() for k in (1, 5)}
        values = {f"first_top{k}": v[:, 0] for k, v in hits.items()} | {f"mean_top{k}": v.mean(1) for k, v in hits.items()}
        return scores(rows, classes, values, {f"top{k}": v for k, v in hits.items()})
