"""Wall time: Table 3 of Stalder et al., NeurIPS 2022. All explained classes of all images; warm-up excluded, device synchronised."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from explainer.attribution.map_cache import compute_pairs
from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, none_wanted, scores
from explainer.evaluation.scene import Maps, Scene


class Time(Protocol):
    """One row per image: its share of its batch's time. Maps are always computed, never read from the cache.

    Args:
        mode: no differences.
        warmup: calls on the first batch before the clock starts, per method and process.
        repeats: the fastest of so many calls counts.
    """

    name = "time"
    heading = "Time"
    question = "Seconds for one image."
    source = "Stalder et al. 2022, Table 3"
    images: int | None = 64

    def __init__(self, mode: Mode = "corrected", warmup: int = 1, repeats: int = 1) -> None:
        super().__init__(mode)
        if warmup < 0 or repeats < 1:
            raise ConfigError(f"time: warmup must be at least 0 and repeats at least 1, received {warmup} and {repeats}.")
        self.warmup, self.repeats = warmup, repeats
        self._warm: set[str] = set()

    def columns(self) -> dict[str, Column]:
        """Seconds per image."""
        return {"seconds": Column("s / image", False), "seconds_per_class": Column("s / class", False)}

    def wanted(self, scene: Scene) -> Tensor:
        """No maps: the protocol makes its own."""
        return none_wanted(scene)

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Time of the explained classes' maps, computed anew: one row per image."""
        assert maps is not None
        pairs = int(scene.explained.sum())
        if pairs == 0:
            return []
        method = maps.method

        def once() -> float:
            synchronize(scene.images)
            start = time.perf_counter()
            compute_pairs(
                method.attributor,
                scene.images,
                scene.explained,
                generator=maps.generator,
                masks=scene.batch.masks,
                batch_size=method.batch_size,
            )
            synchronize(scene.images)
            return time.perf_counter() - start

        if method.label not in self._warm:
            self._warm.add(method.label)
            for _ in range(self.warmup):
                once()
        seconds = min(once() for _ in range(self.repeats))
        number = len(scene.images)
        share = torch.full((number,), seconds / number, dtype=torch.float64)
        return scores(number, None, {"seconds": share, "seconds_per_class": share * number / pairs})


def synchronize(images: Tensor) -> None:
    """Wait until the device has finished what it was given."""
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
