"""The configuration of ``explainer calibrate`` as a plain dataclass; importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from explainer.config import ClassifierConfig, DataConfig
from explainer.vocabulary import RefineMethod


@dataclass
class CalibrateConfig:
    """Choose the quality score from which explanations are given (``explainer explain --selector``).

    Attributes:
        model: trained Explainer: a .ckpt or an export folder.
        out: JSON file of the selector.
        data: images with ground-truth masks, of the distribution that will be explained.
        split: not the one that was trained on.
        limit: number of images, drawn from the whole split (exchangeable ones: not class by class); null takes all.
        classifier: the Explanandum.
        alpha: bound on the risk.
        kind: marginal (no more than alpha of all explanations are given and bad) or selective (of those given, no more than alpha are bad,
            with confidence 1 - delta).
        delta: probability with which the guarantee of selective may fail.
        least_iou: an explanation is bad if its soft IoU with the ground truth is smaller; null: the loss is 1 - IoU (marginal only).
        fallback: what happens to masks that are not accepted: abstain, or refine (and then abstain).
        classes: predicted (one predicted class per image, drawn at random; bad where the image does not have it): the guarantee for what
            `explainer explain` explains of its own accord. labels (one true label per image): for classes that are known to be there.
        predicted_from: probability from which a class counts as predicted (multi-label), as `explainer explain --threshold`.
        fill: what replaces removed pixels when the quality score is computed; null: the one the Explainer was trained with.
        method: name of the refinement method.
        iterations: number of iterations of the refinement, if it is a search.
        batch_size: images per step.
        seed: random seed of the images and of the class drawn per image.
    """

    model: str = ""
    out: str = "selector.json"
    data: DataConfig = field(default_factory=DataConfig)
    split: Literal["train", "val", "test"] = "val"
    limit: int | None = None
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    alpha: float = 0.1
    kind: Literal["marginal", "selective"] = "marginal"
    delta: float = 0.1
    least_iou: float | None = 0.5
    fallback: Literal["abstain", "refine"] = "abstain"
    classes: Literal["predicted", "labels"] = "predicted"
    predicted_from: float = 0.5
    fill: Literal["mean", "black", "grey", "white", "blur", "noise"] | None = None
    method: RefineMethod = "extremal_perturbation"
    iterations: int = 24
    batch_size: int = 50
    seed: int = 0
