"""How much of a class's probability an edit of the image leaves: q of Fong and Vedaldi, ICCV 2017, sections 5.1 to 5.3."""

from __future__ import annotations

import torch
from torch import Tensor

from explainer.fills import make_fill
from explainer.metrics.classifier import Classifier, class_scores

#: Least difference between the untouched and the blurred image's probability; below it q says nothing.
LEAST = 0.01


def fully_blurred(images: Tensor) -> Tensor:
    """Images ``[B,3,H,W]`` under a Gaussian of 10 pixels at 224 (the method's own; it follows the shorter side)."""
    return make_fill(images, "blur", blur_sigma=10 * min(images.shape[-2:]) / 224)


class Suppression:
    """``q(x') = (p(x') - p_b) / (p_0 - p_b)``: 1 for the untouched image, 0 for the fully blurred one.

    Args:
        explanandum: the classifier; p is its probability of the class.
        images: ``[P,3,H,W]``.
        class_index: ``[P]``.
        blurred: what :func:`fully_blurred` returns.
    """

    def __init__(self, explanandum: Classifier, images: Tensor, class_index: Tensor, blurred: Tensor) -> None:
        self.explanandum, self.class_index = explanandum, class_index
        self.whole = class_scores(explanandum, images, class_index).double()
        self.least = class_scores(explanandum, blurred, class_index).double()

    @property
    def undefined(self) -> Tensor:
        """Where blurring everything takes less than 0.01, bool ``[P]``: q is NaN there."""
        return ~(self.whole - self.least >= LEAST)

    def __call__(self, edited: Tensor) -> Tensor:
        """Of edited images ``[P,3,H,W]``: q, ``[P]`` double."""
        p = class_scores(self.explanandum, edited, self.class_index).double()
        return ((p - self.least) / (self.whole - self.least)).masked_fill(self.undefined, torch.nan)
