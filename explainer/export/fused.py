"""Classifier and Explainer as one model: an image goes in, what is in it and where the evidence lies comes out."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum


class FusedExplainer(nn.Module):
    """Images ``[B,3,H,W]`` in [0,1] -> ``(probabilities [B,K], masks [B,K,H,W], merged [B,H,W], areas [B,K])``; all preprocessing inside.

    ``merged`` is the maximum over the masks of the predicted classes: those with probability >= ``threshold`` (multi-label; 0 everywhere
    if there is none), or the most probable one (single-label; the first of ties). ``areas`` is the mean of each class mask.

    Args:
        explainer: trained for this classifier: its stored fingerprint, if any, is checked.
        explanandum: the classifier.
        threshold: of the probabilities, multi-label only.

    Raises:
        FingerprintMismatchError: the Explainer was trained for another classifier.
        ConfigError: they differ in classes.
    """

    outputs: ClassVar[tuple[str, ...]] = ("probabilities", "masks", "merged", "areas")

    def __init__(self, explainer: Explainer, explanandum: Explanandum, threshold: float = 0.5) -> None:
        super().__init__()
        if explainer.num_classes != explanandum.num_classes:
            raise ConfigError(f"the Explainer has {explainer.num_classes} classes, the classifier {explanandum.num_classes}.")
        expected = explainer.metadata.get("fingerprint")
        if expected is not None:
            explanandum.require_fingerprint(expected, "this Explainer")
        self.explainer, self.explanandum, self.threshold = explainer, explanandum, threshold
        self.eval()

    def probabilities(self, images: Tensor) -> Tensor:
        """``[B,K]`` in [0,1]."""
        e = self.explanandum
        if e.input_size is not None:
            # Always resized: a comparison of sizes would become a condition on the exported graph; at equal size it changes nothing.
            images = F.interpolate(images, size=(e.input_size, e.input_size), mode="bilinear", align_corners=False)
        return e.probabilities(e.classifier(e.normalize(images)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        probabilities, masks = self.probabilities(images), self.explainer(images)
        if self.explanandum.task == "multilabel":
            predicted = (probabilities >= self.threshold).to(masks.dtype)
        else:
            predicted = F.one_hot(probabilities.argmax(dim=1), masks.shape[1]).to(masks.dtype)
        merged = (masks * predicted[:, :, None, None]).amax(dim=1)
        return probabilities, masks, merged, masks.mean(dim=(2, 3))
