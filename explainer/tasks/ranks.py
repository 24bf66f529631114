"""Values over the processes of a distributed run, in as few collective calls as possible."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import MeanMetric


def world() -> int:
    """Number of processes that can talk to each other."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def mean_over_ranks(values: dict[str, Tensor], module: pl.LightningModule) -> dict[str, Tensor]:
    """The mean of each training value over the processes, in one collective call, at the steps that Lightning logs.

    All processes have batches of one size, so that the mean of their means is the global batch's.

    Args:
        values: scalars, the same keys in the same order everywhere.
        module: whose step it is.
    """
    if world() == 1:
        return values
    every = module.trainer.log_every_n_steps  # type: ignore[attr-defined]
    if not every or (module.global_step + 1) % every:
        return values
    stacked = torch.stack([v.detach().float() for v in values.values()])
    torch.distributed.all_reduce(stacked)
    return dict(zip(values, (stacked / world()).unbind(), strict=True))


class Means:
    """Means by name over an epoch of evaluation, in any number of processes: each a torchmetrics ``MeanMetric``.

    A process may have had no batch at all, or none with a name that others have: the names are agreed on before anything is reduced,
    because a process that does not take part in a reduction lets the others wait for ever.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, MeanMetric] = {}

    def update(self, row: dict[str, Tensor]) -> None:
        """Add values ``[B]`` of one batch; NaN are left out."""
        for name, values in row.items():
            self._metric(name, values.device).update(values.float())

    def _metric(self, name: str, device: Any) -> MeanMetric:
        if name not in self.metrics:
            self.metrics[name] = MeanMetric(nan_strategy="ignore").to(device)
        return self.metrics[name]

    def compute(self, device: Any) -> dict[str, Tensor]:
        """The means, the same in every process, and a fresh start."""
        names = set(self.metrics)
        if world() > 1:
            found: list[Any] = [None] * world()
            torch.distributed.all_gather_object(found, sorted(names))
            names = {name for part in found for name in part}
        for name in names - set(self.metrics):
            self._metric(name, device).update(torch.tensor(torch.nan, device=device))  # ignored: no value, but it takes part
        results = {name: self.metrics[name].compute() for name in sorted(names)}
        self.metrics.clear()
        return results
