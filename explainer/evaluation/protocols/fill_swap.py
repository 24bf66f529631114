"""Masks must work under fills that they were not trained with: else they exploit the fill, not the evidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from explainer.errors import ConfigError
from explainer.evaluation.cheating import moved
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Scene
from explainer.evaluation.verdict import Check, Verdict, bootstrap, column, decide, mean, undecided
from explainer.fills import FillKind
from explainer.metrics.classifier import Output, class_scores, masked


class FillSwap(Check):
    """One row per explained class of an image and, for each fill, the score kept by the mask beyond that of the same mask moved elsewhere.

    Args:
        mode: no differences.
        trained: fill used in training (or built into the method).
        fills: fills not used in training.
        draws: random places per mask.
        output: what is read from the classifier: ``probability``, ``softmax``, ``sigmoid`` or ``logit``.
        kept: smallest share of the advantage that must survive the swap.
        least: advantage under the training fill below which there is nothing to compare.
    """

    name = "fill_swap"
    heading = "Check: fill swap"
    question = "Do masks work under fills not used in training?"
    title = "Fill swap"
    source = "this project"
    uses_scale = True

    def __init__(
        self,
        mode: Mode = "corrected",
        *,
        trained: FillKind = "mean",
        fills: Sequence[FillKind] = ("black", "white", "blur", "noise"),
        draws: int = 2,
        output: Output = "probability",
        kept: float = 0.5,
        least: float = 0.02,
    ) -> None:
        super().__init__(mode)
        if not fills or trained in fills:
            raise ConfigError(f"fill_swap: fills must be other fills than trained={trained!r}, received {list(fills)}.")
        self.trained: FillKind = trained
        self.fills: list[FillKind] = list(fills)
        self.output: Output = output
        self.draws, self.kept, self.least = draws, kept, least

    def columns(self) -> dict[str, Column]:
        """Advantages over moved masks."""
        found = {
            "trained": Column(f"advantage, {self.trained}", True, percent=True),
            "swapped": Column("advantage, other fills", True, percent=True),
        }
        return {**found, **{f"swapped_{fill}": Column(f"advantage, {fill}", True, percent=True, shown=False) for fill in self.fills}}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Score with the mask less that with moved masks, by fill: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images, mask = scene.images[rows], maps.mask(rows, classes)
        keys = [(scene.seed, scene.indices[b], k) for b, k in zip(rows.tolist(), classes.tolist(), strict=True)]
        elsewhere = moved(mask, keys, self.draws)

        def advantage(fill: FillKind) -> torch.Tensor:
            def kept(masks: torch.Tensor) -> torch.Tensor:
                return class_scores(scene.explanandum, masked(scene.explanandum, images, masks, fill), classes, self.output).double()

            return kept(mask) - torch.stack([kept(m) for m in elsewhere]).mean(0)

        by_fill = {f"swapped_{fill}": advantage(fill) for fill in self.fills}
        return scores(rows, classes, {"trained": advantage(self.trained), "swapped": torch.stack([*by_fill.values()]).mean(0), **by_fill})

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether the advantage survives."""
        who, check = (rows[0].method, rows[0].scale), "the mask works under other fills"
        trained, swapped = mean(column(rows, "trained")), column(rows, "swapped")
        if not trained >= self.least:
            why = (
                f"Under {self.trained} the masks keep only {trained:+.3f} more of the score than the same masks moved: nothing to compare."
            )
            return [undecided(check, *who, threshold=self.kept, rule="at least", why=why)]
        low, high = bootstrap(swapped, [r.index for r in rows])
        each: dict[str, float] = {fill: mean(column(rows, f"swapped_{fill}")) for fill in self.fills}
        value = mean(swapped) / trained
        parts = ", ".join(f"{fill} {number:+.3f}" for fill, number in each.items())
        sentence = (
            f"Score kept beyond the same masks moved: {trained:+.3f} under {self.trained}, {mean(swapped):+.3f} under others ({parts}); "
            f"{value:.0%} survives."
        )
        details = {"trained": trained, "swapped": mean(swapped), "low": low, "high": high, **each}
        return [
            decide(
                check,
                *who,
                value=value if np.isfinite(value) else np.nan,
                threshold=self.kept,
                rule="at least",
                sentence=sentence,
                details=details,
            )
        ]
