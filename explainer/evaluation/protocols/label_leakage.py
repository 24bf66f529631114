"""Does the mask tell the class without the image? Read from its form, from its place, and by the classifier on a foreign image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from explainer.evaluation.cheating import binary, foreign_index, moved, pack, unpack
from explainer.evaluation.probe import Array, ProbeResult, form_features, place_features, probe
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Scene
from explainer.evaluation.verdict import Check, Verdict, bootstrap, column, decide, mean, undecided
from explainer.fills import FillKind
from explainer.metrics.classifier import class_outputs, masked


class LabelLeakage(Check):
    """One row per explained class of an image: its mask, binarised and coarse, and whether the classifier sees the class through it on
    another image.

    Three verdicts. A linear probe reads the class from *where* the mask lies, another from its *form* (which is the same wherever it
    lies). Bars: the probe on shuffled labels, the same masks at random places, and, where there is ground truth, the objects' own masks;
    in real photographs boats lie low and buses are long, and an honest mask says so too. The classifier's rate of seeing the class on a
    foreign image cut to the mask is compared with the same masks moved.

    Args:
        mode: no differences.
        grid: cells per side that the probe sees.
        threshold: a pixel belongs to the binary mask from this value on.
        fill: outside of the mask on the foreign image.
        draws: random places per mask.
        margin: margin by which a bar may be exceeded.
        folds, permutations: number of folds and of permutations of the probe.
        samples: most masks that the probe reads (the first ones).
    """

    name = "label_leakage"
    heading = "Check: label leakage"
    question = "Does the mask alone tell the class?"
    title = "Label leakage"
    source = "this project"
    uses_scale = True

    def __init__(
        self,
        mode: Mode = "corrected",
        *,
        grid: int = 16,
        threshold: float = 0.5,
        fill: FillKind = "mean",
        draws: int = 4,
        margin: float = 0.05,
        folds: int = 5,
        permutations: int = 200,
        samples: int = 2000,
    ) -> None:
        super().__init__(mode)
        self.grid, self.threshold, self.draws, self.margin = grid, threshold, draws, margin
        self.fill: FillKind = fill
        self.folds, self.permutations, self.samples = folds, permutations, samples

    def columns(self) -> dict[str, Column]:
        """Rates on foreign images, and the masks' area."""
        return {
            "foreign": Column("class seen on a foreign image", None, percent=True),
            "foreign_moved": Column("same masks moved", None, percent=True),
            "area": Column("area of the binary mask", None, percent=True, shown=False),
        }

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Share of foreign images on which a mask shows its class, as it is and moved: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        mask = binary(maps.mask(rows, classes), self.threshold)
        keys = [(scene.seed, scene.indices[b], k) for b, k in zip(rows.tolist(), classes.tolist(), strict=True)]
        elsewhere = moved(mask, keys, self.draws)
        foreign = foreign_index(scene.labels, rows, classes)
        other = scene.images[foreign.clamp(min=0)]

        def seen(masks: torch.Tensor) -> torch.Tensor:
            logits = class_outputs(scene.explanandum, masked(scene.explanandum, other, masks, self.fill), "logit")
            hit = (logits.argmax(1) == classes).double()
            return torch.where(foreign >= 0, hit, torch.full_like(hit, torch.nan))

        values = {
            "foreign": seen(mask),
            "foreign_moved": torch.stack([seen(m) for m in elsewhere]).mean(0),
            "area": mask.flatten(1).mean(1),
        }
        vectors = {"mask": pack(mask, self.grid)}
        if scene.batch.masks is not None:
            vectors["truth"] = pack(scene.truth(rows, classes), self.grid)
        return scores(rows, classes, values, vectors)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Place, form, foreign image."""
        who = rows[0].method, rows[0].scale
        usable = [r for r in rows if "mask" in r.vectors and r.class_index is not None][: self.samples]
        empty = float((column(usable, "area") == 0).mean()) if usable else 1.0
        if empty > 0.5:
            why = f"{empty:.0%} of the binary masks are empty, so there is nothing to read. Evaluate the rescaled maps."
            unread = [
                undecided(f"class not readable from the mask's {what}", *who, threshold=np.nan, rule="at most", why=why)
                for what in ("place", "form")
            ]
            # An empty mask shows nothing of any image: the few others would be lost among them.
            return [*unread, self._foreign(who, [r for r in usable if r.values.get("area", 0) > 0])]
        masks = unpack([r.vectors["mask"] for r in usable])
        truth = unpack([r.vectors["truth"] for r in usable]) if all("truth" in r.vectors for r in usable) else None
        rolled = np.stack([_rolled(m, r.index, int(r.class_index or 0)) for m, r in zip(masks, usable, strict=True)])
        place, form = place_features, form_features
        return [
            self._probed("place", who, usable, place(masks), place(rolled), truth if truth is None else place(truth)),
            self._probed("form", who, usable, form(masks), None, truth if truth is None else form(truth)),
            self._foreign(who, rows),
        ]

    def _read(self, features: Array, rows: Sequence[Row], permutations: int = 0) -> ProbeResult:
        return probe(
            features, [int(r.class_index or 0) for r in rows], [r.index for r in rows], folds=self.folds, permutations=permutations
        )

    def _probed(
        self, what: str, who: tuple[str, str], rows: Sequence[Row], own: Array, rolled: Array | None, truth: Array | None
    ) -> Verdict:
        check = f"class not readable from the mask's {what}"
        result = self._read(own, rows, self.permutations)
        if np.isnan(result.accuracy):
            why = f"{result.samples} masks of {result.classes} classes are too few for a probe with {self.folds} folds."
            return undecided(check, *who, threshold=np.nan, rule="at most", why=why)
        bars = {"shuffled labels": result.permuted}
        if rolled is not None:
            bars["the same masks moved"] = self._read(rolled, rows).accuracy
        if truth is not None:
            bars["the objects' own masks"] = self._read(truth, rows).accuracy
        highest = max(bars, key=lambda name: bars[name])
        sentence = (
            f"A probe that sees only the mask's {what} names the class in {result.accuracy:.1%} of cases (guessing: {result.chance:.1%}; "
            f"highest bar, {highest}: {bars[highest]:.1%})."
        )
        return decide(
            check,
            *who,
            value=result.accuracy,
            threshold=bars[highest] + self.margin,
            rule="at most",
            sentence=sentence,
            details={"guessing": result.chance, **bars},
        )

    def _foreign(self, who: tuple[str, str], rows: Sequence[Row]) -> Verdict:
        check = "class not seen through the mask on a foreign image"
        own, elsewhere = column(rows, "foreign"), column(rows, "foreign_moved")
        gain = own - elsewhere
        low, high = bootstrap(gain, [r.index for r in rows])
        if np.isnan(low):
            return undecided(
                check, *who, threshold=self.margin, rule="at most", why="Too few images without the class were at hand in the batches."
            )
        sentence = (
            f"Cut to the mask, an image without the class is taken for it in {mean(own):.1%} of cases; to the same mask moved, in "
            f"{mean(elsewhere):.1%} (difference {mean(gain):+.1%}, interval {low:+.1%} to {high:+.1%}; the interval's lower end counts)."
        )
        # The lower end of the interval decides: a difference that may be chance is no finding.
        return decide(
            check,
            *who,
            value=low,
            threshold=self.margin,
            rule="at most",
            sentence=sentence,
            details={"difference": mean(gain), "low": low, "high": high},
        )


def _rolled(mask: Array, index: int, label: int) -> Array:
    random = np.random.default_rng([index, label, 1])
    return np.roll(mask, tuple(int(s) for s in random.integers(0, mask.shape[0], 2)), axis=(0, 1))
