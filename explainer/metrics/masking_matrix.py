"""Class-specific masking: what remains of class t when the image is reduced to the mask of class k. Stalder et al., 2022, Table 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.errors import ConfigError, ShapeError
from explainer.fills import FillKind, blend
from explainer.metrics.base import ImageMean
from explainer.metrics.classifier import Classifier, Output, class_outputs, removal_fill
from explainer.metrics.facts import Facts
from explainer.metrics.ground_truth import THRESHOLDS
from explainer.tensors import min_max


def masking_scores(
    explanandum: Classifier,
    images: Tensor,
    class_masks: Tensor,
    targets: Tensor,
    *,
    classes: Sequence[int] | None = None,
    rescale: bool = False,
    thresholds: Sequence[float] = THRESHOLDS,
    fill: FillKind | Tensor = "mean",
    output: Output = "softmax",
) -> Tensor:
    """One matrix per image, ``[B,T,T+1]``, for the T chosen classes.

    Args:
        explanandum: classifier with K classes.
        images: ``[B,3,H,W]`` in [0,1].
        class_masks: ``[B,K,H,W]``; in [0,1], or any range with ``rescale``.
        targets: ``[B,K]`` multi-hot.
        classes: T class numbers; None: all K.
        rescale: min-max rescale every class mask first (the paper does so for its competitors only: report both).
        thresholds: a pixel is kept where its mask value lies strictly above.
        fill: replaces the rest.
        output: softmax in the paper.

    Returns:
        Entry (t, k): mean over thresholds of the output of class t on the image cut to mask k; the last column ("none") is the output on
        the whole image. Rows of classes that the image does not contain are NaN, and so are columns of masks with NaN.
    """
    if class_masks.ndim != 4 or class_masks.shape[:2] != targets.shape:
        raise ShapeError(f"class_masks is {tuple(class_masks.shape)}, expected (B,K,H,W) with targets (B,K) = {tuple(targets.shape)}.")
    chosen = torch.arange(targets.shape[1]) if classes is None else torch.tensor(list(classes), dtype=torch.long)
    chosen = chosen.to(images.device)
    masks = class_masks[:, chosen]
    masks = (min_max(masks) if rescale else masks).double()
    background = removal_fill(explanandum, images, fill)
    columns = []
    for mask in masks.unbind(1):
        kept = [
            class_outputs(explanandum, blend(images, (mask > threshold).to(images), background), output)[:, chosen].double()
            for threshold in thresholds
        ]
        unknown = mask.flatten(1).isnan().any(1)
        columns.append(torch.stack(kept).mean(0).masked_fill(unknown[:, None], torch.nan))
    columns.append(class_outputs(explanandum, images, output)[:, chosen].double())
    matrix = torch.stack(columns, dim=2)
    absent = targets[:, chosen] <= 0
    return matrix.masked_fill(absent[:, :, None], torch.nan)


def masking_contrast(matrix: Tensor) -> Tensor:
    """Own mask minus the mean of the foreign masks, averaged over an image's classes.

    ``[B,T,T+1] -> [B]`` in [-1,1]; NaN for an image without classes, and with T = 1.
    """
    own = matrix.diagonal(dim1=1, dim2=2)
    number = matrix.shape[1]
    # The column "none" is no mask. With one class there is no foreign mask: 0/0 is NaN.
    foreign = (matrix[:, :, :number].sum(2) - own) / (number - 1)
    return (own - foreign).nanmean(1)


@Facts("masking_contrast", higher_is_better=True, bounds=(-1.0, 1.0), optimum=1.0)
def image_contrast(
    explanandum: Classifier,
    images: Tensor,
    class_masks: Tensor,
    targets: Tensor,
    *,
    rescale: bool = False,
    fill: FillKind | Tensor = "mean",
    output: Output = "softmax",
) -> Tensor:
    """:func:`masking_contrast` of :func:`masking_scores`: one number for the matrix, ``[B]`` in [-1,1]."""
    return masking_contrast(masking_scores(explanandum, images, class_masks, targets, rescale=rescale, fill=fill, output=output))


class MaskingMatrix(ImageMean):
    """Mean :func:`masking_scores` over the images of each class, in percent: ``[T,T+1]``, NaN rows for classes without images.

    A good method has a diagonal near the last column and small entries elsewhere. Range [0,100]. It is a class and no function because the
    number of classes decides the shape of its state.

    Args:
        num_classes: number of classes K.
        classes: the T classes of the matrix; None: all K.
        rescale: min-max rescale every class mask first.
        fill: replaces the removed pixels.
        output: what is read from the classifier.
        kwargs: arguments of :class:`torchmetrics.Metric`.
    """

    name = "masking_matrix"
    higher_is_better = None
    bounds = (0.0, 100.0)
    optimum = None

    def __init__(
        self,
        num_classes: int,
        classes: Sequence[int] | None = None,
        rescale: bool = False,
        fill: FillKind = "mean",
        output: Output = "softmax",
        **kwargs: Any,
    ) -> None:
        chosen = tuple(range(num_classes) if classes is None else classes)
        if not chosen or min(chosen) < 0 or max(chosen) >= num_classes:
            raise ConfigError(f"classes must be a list of numbers in 0..{num_classes - 1}, received {classes}.")
        key = f"masking_matrix of {chosen}, rescale={rescale}, fill={fill}, output={output}"
        super().__init__((len(chosen), len(chosen) + 1), key=key, **kwargs)
        self.classes, self.rescale = chosen, rescale
        self.fill: FillKind = fill
        self.output: Output = output

    def values(self, explanandum: Classifier, images: Tensor, class_masks: Tensor, targets: Tensor) -> Tensor:
        """:func:`masking_scores` in percent, ``[B,T,T+1]``."""
        return 100 * masking_scores(
            explanandum, images, class_masks, targets, classes=self.classes, rescale=self.rescale, fill=self.fill, output=self.output
        )
