"""The five metrics of Table 2 of Han et al., ICLR 2024 (SRD): pointing game, localisation, sparseness, fidelity, stability."""

from __future__ import annotations

import torch

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene
from explainer.metrics.fidelity import Unit, fidelity
from explainer.metrics.localization import Region, attribution_localization
from explainer.metrics.pointing_game import pointing_game
from explainer.metrics.preparation import Norm, prepare
from explainer.metrics.sparseness import sparseness
from explainer.metrics.stability import stability


class SRDMetrics(Protocol):
    """One row per explained class of an image.

    Args:
        mode: "paper": maps divided by their maximum, 15 px tolerance, 200 pixels per subset; "code": as Quantus, the toolkit that the paper
            names (maximum absolute value, 224 of the C*H*W features per subset, offset 1e-7); "corrected": as the paper, the tolerance
            and the subsets scaled to the image's size.
        subsets: number of pixel subsets of fidelity.
        stability_samples: perturbed images; 0 leaves stability out. The maximum grows with it.
        region: localisation in the object's ``mask`` or ``box``.
    """

    name = "srd_metrics"
    heading = "Localisation, sparseness, fidelity, stability"
    question = "The five numbers of the SRD paper."
    source = "Han et al. 2024, Table 2"
    needs_truth = True

    def __init__(self, mode: Mode = "corrected", subsets: int = 100, stability_samples: int = 200, region: Region = "mask") -> None:
        super().__init__(mode)
        if subsets < 2 or stability_samples < 0:
            raise ConfigError(f"srd_metrics: subsets must be at least 2, stability_samples at least 0: {subsets}, {stability_samples}.")
        self.subsets, self.stability_samples = subsets, stability_samples
        self.region: Region = region

    def columns(self) -> dict[str, Column]:
        """Poi, Att, Spa, Fid, Sta."""
        return {
            "pointing": Column("Poi", True),
            "localisation": Column("Att", True),
            "sparseness": Column("Spa", True),
            "fidelity": Column("Fid", True),
            "stability": Column("Sta", False),
        }

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """The paper's five numbers: one row per image and explained class."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        images, truth, void = scene.images[rows], scene.truth(rows, classes), scene.void(rows)
        norm: Norm = "max_abs" if self.mode == "code" else "max"
        saliency = prepare(maps.saliency(rows, classes), scene.size, norm)
        side, pixels = min(scene.size), scene.size[0] * scene.size[1]
        tolerance = 15.0 * side / 224 if self.mode == "corrected" else 15.0
        unit: Unit = "feature" if self.mode == "code" else "pixel"
        size = {"paper": 200, "code": 224}.get(self.mode, max(1, round(200 * pixels / 224**2)))
        values = {
            "pointing": pointing_game(saliency, truth, void, tolerance),
            "localisation": attribution_localization(saliency, truth, void, self.region),
            "sparseness": sparseness(saliency, 1e-7 if self.mode == "code" else 0.0),
            "fidelity": fidelity(
                scene.explanandum,
                images,
                saliency,
                classes,
                subsets=self.subsets,
                subset_size=min(size, pixels),
                unit=unit,
                seed=scene.seed,
            ),
        }
        if self.stability_samples and not maps.method.needs_truth:
            values["stability"] = stability(
                maps.explain, scene.explanandum, images, classes, samples=self.stability_samples, noise=0.1, norm=norm, seed=scene.seed
            )
        elif self.stability_samples:
            # A row that reads the ground truth cannot be asked about a perturbed image.
            values["stability"] = torch.full((len(rows),), torch.nan)
        return scores(rows, classes, values)
