"""Maps of a classifier that was trained on permuted labels (Adebayo et al., NeurIPS 2018): they must not look like the true one's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from explainer.data.permuting import labels_of, permuted
from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Score, scores
from explainer.evaluation.randomize import scores_only
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.evaluation.verdict import Check, Verdict, bootstrap, column, decide, mean, undecided
from explainer.metrics.map_similarity import map_spearman, map_ssim
from explainer.models.checkpoints import load_explanandum
from explainer.tensors import min_max


class DataRandomization(Check):
    """One row per explained class of an image of the training split: its map against that of the same network, trained by the same
    schedule on labels that were permuted once (``data.permute_labels`` of its training).

    Such a network can only know images by heart, so that a map that stays the same shows the picture and not what was learned. Nothing is
    decided unless the network knows its permuted labels: evaluate the whole training split, without ``limit`` and ``sample``.

    Args:
        mode: no differences.
        checkpoint: checkpoint of the classifier trained on permuted labels.
        permute_labels: the seed that its training was given.
        largest: mean rank correlation that may remain.
        known: share of the permuted labels that the network must answer.
    """

    name = "data_randomization"
    heading = "Check: permuted labels"
    question = "Do maps differ from those of a classifier that was trained on permuted labels?"
    title = "Data randomisation"
    source = "Adebayo et al. 2018"

    def __init__(
        self, mode: Mode = "corrected", checkpoint: str | None = None, permute_labels: int = 0, largest: float = 0.5, known: float = 0.95
    ) -> None:
        super().__init__(mode)
        self.checkpoint, self.permute_labels, self.largest, self.known = checkpoint, permute_labels, largest, known
        self._permuted: list[tuple[int, ...]] | None = None
        self._other: Any = None

    def columns(self) -> dict[str, Column]:
        """Similarity with the other network's maps, and what that network knows."""
        return {
            "spearman": Column("rank correlation, labels permuted", False),
            "spearman_absolute": Column("of absolute values", False, shown=False),
            "ssim": Column("SSIM, labels permuted", False),
            "known": Column("permuted labels known", None, percent=True),
        }

    def not_applicable(self, method: Method) -> str | None:
        """A method that does not hold the classifier cannot be given another."""
        if method.needs_truth or not method.holds_classifier:
            return "it does not compute its maps from the classifier; train it against the other one instead"
        return None

    def unsuited(self, explanandum: Any) -> str | None:
        """A classifier known by its scores alone has no parameters."""
        return scores_only(explanandum)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Explain the images by the twin that was trained on permuted labels, and compare the maps."""
        assert maps is not None
        rows, classes = scene.pairs
        if len(rows) == 0:
            return []
        twin: Any = copy.deepcopy(maps.method.attributor)
        self._load(twin.explanandum)
        before, after = maps.saliency(rows, classes), maps.by_twin(twin, rows, classes)
        values = {
            "spearman": map_spearman(before, after),
            "spearman_absolute": map_spearman(before, after, absolute=True),
            "ssim": map_ssim(min_max(before), min_max(after)),
            "known": self._known(twin.explanandum, scene)[rows],
        }
        return scores(rows, classes, values)

    def _load(self, explanandum: Any) -> None:
        """Put the other network's weights into a copy of the classifier."""
        if self.checkpoint is None:
            raise ConfigError("data_randomization: checkpoint names the classifier that was trained with data.permute_labels: give it.")
        if self._other is None:
            self._other = load_explanandum(self.checkpoint)
        try:
            explanandum.classifier.load_state_dict(self._other.classifier.state_dict())
        except RuntimeError as error:
            raise ConfigError(
                f"data_randomization: {self.checkpoint} is not the evaluated classifier's architecture ({str(error)[:200]}). Train the "
                "same one."
            ) from error

    def _known(self, explanandum: Any, scene: Scene) -> Tensor:
        """Share of each image's permuted labels that the network answers, ``[B]``."""
        if self._permuted is None:
            self._permuted = permuted(labels_of(scene.dataset), self.permute_labels)
        target = torch.zeros_like(scene.labels)
        for b, index in enumerate(scene.indices):
            target[b, list(self._permuted[index])] = True
        with torch.no_grad():
            logits: Tensor = explanandum(scene.images)
        if explanandum.task == "multiclass":
            return target.gather(1, logits.argmax(1, keepdim=True))[:, 0].double()
        return ((logits >= 0) == target).double().mean(1)

    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """Whether maps change with what was learned."""
        check, who = "maps change when the labels were permuted", (rows[0].method, rows[0].scale)
        known = mean(column(rows, "known"))
        if not known >= self.known:
            why = (
                f"The network trained on permuted labels answers {known:.1%} of them, less than {self.known:.0%}: train it longer, with "
                "the same "
                "seed of data.permute_labels, and evaluate its whole training split."
            )
            return [undecided(check, *who, threshold=self.largest, rule="at most", why=why, details={"known": known})]
        value = mean(column(rows, "spearman"))
        low, high = bootstrap(column(rows, "spearman"), [r.index for r in rows])
        sentence = (
            f"Rank correlation with the maps of the network that learned permuted labels {value:.2f} (interval {low:.2f} to {high:.2f})."
        )
        details = {"low": low, "high": high, "ssim": mean(column(rows, "ssim")), "known": known}
        return [decide(check, *who, value=value, threshold=self.largest, rule="at most", sentence=sentence, details=details)]
