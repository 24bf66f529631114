"""Adversarial manipulation of explanations: section 4.3, Fig. 4 and Table 4 of Han et al., ICLR 2024 (SRD); see
:mod:`explainer.evaluation.manipulation`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from explainer.errors import ConfigError
from explainer.evaluation.manipulation import AttackSettings, manipulate, score
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, none_wanted
from explainer.evaluation.scene import Maps, Method, Scene


class Manipulation(Protocol):
    """One row per image, attacked towards the map of the next image of its batch (a batch of one gives no rows).

    Only methods whose map can be differentiated are attacked. Read the similarity with the perturbation reached and the iterations.

    Args:
        mode: "paper" compares by squared norms (eq. 10), the others by means of squares, to which the weights belong; "code" keeps the
            softmax outputs instead of the logits. The columns of the map loss say which.
        max_iterations, learning_rate, epsilon, stop_mse: settings of the attack.
        softplus: (first, last) beta of the surrogate for methods that need one.
    """

    name = "manipulation"
    heading = "Adversarial manipulation"
    question = "Can an invisible change of the image change the map?"
    source = "Han et al. 2024, Fig. 4"
    images: int | None = 100

    def __init__(
        self,
        mode: Mode = "corrected",
        *,
        max_iterations: int = 1500,
        learning_rate: float = 1e-3,
        epsilon: float = 8 / 255,
        stop_mse: float = 1e-3,
        softplus: Sequence[float] = (10.0, 100.0),
    ) -> None:
        super().__init__(mode)
        if len(softplus) != 2:
            raise ConfigError(f"manipulation: softplus must be two numbers (first, last), received {list(softplus)}.")
        self.max_iterations, self.learning_rate, self.epsilon, self.stop_mse = max_iterations, learning_rate, epsilon, stop_mse
        self.softplus = list(softplus)
        self._settings(True)

    def _settings(self, smooth: bool) -> AttackSettings:
        return AttackSettings(
            learning_rate=self.learning_rate,
            max_iterations=self.max_iterations,
            stop_mse=self.stop_mse,
            epsilon=self.epsilon,
            output="softmax" if self.mode == "code" else "logits",
            distance="sum" if self.mode == "paper" else "mean",
            softplus=(float(self.softplus[0]), float(self.softplus[1])) if smooth else None,
        )

    def columns(self) -> dict[str, Column]:
        """Similarity of the maps before and after, and what the attack did."""
        distance = "squared norm" if self.mode == "paper" else "mean square"
        return {
            "ssim": Column("SSIM", True),
            "pearson": Column("PCC", True),
            "target_ssim": Column("SSIM to target", False),
            "target_pearson": Column("PCC to target", False),
            "mse": Column("MSE of the images", None),
            "iterations": Column("iterations", None),
            "output_change": Column("change of logits", None),
            "prediction_unchanged": Column("prediction unchanged", None, percent=True),
            "map_loss_first": Column(f"map loss ({distance}), first", None),
            "map_loss_last": Column(f"map loss ({distance}), last", None),
        }

    def wanted(self, scene: Scene) -> torch.Tensor:
        """No maps: the attack makes its own."""
        return none_wanted(scene)

    def not_applicable(self, method: Method) -> str | None:
        """A method without a differentiable map cannot be attacked."""
        return None if method.differentiable_map is not None else "its map cannot be differentiated"

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """How far an attack moves the map while the image looks the same: one row per image."""
        assert maps is not None and maps.method.differentiable_map is not None
        if len(scene.images) < 2:
            return []
        explain, targets = maps.method.differentiable_map, scene.images.roll(1, 0)
        attack = manipulate(scene.explanandum, explain, scene.images, targets, self._settings(maps.method.needs_softplus))
        return [Score(b, None, values, {}) for b, values in enumerate(score(scene.explanandum, explain, scene.images, attack))]
