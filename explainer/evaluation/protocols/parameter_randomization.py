"""Maps of a method while its classifier is randomised from the head down (Adebayo et al., NeurIPS 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.randomize import cascade, scores_only
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.evaluation.verdict import Check, Verdict, bootstrap, column, decide, mean
from explainer.metrics.map_similarity import map_spearman, map_ssim
from explainer.tensors import min_max


class ParameterRandomization(Check):
    """One row per explained class of an image: similarity of its map to those of ever more random classifiers.

    The similarity of a constant map with another is 0, of two constant maps 1, so that a method that falls silent has changed and one
    that never speaks has not.

    Args:
        mode: no differences.
        steps: number of steps of the cascade; the first randomises the head alone, the last everything.
        largest: mean rank correlation that may remain when all parameters are random.
    """

    name = "parameter_randomization"
    heading = "Check: parameter randomisation"
    question = "Do maps change when the classifier's parameters are random?"
    title = "Parameter randomisation"
    source = "Adebayo et al. 2018"

    def __init__(self, mode: Mode = "corrected", steps: int = 5, largest: float = 0.5) -> None:
        super().__init__(mode)
        self.steps, self.largest = steps, largest

    def columns(self) -> dict[str, Column]:
        """Similarity after the head and after everything."""
        return {
            "spearman_head": Column("rank correlation, head random", False, shown=False),
            "spearman_all": Column("rank correlation, all random", False),
            "ssim_head": Column("SSIM, head random", False, shown=False),
            "ssim_all": Column("SSIM, all random", False),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """Steps of the cascade as share of the layers below the head."""
        shares = [round(i / (self.steps - 1), 3) for i in range(self.steps)]
        return {"spearman": shares, "ssim": shares}

    def not_applicable(self, method: Method) -> str | None:
        """Methods that do not hold the classifier (trained Explainers) cannot be randomised through it; the ground truth need not be."""
        if method.needs_truth:
            return "it reads the ground truth, not the classifier"
        if method.holds_classifier:
            return None
        return "it does not compute its maps from the classifier; train it against a randomised one instead (protocol implausible)"

    def unsuited(self, explanandum: Any) -> str | None:
        """A classifier known by its scores alone has no parameters."""
        return scores_only(explanandum)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Similarity of each map to those of randomised classifiers: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        method_seed = maps.generator().initial_seed()
        parts = []
        for part in torch.arange(len(rows)).split(maps.method.batch_size):
            r, k = rows[part], classes[part]
            truth = scene.batch.masks[r] if scene.batch.masks is not None and maps.method.needs_truth else None
            parts.append(
                cascade(maps.method.attributor, scene.images[r], k, steps=self.steps, seed=scene.seed, method_seed=method_seed, masks=truth)
            )
        random, original = torch.cat(parts, dim=1), maps.saliency(rows, classes)
        spearman = torch.stack([_similarity(original, m, ranks=True) for m in random], dim=1)
        ssim = torch.stack([_similarity(original, m, ranks=False) for m in random], dim=1)
        values = {"spearman_head": spearman[:, 0], "spearman_all": spearman[:, -1], "ssim_head": ssim[:, 0], "ssim_all": ssim[:, -1]}
        return scores(rows, classes, values, {"spearman": spearman, "ssim": ssim}, digits=5)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether maps change with the parameters."""
        value = mean(column(rows, "spearman_all"))
        low, high = bootstrap(column(rows, "spearman_all"), [r.index for r in rows])
        steps = np.nanmean([r.vectors["spearman"] for r in rows], axis=0)
        course = ", ".join(f"{v:.2f}" for v in steps)
        sentence = (
            f"Rank correlation with the original map {value:.2f} (interval {low:.2f} to {high:.2f}) when all parameters are random; "
            f"from the head down: {course}."
        )
        details = {"low": low, "high": high, "head": mean(column(rows, "spearman_head")), "ssim": mean(column(rows, "ssim_all"))}
        check = "maps change when the classifier's parameters are random"
        return [
            decide(
                check,
                rows[0].method,
                rows[0].scale,
                value=value,
                threshold=self.largest,
                rule="at most",
                sentence=sentence,
                details=details,
            )
        ]


def _similarity(first: Tensor, second: Tensor, ranks: bool) -> Tensor:
    """``[B]`` of maps ``[B,H,W]``: rank correlation, or SSIM of the rescaled maps. Two constant maps are alike (1), one is not (0)."""
    flat = [m.flatten(1) for m in (first, second)]
    constant = [m.amax(1) == m.amin(1) for m in flat]
    value = map_spearman(first, second) if ranks else map_ssim(min_max(first), min_max(second))
    value = value.double()
    value = torch.where(constant[0] ^ constant[1], torch.zeros_like(value), value)
    return torch.where(constant[0] & constant[1], torch.ones_like(value), value)
