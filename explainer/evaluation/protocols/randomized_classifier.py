"""Masks scored with a classifier of random parameters must lose their faithfulness: else it came from somewhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explainer.evaluation.cheating import moved
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.randomize import cloud_images, randomized, scores_only
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Scene
from explainer.evaluation.verdict import Check, Verdict, column, decide, undecided
from explainer.fills import FillKind
from explainer.metrics.classifier import class_scores, masked


class RandomizedClassifier(Check):
    """One row per explained class of an image: how often the class scores higher through the mask than through the same mask moved
    elsewhere, for the classifier and for copies of it with random parameters (0.5 is a draw).

    Ranks, not scores, because the scores of a random network have no unit.

    Args:
        mode: no differences.
        networks: random copies.
        draws: random places per mask.
        fill: outside of the mask.
        kept: largest share of the advantage over moved masks that may survive.
        least: advantage below which there is nothing to lose.
    """

    name = "randomized_classifier"
    heading = "Check: randomised classifier"
    question = "Is the masks' advantage lost when the classifier is random?"
    title = "Randomised classifier"
    source = "this project, after Adebayo et al. 2018"
    uses_scale = True

    def __init__(
        self,
        mode: Mode = "corrected",
        *,
        networks: int = 10,
        draws: int = 2,
        fill: FillKind = "mean",
        kept: float = 0.5,
        least: float = 0.05,
    ) -> None:
        super().__init__(mode)
        self.networks, self.draws, self.kept, self.least = networks, draws, kept, least
        self.fill: FillKind = fill
        self._twins: tuple[Any, list[Any]] | None = None

    def columns(self) -> dict[str, Column]:
        """Rates of beating a moved mask."""
        return {
            "wins": Column("beats a moved mask", True, percent=True),
            "wins_randomised": Column("with a random classifier", None, percent=True),
        }

    def unsuited(self, explanandum: Any) -> str | None:
        """A classifier known by its scores alone has no parameters."""
        return scores_only(explanandum)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """How often a mask beats moved ones, through the classifier and through random ones: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images, mask = scene.images[rows], maps.mask(rows, classes)
        keys = [(scene.seed, scene.indices[b], k) for b, k in zip(rows.tolist(), classes.tolist(), strict=True)]
        elsewhere = moved(mask, keys, self.draws)

        def wins(network: Any) -> Tensor:
            def through(masks: Tensor) -> Tensor:
                shown = masked(scene.explanandum, images, masks, self.fill)
                return class_scores(network, shown, classes, "logit").double()

            own = through(mask)
            return torch.stack([(torch.sign(own - through(m)) + 1) / 2 for m in elsewhere]).mean(0)

        random = torch.stack([wins(twin) for twin in self._networks(scene)], dim=1)
        return scores(rows, classes, {"wins": wins(scene.explanandum), "wins_randomised": random.mean(1)}, {"wins_randomised": random})

    def _networks(self, scene: Scene) -> list[Any]:
        if self._twins is None or self._twins[0] is not scene.explanandum:
            twins = [randomized(scene.explanandum, scene.seed + i, cloud_images(scene.images)) for i in range(self.networks)]
            self._twins = scene.explanandum, twins
        return self._twins[1]

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether the advantage over moved masks is lost."""
        who, check = (rows[0].method, rows[0].scale), "faithfulness is lost with a random classifier"
        advantage = float(np.nanmean(column(rows, "wins"))) - 0.5 if rows else np.nan
        if not advantage >= self.least:
            why = f"With the classifier itself the masks beat the same masks moved in {advantage + 0.5:.1%} of cases: nothing to lose."
            return [undecided(check, *who, threshold=self.kept, rule="at most", why=why)]
        per_network = np.array([r.vectors["wins_randomised"] for r in rows]).mean(0) - 0.5
        error = float(per_network.std(ddof=1) / np.sqrt(len(per_network))) if len(per_network) > 1 else 0.0
        remaining = float(per_network.mean())
        # Two standard errors over networks: few random networks agree with a mask by chance.
        value = max(0.0, remaining - 2 * error) / advantage
        sentence = (
            f"The masks beat the same masks moved in {advantage + 0.5:.1%} of cases; with random classifiers in {remaining + 0.5:.1%} "
            f"(standard error {error:.1%}). Judged is the lower end of what survives, as a share of the advantage."
        )
        details = {"advantage": advantage, "remaining": remaining, "error": error}
        return [decide(check, *who, value=value, threshold=self.kept, rule="at most", sentence=sentence, details=details)]
