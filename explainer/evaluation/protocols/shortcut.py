"""A planted shortcut: if the classifier provably uses the cue, does the method show it? If not, does the method leave it out?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from explainer.errors import ConfigError
from explainer.evaluation.cheating import share_on, without_cue
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Scene
from explainer.evaluation.verdict import Check, Verdict, bootstrap, column, decide, mean, undecided
from explainer.metrics.classifier import class_scores, masked


class Shortcut(Check):
    """One row per explained class of an image whose cue is in the image.

    The classifier's reliance is measured without any method: the class's probability with the cue minus without it, on the whole
    image and (where there are masks) on the image whose object has been removed; the larger mean counts, as a cue can be a second
    sufficient reason. The method is judged by the share of its map on the cue over the cue's share of the image (1: like a constant map).

    Args:
        mode: no differences.
        used: smallest mean reliance that counts as use.
        unused: largest mean reliance that counts as no use; in between nothing is decided.
        factor: how often more than a constant map a method must show a cue that is used, and the most that one which is not used may get.
        ring: width of the surroundings whose colour paints over the cue, in pixels.
    """

    name = "shortcut"
    heading = "Check: planted shortcut"
    question = "Is a cue shown exactly where the classifier uses it?"
    title = "Planted shortcut"
    source = "this project"

    def __init__(self, mode: Mode = "corrected", used: float = 0.1, unused: float = 0.02, factor: float = 2.0, ring: int = 3) -> None:
        super().__init__(mode)
        if not 0 <= unused < used:
            raise ConfigError(f"shortcut: unused must lie in [0, used), received unused={unused} and used={used}.")
        self.used, self.unused, self.factor, self.ring = used, unused, factor, ring

    def columns(self) -> dict[str, Column]:
        """Reliance of the classifier, attention of the method."""
        return {
            "reliance": Column("score lost with the cue", None, percent=True),
            "reliance_alone": Column("score won by the cue alone", None, percent=True),
            "share": Column("map on the cue", None, percent=True),
            "area": Column("image under the cue", None, percent=True, shown=False),
        }

    def wanted(self, scene: Scene) -> torch.Tensor:
        """Explained classes with a cue in the image."""
        if scene.batch.cues is None:
            raise ConfigError("shortcut: the data has no planted cues. Use shapes with data.options.shortcut_class, or leave it out.")
        return scene.explained & (scene.batch.cues.flatten(2).amax(2) > 0)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """What the cue contributes to the score, and how much of the mask lies on it: one row per image and class with a cue."""
        assert maps is not None
        rows, classes = self.wanted(scene).nonzero(as_tuple=True)
        assert scene.batch.cues is not None
        if len(rows) == 0:
            return []
        images, cue = scene.images[rows], scene.batch.cues[rows, classes]

        def lost(shown: torch.Tensor) -> torch.Tensor:
            both = [class_scores(scene.explanandum, x, classes).double() for x in (shown, without_cue(shown, cue, self.ring))]
            return both[0] - both[1]

        values = {"reliance": lost(images)}
        if scene.batch.masks is not None:
            values["reliance_alone"] = lost(masked(scene.explanandum, images, 1 - scene.truth(rows, classes)))
        values["share"] = share_on(maps.saliency(rows, classes), cue)
        values["area"] = cue.double().flatten(1).mean(1)
        return scores(rows, classes, values)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether the method agrees with what the classifier does."""
        who, images = (rows[0].method, rows[0].scale), [r.index for r in rows]
        effects = {name: mean(column(rows, name)) for name in ("reliance", "reliance_alone")}
        reliance = max((v for v in effects.values() if v == v), default=float("nan"))
        share, area = mean(column(rows, "share")), mean(column(rows, "area"))
        ratio = share / area
        low, high = (bound / area for bound in bootstrap(column(rows, "share"), images))
        details = {**effects, "share": share, "area": area, "low": low, "high": high}
        seen = f"The cue changes the class's probability by {reliance:+.3f}"
        shown = f"{share:.1%} of the map lies on the cue, which covers {area:.1%} of the image ({ratio:.1f} times a constant map)."
        if reliance >= self.used:
            return [
                decide(
                    "a cue that is used is shown",
                    *who,
                    value=ratio,
                    threshold=self.factor,
                    rule="at least",
                    sentence=f"{seen}: it is used. {shown}",
                    details=details,
                )
            ]
        if reliance <= self.unused:
            text = f"{seen}: it is not used. {shown}"
            return [
                decide(
                    "a cue that is not used is left out",
                    *who,
                    value=ratio,
                    threshold=self.factor,
                    rule="at most",
                    sentence=text,
                    details=details,
                )
            ]
        why = f"{seen}: too little to call it used (from {self.used}), too much to call it unused (up to {self.unused}). {shown}"
        return [undecided("a cue that is used is shown", *who, threshold=self.factor, rule="at least", why=why, details=details)]
