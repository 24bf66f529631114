"""Gradient ascent on many masks at once: one row per mask, rows that have converged leave the batch.

Rows never see each other: a row's result is the same whatever shares the batch with it (up to the classifier's rounding).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from explainer.errors import ConfigError, NumericalError

Objective = Callable[[Tensor, Tensor, int], tuple[Tensor, dict[str, Tensor]]]
"""(parameters [n,...] of the rows still active, their numbers [n], iteration) -> (value to maximise [n], numbers to record [n])."""


@dataclass(frozen=True)
class Ascent:
    """How a gradient becomes a step; the parameters are clamped to [0,1] afterwards.

    Attributes:
        rule: ``sgd`` (heavy-ball momentum) or ``adam``.
        rate: step size at iteration t.
        momentum: momentum factor of SGD, or the first moment's decay of Adam.
        decay: decay of Adam's second moment.
        shared: Adam's second moment is one number a row (the mean over its parameters), so that parameters keep the proportions of
            their gradients and only the row's scale is adapted.
        dampening: of SGD's momentum: the gradient enters the momentum buffer times ``1 - dampening``, except the first one.
    """

    rule: Literal["sgd", "adam"]
    rate: Callable[[int], float]
    momentum: float = 0.9
    dampening: float = 0.0
    decay: float = 0.999
    shared: bool = False

    def step(self, parameters: Tensor, grad: Tensor, state: list[Tensor], t: int) -> Tensor:
        """New parameters; ``state`` is updated in place (filled at t = 0)."""
        if not state:
            state += [grad.clone()] if self.rule == "sgd" else [torch.zeros_like(grad), torch.zeros_like(grad)]
            if self.rule == "sgd":
                return (parameters + self.rate(t) * grad).clamp_(0, 1)
        if self.rule == "sgd":
            state[0].mul_(self.momentum).add_(grad, alpha=1 - self.dampening)
            return (parameters + self.rate(t) * state[0]).clamp_(0, 1)
        state[0].lerp_(grad, 1 - self.momentum)
        square = grad.square()
        if self.shared:
            square = square.flatten(1).mean(1).view(-1, *[1] * (grad.ndim - 1)).expand_as(grad)
        state[1].lerp_(square, 1 - self.decay)
        scale = (state[1] / (1 - self.decay ** (t + 1))).sqrt_().add_(1e-8)
        return (parameters + self.rate(t) / (1 - self.momentum ** (t + 1)) * state[0] / scale).clamp_(0, 1)


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        max_iterations: end after so many iterations, leaving the schedule's horizon as it is.
        budget_s: end after so many seconds (looked at after every iteration; at least one is made).
        tolerance: a row leaves when its parameters changed by less than this on average over ``patience`` iterations; None: never.
        patience: iterations between two looks.
        rows_per_pass: at most so many rows in one call of the classifier; None: all.
    """

    max_iterations: int | None = None
    budget_s: float | None = None
    tolerance: float | None = None
    patience: int = 10
    rows_per_pass: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_iterations", "patience", "rows_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, received {value}.")
        for name in ("budget_s", "tolerance"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must not be negative, received {value}.")


@dataclass
class History:
    """Convergence record of one search.

    Attributes:
        values: named ``[T,N]`` CPU tensors, one line per iteration; rows that left keep their last value.
        active: rows still in the batch, per iteration.
        seconds: time since the start at the end of each iteration.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    active: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Found:
    """Result of :func:`maximize`: ``parameters`` as last evaluated, ``iterations`` that each row took ``[N]``, and the ``history``."""

    parameters: Tensor
    iterations: Tensor
    history: History


def maximize(start: Tensor, objective: Objective, ascent: Ascent, iterations: int, limits: Limits | None = None) -> Found:
    """Maximise each row's objective over parameters in [0,1].

    The last iteration (and the last one of a row that leaves) evaluates without stepping, so the result is what its recorded values
    belong to.

    Args:
        start: ``[N,...]`` in [0,1].
        objective: what is maximised; see :data:`Objective`; called on detached leaves, with gradients enabled.
        ascent: the step rule.
        iterations: length of the schedule.
        limits: early ends.

    Raises:
        NumericalError: the objective became NaN or infinite.
    """
    limits = limits or Limits()
    if iterations < 1:
        raise ConfigError(f"iterations must be at least 1, received {iterations}.")
    began = time.perf_counter()
    total = min(iterations, limits.max_iterations or iterations)
    final = start.detach().clone().clamp_(0, 1)
    rows = torch.arange(len(start), device=start.device)
    taken = torch.zeros(len(start), dtype=torch.long, device=start.device)
    current, history = final.clone(), History()
    snapshot = current
    state: list[Tensor] = []
    lines: dict[str, list[Tensor]] = {}
    for t in range(total):
        grad, values = _evaluate(current, rows, t, objective, limits.rows_per_pass)
        for name, value in values.items():
            past = lines.setdefault(name, [])
            line = past[-1].clone() if past else value.new_zeros(len(start))
            line[rows] = value
            past.append(line)
        history.active.append(len(rows))
        if limits.budget_s is not None and start.is_cuda:
            torch.cuda.synchronize(start.device)  # otherwise the clock would see only the launching of kernels
        history.seconds.append(time.perf_counter() - began)
        taken[rows] += 1
        last = t == total - 1 or (limits.budget_s is not None and history.seconds[-1] >= limits.budget_s)
        if last:
            final[rows] = current
            break
        keep = None
        if limits.tolerance is not None and (t + 1) % limits.patience == 0:
            keep = (current - snapshot).abs().flatten(1).mean(1) >= limits.tolerance
            snapshot = current
            if bool(keep.all()):
                keep = None
        if keep is not None:
            final[rows[~keep]] = current[~keep]
            rows, current, snapshot, grad = rows[keep], current[keep], snapshot[keep], grad[keep]
            state = [s[keep] for s in state]
            if not len(rows):
                break
        current = ascent.step(current, grad, state, t)
    history.values = {name: torch.stack(line).cpu() for name, line in lines.items()}
    for name, record in history.values.items():
        if not bool(torch.isfinite(record).all()):
            raise NumericalError(f"{name} became NaN or infinite in the mask search: check the classifier's logits on perturbed images.")
    return Found(final, taken, history)


def _evaluate(current: Tensor, rows: Tensor, t: int, objective: Objective, rows_per_pass: int | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient ``[n,...]`` and recorded values ``[n]`` of the active rows, in as many passes as asked for."""
    size = rows_per_pass or len(rows)
    grads, records = [], []
    for part in range(0, len(rows), size):
        leaf = current[part : part + size].detach().requires_grad_()
        with torch.enable_grad():
            value, record = objective(leaf, rows[part : part + size], t)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        grads.append(grad)
        records.append({name: v.detach() for name, v in record.items()})
    return torch.cat(grads), {name: torch.cat([r[name] for r in records]) for name in records[0]}
