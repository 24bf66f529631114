"""Fidelity alone: Table 4 of Han et al., ICLR 2024 (SRD), on data without ground-truth masks."""

from __future__ import annotations

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.fidelity import fidelity
from explainer.metrics.preparation import prepare


class Fidelity(Protocol):
    """One row per explained class of an image; see :func:`explainer.metrics.fidelity.fidelity`.

    Args:
        mode: no differences.
        subsets: random subsets of pixels.
        subset_size: pixels in each; None: 200 in an image of 224 x 224, the same share of others (4 at 32 x 32).
    """

    name = "fidelity"
    heading = "Fidelity"
    question = "How closely does the sum of a map follow the score when parts are removed?"
    source = "Han et al. 2024, Table 4"

    def __init__(self, mode: Mode = "corrected", subsets: int = 100, subset_size: int | None = None) -> None:
        super().__init__(mode)
        if subsets < 2 or (subset_size is not None and subset_size < 1):
            raise ConfigError(f"fidelity: subsets must be at least 2, subset_size at least 1, received {subsets} and {subset_size}.")
        self.subsets, self.subset_size = subsets, subset_size

    def columns(self) -> dict[str, Column]:
        """Fid."""
        return {"fidelity": Column("Fid", True)}

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Correlation of the map's sums with the drops of the score: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        pixels = scene.size[0] * scene.size[1]
        size = max(1, round(200 * pixels / 224**2)) if self.subset_size is None else min(self.subset_size, pixels)
        saliency = prepare(maps.saliency(rows, classes), scene.size, "max")
        values = fidelity(scene.explanandum, scene.images[rows], saliency, classes, subsets=self.subsets, subset_size=size, seed=scene.seed)
        return scores(rows, classes, {"fidelity": values})
