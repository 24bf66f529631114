"""Stability: how much a map changes when the image hardly does. Alvarez-Melis & Jaakkola, 2018; SRD (ICLR 2024) eq. 27."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.metrics.classifier import Classifier
from explainer.metrics.facts import Facts
from explainer.metrics.preparation import Norm, prepare

#: ``attributor(images [B,3,H,W], class_index [B]) -> [B,h,w]``
Explain = Callable[[Tensor, Tensor], Tensor]


@Facts("stability", higher_is_better=False, bounds=(0.0, float("inf")), optimum=0.0)
def stability(
    attributor: Explain,
    explanandum: Classifier,
    images: Tensor,
    class_index: Tensor,
    *,
    samples: int = 200,
    noise: float = 0.1,
    norm: Norm = "max",
    seed: int = 0,
) -> Tensor:
    """``max_j ||phi(x) - phi(x_j)||_2 / ||x - x_j||_2`` with ``x_j = x + N(0, noise^2)`` per normalised input scalar, ``[B]`` in [0,inf).

    Args:
        attributor: maps of one class per image; the class stays that of the unperturbed image.
        explanandum: its ``std`` turns the noise of the normalised input into [0,1] units; nothing is clipped.
        images: ``[B,3,H,W]`` in [0,1].
        class_index: ``[B]``.
        samples: number of x_j. The maximum grows with it, so report it with the score.
        noise: standard deviation in the normalised input.
        norm: all maps are prepared alike (:func:`explainer.metrics.preparation.prepare`).
        seed: random seed of the noise, which is the same for every image and every method.

    NaN if a map holds a NaN. A method that ignores the image scores 0.
    """
    if samples < 1 or noise <= 0:
        raise ConfigError(f"stability needs samples >= 1 and noise > 0, received {samples} and {noise}.")
    size = (images.shape[2], images.shape[3])
    generator = torch.Generator().manual_seed(seed)
    std = explanandum.std.to(images).reshape(1, -1, 1, 1)
    reference = prepare(attributor(images, class_index), size, norm).double()
    worst = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    for _ in range(samples):
        step = noise * torch.randn(images.shape[1:], generator=generator, dtype=images.dtype).to(images.device)
        changed = prepare(attributor(images + step * std, class_index), size, norm).double()
        ratio = (changed - reference).flatten(1).norm(dim=1) / (step.double().norm() + 1e-10)
        worst = torch.maximum(worst, ratio)
    return worst
