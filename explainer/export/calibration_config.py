"""The configuration of ``explainer calibrate`` as a plain dataclass; importing it does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from explainer.config import ClassifierConfig, DataConfig


@dataclass
class CalibrateConfig:
    """Choose the quality score from which explanations are given (``explainer explain --selector``).

    Attributes:
        model: trained Explainer: a .ckpt or an export folder.
        out: JSON file of the selector.
        data: images with ground-truth masks, of the distribution that will be explained.
        split: not the one that was trained on.
        limit: number of images, from the start of the split; null takes all.
        classifier: the Explanandum.
        alpha: bound on the risk.
        kind: marginal (no more than alpha of all explanations are given and bad) or selective (of those given, no more than alpha are bad,
            with confidence 1 - delta).
        delta: of selective.
        least_iou: an explanation is bad if its soft IoU with the ground truth is smaller; null: the loss is 1 - IoU (marginal only).
        fallback: what happens to masks that are not accepted: abstain, or refine (and then abstain).
        fill: of the quality score.
        method: of the refinement.
        iterations: of the refinement.
        batch_size: images per step.
        seed: of the label drawn per image.
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
    fill: Literal["mean", "black", "grey", "white", "blur", "noise"] = "mean"
    method: Literal["extremal_perturbation", "igos_pp"] = "extremal_perturbation"
    iterations: int = 24
    batch_size: int = 50
    seed: int = 0
