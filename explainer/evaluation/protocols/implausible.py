"""Masks that explain a random classifier must not look right: there was nothing to find, so whatever looks right came from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from explainer.errors import ConfigError
from explainer.evaluation.cheating import binary, moved, overlap
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Scene
from explainer.evaluation.verdict import Check, Verdict, bootstrap, column, decide, mean, undecided


class Implausible(Check):
    """One row per explained class of an image: the binary mask's overlap (IoU) with the class's object.

    The sanity check of a *trained* Explainer, after Adebayo et al. 2018: it holds no classifier whose parameters could be replaced, so it
    is trained against a classifier of random parameters (``explainer randomise``) and evaluated beside it. Its masks are compared with the
    same masks at random places and with a mask that covers everything; neither needs to know the image. Other methods can be evaluated on
    the random classifier alike; ground truth must fail.

    Args:
        mode: no differences.
        threshold: a pixel belongs to the binary mask from this value on.
        draws: random places per mask.
        margin: margin by which the mean overlap may exceed the better of the two bars.
        known: with a classifier that ranks a shown class above an absent one more often than this, nothing is decided: it is not random.
    """

    name = "implausible"
    heading = "Check: Explainer of a random classifier"
    question = "Do masks look right although there was nothing to explain?"
    title = "Random classifier, plausible mask"
    source = "this project, after Adebayo et al. 2018"
    needs_truth = True
    uses_scale = True

    def __init__(self, mode: Mode = "corrected", threshold: float = 0.5, draws: int = 8, margin: float = 0.05, known: float = 0.7) -> None:
        super().__init__(mode)
        if draws < 1 or not 0.5 <= known <= 1:
            raise ConfigError(f"implausible: draws must be at least 1 and known lie in [0.5, 1], received draws={draws}, known={known}.")
        self.threshold, self.draws, self.margin, self.known = threshold, draws, margin, known

    def columns(self) -> dict[str, Column]:
        """Overlaps, and what the classifier knows."""
        return {
            "overlap": Column("IoU with the objects", None, percent=True),
            "moved": Column("same masks moved", None, percent=True),
            "everything": Column("mask of everything", None, percent=True),
            "area": Column("area of the binary mask", None, percent=True),
            "ranked": Column("classifier ranks shown above absent", None, percent=True),
        }

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Overlap of the binary mask with the object, beside that of moved masks: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        mask, truth = binary(maps.mask(rows, classes), self.threshold), scene.truth(rows, classes)
        keys = [(scene.seed, scene.indices[b], k) for b, k in zip(rows.tolist(), classes.tolist(), strict=True)]
        own, absent = scene.logits[rows, classes].double()[:, None], ~scene.labels[rows]
        above = ((own - scene.logits[rows].double()).sign() + 1) / 2
        values = {
            "overlap": overlap(mask, truth),
            "moved": overlap(moved(mask, keys, self.draws), truth).mean(0),
            "everything": overlap(torch.ones_like(truth), truth),
            "area": mask.double().flatten(1).mean(1),
            # 0 / 0: no class is absent.
            "ranked": (above * absent).sum(1) / absent.sum(1),
        }
        return scores(rows, classes, values)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether the masks look right."""
        check, who = "masks of a random classifier do not look right", (rows[0].method, rows[0].scale)
        own, elsewhere, everything, ranked = (mean(column(rows, name)) for name in ("overlap", "moved", "everything", "ranked"))
        if ranked > self.known:
            why = (
                f"The classifier ranks a shown class above an absent one in {ranked:.0%} of cases: it is not random, masks may look right."
            )
            return [undecided(check, *who, threshold=self.margin, rule="at most", why=why, details={"ranked": ranked})]
        bar = max(elsewhere, everything)
        low, high = (bound - bar for bound in bootstrap(column(rows, "overlap"), [r.index for r in rows]))
        sentence = (
            f"IoU with the objects {own:.1%}; the same masks at random places {elsewhere:.1%}, a mask of everything {everything:.1%} "
            f"(difference to the better {own - bar:+.1%}, interval {low:+.1%} to {high:+.1%})."
        )
        details = {"overlap": own, "moved": elsewhere, "everything": everything, "ranked": ranked, "low": low, "high": high}
        return [decide(check, *who, value=own - bar, threshold=self.margin, rule="at most", sentence=sentence, details=details)]
