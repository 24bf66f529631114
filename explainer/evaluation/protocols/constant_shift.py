"""Do maps stay the same when the classifier's input is written otherwise? (Kindermans et al. 2019; Fong's thesis, 7.1.3.)"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.randomize import scores_only
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.evaluation.shift import shifted
from explainer.evaluation.verdict import Check, Verdict, column, decide, mean
from explainer.metrics.map_similarity import map_spearman, map_ssim
from explainer.tensors import min_max


class ConstantShift(Check):
    """One row per explained class of an image: its map against that of a classifier which is given the same picture plus a constant and
    takes the constant off in its first bias, so that both answer the same to every picture.

    Gradients, CAMs and SRD at hidden layers are expected to pass; input times gradient, relevance at the input and whatever starts at a
    fixed number of the normalised image are not. The worst of the shifts counts.

    Args:
        mode: no differences.
        shifts: numbers in units of the normalised image, and ``mean``: what makes black the zero.
        least: mean rank correlation from which on the maps count as the same.
    """

    name = "constant_shift"
    heading = "Check: constant shift"
    question = "Does the map stay when a constant is added to all images and taken off inside the classifier?"
    title = "Constant shift"
    source = "Kindermans et al. 2019"

    def __init__(self, mode: Mode = "corrected", shifts: Sequence[float | str] = (-1.0, 1.0, "mean"), least: float = 0.99) -> None:
        super().__init__(mode)
        if not shifts or any(s != "mean" and not isinstance(s, (int, float)) for s in shifts):
            raise ConfigError(f"constant_shift: shifts must be numbers or 'mean', received {list(shifts)}.")
        self.shifts, self.least = list(shifts), least

    def columns(self) -> dict[str, Column]:
        """The worst of the shifts."""
        return {
            "spearman": Column("rank correlation, shifted", True),
            "ssim": Column("SSIM, shifted", True),
            "difference": Column("relative L1 difference", False),
        }

    def axes(self, class_names: tuple[str, ...]) -> dict[str, list[Any]]:
        """The shifts."""
        return {name: list(self.shifts) for name in ("spearman", "ssim", "difference")}

    def not_applicable(self, method: Method) -> str | None:
        """A method that does not hold the classifier has nothing that could be rewritten."""
        if method.needs_truth or not method.holds_classifier:
            return "it does not compute its maps from the classifier's layers"
        return None

    def unsuited(self, explanandum: Any) -> str | None:
        """A classifier known by its scores alone has no first layer."""
        return scores_only(explanandum)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Explain the shifted pictures by the classifier that takes the shift off, and compare the maps."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        before = maps.saliency(rows, classes)
        found: dict[str, list[Tensor]] = {"spearman": [], "ssim": [], "difference": []}
        for shift in self.shifts:
            twin = shifted(maps.method.attributor, scene.images, self._values(shift, scene))
            after = maps.by_twin(twin, rows, classes)
            same = _flat(before) & _flat(after)
            rank = map_spearman(before, after)
            found["spearman"].append(torch.where(same, torch.ones_like(rank), torch.where(rank.isnan(), torch.zeros_like(rank), rank)))
            found["ssim"].append(map_ssim(min_max(before), min_max(after)))
            size = before.abs().flatten(1).sum(1)
            found["difference"].append((after - before).abs().flatten(1).sum(1) / torch.where(size == 0, torch.ones_like(size), size))
        vectors = {name: torch.stack(v, 1) for name, v in found.items()}
        worst = {name: v.amax(1) if name == "difference" else v.amin(1) for name, v in vectors.items()}
        return scores(rows, classes, worst, vectors, digits=5)

    @staticmethod
    def _values(shift: float | str, scene: Scene) -> Tensor:
        channels = scene.images.shape[1]
        model = scene.explanandum
        value = model.mean / model.std if shift == "mean" else torch.tensor([float(shift)])
        return value.expand(channels) if len(value) == 1 else value

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether maps are those of the function and not of the way it is written."""
        value = mean(column(rows, "spearman"))
        sentence = (
            f"Rank correlation with the map of the same classifier behind a shifted input {value:.3f}, SSIM "
            f"{mean(column(rows, 'ssim')):.3f} "
            f"(the worst of {len(self.shifts)} shifts)."
        )
        details = {"ssim": mean(column(rows, "ssim")), "difference": mean(column(rows, "difference"))}
        return [
            decide(
                "maps do not depend on a shift of the input",
                rows[0].method,
                rows[0].scale,
                value=value,
                threshold=self.least,
                rule="at least",
                sentence=sentence,
                details=details,
            )
        ]


def _flat(maps: Tensor) -> Tensor:
    """Whether each map ``[P,H,W]`` has one value everywhere, bool ``[P]``."""
    return (maps == maps.amin((1, 2), keepdim=True)).flatten(1).all(1)
