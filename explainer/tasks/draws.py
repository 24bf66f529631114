"""Random numbers of a training step that do not depend on how its images are shared between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from explainer.data.samplers import sample_seed
from explainer.tensors import Batch


@dataclass(frozen=True)
class Draws:
    """One stream for the step, the same in every process, and one for each image, the same wherever the image is.

    Args:
        seed: random seed of the run.
        step: optimiser steps done; -1 in evaluation, which always draws the same.
        batch: whose images; their ids and epochs name the streams.
        purpose: keeps the streams of two uses in one step apart.
    """

    seed: int
    step: int
    batch: Batch
    purpose: str = ""

    @cached_property
    def common(self) -> torch.Generator:
        """What the whole step shares, such as the kind of fill."""
        return torch.Generator().manual_seed(sample_seed(self.seed, self.step, self.purpose))

    @cached_property
    def each(self) -> list[torch.Generator]:
        """One generator for each image. It goes on with every draw."""
        batch = self.batch
        rounds: Sequence[int] = batch.epochs or (self.step,) * len(batch)
        rounds = rounds if self.step >= 0 else (-1,) * len(batch)
        names: Sequence[str] = batch.ids or [str(i) for i in range(len(batch))]
        keys = zip(rounds, names, strict=True)
        return [torch.Generator().manual_seed(sample_seed(self.seed, r, n, self.purpose)) for r, n in keys]

    def uniform(self, *shape: int) -> Tensor:
        """``[B,*shape]`` uniform in [0,1), on the CPU."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.each])
