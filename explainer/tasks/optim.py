"""Optimisers and learning-rate schedules by configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from explainer.config import OptimizerConfig
from explainer.errors import ConfigError


def configure(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, total_steps: Callable[[], int], encoder: Iterable[nn.Parameter] = ()
) -> dict[str, Any]:
    """What ``LightningModule.configure_optimizers`` returns.

    Args:
        parameters: those that require gradients are trained.
        config: names and numbers.
        total_steps: gives the optimiser steps of the whole run, for schedules that end with it.
        encoder: those of ``parameters`` that learn at ``encoder_lr`` times the rate.

    Raises:
        ConfigError: a number is out of its range, or ``encoder_lr`` is not 1 and there is no encoder.
    """
    for name, most in (("lr", math.inf), ("weight_decay", math.inf), ("warmup", 1.0)):
        value = getattr(config, name)
        if not 0 <= value <= most or value == math.inf:
            rule = "lie in [0,1]" if most == 1 else "be a finite number of at least 0"
            raise ConfigError(f"optimizer.{name} must {rule}, received {value}.")
    trained: list[Any] = [p for p in parameters if p.requires_grad]
    if config.encoder_lr != 1:
        own = {id(p) for p in encoder}
        slow = [p for p in trained if id(p) in own]
        if not slow or config.encoder_lr <= 0:
            raise ConfigError(
                f"optimizer.encoder_lr is a positive factor for the Explainer's encoder or the classifier's body, received "
                f"{config.encoder_lr} for a network with {len(slow)} such tensors to train; leave it at 1 where there are none."
            )
        trained = [{"params": [p for p in trained if id(p) not in own]}, {"params": slow, "lr": config.encoder_lr * config.lr}]
    if config.name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam(trained, lr=config.lr)
    elif config.name == "adamw":
        optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.SGD(trained, lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    if config.schedule == "constant":
        return {"optimizer": optimizer}
    shapes: dict[str, Callable[[int, int], float]] = {
        "one_cycle": partial(one_cycle, warmup=config.warmup),
        "cosine": cosine,
        "steps": steps,
    }
    shape = shapes[config.schedule]

    def factor(step: int) -> float:
        # The total is asked for only once training has begun: Lightning builds the loaders to know it, and a resumed run must not
        # build them before its position has been restored. Step 0 has the same factor for every total.
        return shape(step, total_steps() if step else 1_000_000)

    # LambdaLR keeps no total in the checkpoint: a resumed run with another length follows the new schedule instead of failing.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def one_cycle(step: int, total: int, warmup: float) -> float:
    """Learning-rate factor: cosine from 1/25 up to 1 over the first ``warmup`` share of ``total`` steps, then cosine down to 0."""
    rise = warmup * total
    if step < rise:
        return 1 / 25 + (1 - 1 / 25) * 0.5 * (1 - math.cos(math.pi * step / rise))
    return cosine(int(step - rise), max(1, int(total - rise)))


def cosine(step: int, total: int) -> float:
    """Learning-rate factor: cosine from 1 to 0 over ``total`` steps, 0 afterwards."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


def steps(step: int, total: int) -> float:
    """Learning-rate factor: a tenth from each of 30, 60 and 90 % of ``total`` steps on."""
    return 0.1 ** sum(10 * step >= tenths * total for tenths in (3, 6, 9))
