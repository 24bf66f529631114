"""Classifier and Explainer as one model: an image goes in, what is in it and where the evidence lies comes out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.models.scores import logits_of


class FusedExplainer(nn.Module):
    """Images ``[B,3,H,W]`` in [0,1] -> the tensors named by :attr:`outputs`; all preprocessing inside.

    ``probabilities`` ``[B,K]``, ``masks`` ``[B,K,H,W]``, ``merged`` ``[B,H,W]`` and ``areas`` ``[B,K]``. ``merged`` is the maximum over the
    masks of the predicted classes: those with probability >= ``threshold`` (multi-label; 0 everywhere if there is none), or the most
    probable one (single-label; the first of ties). ``areas`` is the mean of each class mask.

    With ``top`` only the masks of each image's ``top`` most probable classes are computed, so that the cost does not grow with K:
    ``probabilities`` ``[B,K]``, ``classes`` ``[B,top]`` (the most probable first), ``masks`` ``[B,top,H,W]`` in that order, ``merged`` of
    the predicted ones among them, ``areas`` ``[B,top]``.

    With a shared encoder, one pass through the classifier serves both. Its masks can be left at the decoder's resolution ``[h,w]``
    (``full_size=False``; bilinear enlargement is then up to whoever shows them): of a small classifier, writing and enlarging 20 masks
    costs half of the classification.

    Args:
        explainer: trained for this classifier: its stored fingerprint, if any, is checked.
        explanandum: the classifier.
        threshold: least probability of a predicted class, multi-label only.
        top: number of classes, or None for all.
        full_size: masks have the image's resolution.

    Raises:
        FingerprintMismatchError: the Explainer was trained for another classifier.
        ConfigError: they differ in classes, ``top`` is not in 1..K, or the decoder's resolution is wanted of an Explainer with an encoder
            of its own.
    """

    def __init__(
        self, explainer: Explainer, explanandum: Explanandum, threshold: float = 0.5, top: int | None = None, full_size: bool = True
    ) -> None:
        super().__init__()
        if explainer.num_classes != explanandum.num_classes:
            raise ConfigError(f"the Explainer has {explainer.num_classes} classes, the classifier {explanandum.num_classes}.")
        if top is not None and not 1 <= top <= explainer.num_classes:
            raise ConfigError(f"top must lie in 1..{explainer.num_classes}, the number of classes, received {top}.")
        expected = explainer.metadata.get("fingerprint")
        if expected is not None:
            explanandum.require_fingerprint(expected, "this Explainer")
        self.explainer, self.explanandum, self.threshold, self.top = explainer, explanandum, threshold, top
        self.one_pass, self.full_size = _same_input(explainer, explanandum), full_size
        if not full_size and not self.one_pass:
            raise ConfigError("masks at the decoder's resolution need a shared encoder (explainer.encoder: shared) and its own classifier.")
        self.eval()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names, in order."""
        return ("probabilities", *(() if self.top is None else ("classes",)), "masks", "merged", "areas")

    def scores(self, images: Tensor) -> Tensor:
        """The classifier's logits ``[B,K]``."""
        e = self.explanandum
        if e.input_size is not None:
            # Always resized: a comparison of sizes would become a condition on the exported graph; at equal size it changes nothing.
            images = F.interpolate(images, size=(e.input_size, e.input_size), mode="bilinear", align_corners=False)
        return logits_of(e.classifier(e.normalize(images)), e.num_classes)

    def choose(self, logits: Tensor) -> Tensor | None:
        """Classes ``[B,top]`` of logits ``[B,K]``; None: all."""
        return None if self.top is None else logits.topk(self.top, dim=1).indices

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images ``[B,3,H,W]`` in [0,1] -> the outputs that the class lists, in their order."""
        if self.one_pass:
            logits, classes, maps = self.explainer.with_scores(images, self.choose, self.full_size)
        else:
            logits = self.scores(images)
            classes = self.choose(logits)
            maps = self.explainer.logits(images, classes)
        probabilities, masks = self.explanandum.probabilities(logits), maps.sigmoid()
        own = probabilities if classes is None else probabilities.gather(1, classes)
        if self.explanandum.task == "multilabel":
            predicted = (own >= self.threshold).to(masks.dtype)
            merged = (masks * predicted[:, :, None, None]).amax(dim=1)
        elif classes is not None:
            merged = masks[:, 0]
        else:
            predicted = F.one_hot(own.argmax(dim=1), masks.shape[1]).to(masks.dtype)
            merged = torch.matmul(predicted[:, None], masks.flatten(2))[:, 0].unflatten(1, masks.shape[-2:])
        areas = masks.mean(dim=(2, 3))
        return (probabilities, masks, merged, areas) if classes is None else (probabilities, classes, masks, merged, areas)


def _same_input(explainer: Explainer, explanandum: Explanandum) -> bool:
    """The Explainer reads this very classifier's features of this very input."""
    own = explainer.explanandum
    if own is None or own.input_size != explanandum.input_size:
        return False
    pairs = ((explainer.mean, explanandum.mean), (explainer.std, explanandum.std))
    same = all(torch.allclose(a.reshape(-1), b.to(a).reshape(-1).expand(a.numel())) for a, b in pairs)
    return same and (own is explanandum or own.fingerprint() == explanandum.fingerprint())
