"""Infidelity and max-sensitivity (Yeh et al., NeurIPS 2019) as captum computes them, on ``[B,H,W]`` maps.

captum is imported on the first call. Perturbations come from a seed and are the same for every image, so scores do not depend on batching.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.metrics.classifier import Classifier, Output, class_scores
from explainer.metrics.facts import Facts
from explainer.metrics.stability import Explain


@Facts("infidelity", higher_is_better=False, bounds=(0.0, float("inf")), optimum=0.0)
def infidelity(
    explanandum: Classifier,
    images: Tensor,
    saliency: Tensor,
    class_index: Tensor,
    *,
    samples: int = 50,
    noise: float = 0.1,
    normalize: bool = True,
    output: Output = "logit",
    seed: int = 0,
) -> Tensor:
    """``E_I (a I.phi - (F(x) - F(x - I)))^2`` over Gaussian shifts I of whole pixels (all channels alike), ``[B]`` in [0,inf).

    Args:
        explanandum: classifier.
        images: ``[B,3,H,W]`` in [0,1].
        saliency: ``[B,H,W]``.
        class_index: ``[B]``.
        samples: number of perturbations.
        noise: their standard deviation in [0,1] units.
        normalize: scale the map optimally first (a; makes maps of different units comparable), else a = 1.
        output: what is read from the classifier: ``probability``, ``softmax``, ``sigmoid`` or ``logit``.
        seed: random seed of the perturbations.
    """
    from captum.metrics import infidelity as captum_infidelity

    number = len(images)
    shifts = noise * torch.randn((samples, 1, *images.shape[2:]), generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    shifts = shifts.to(images.device)

    def forward(offsets: Tensor) -> Tensor:
        # One row per image at first, then `samples` consecutive rows per image.
        rows = torch.arange(number, device=images.device).repeat_interleave(len(offsets) // number)
        # In parts as large as the batch, so that memory does not grow with the number of samples.
        parts = zip(rows.split(number), offsets.split(number), strict=True)
        return torch.cat([class_scores(explanandum, images[row] + offset, class_index[row], output) for row, offset in parts])

    def perturb(offsets: Tensor) -> tuple[Tensor, Tensor]:
        drawn = shifts.repeat(number, 1, 1, 1)
        return drawn, offsets - drawn

    unknown = saliency.flatten(1).isnan().any(1)
    value: Tensor = captum_infidelity(
        forward, perturb, torch.zeros_like(images[:, :1]), saliency.to(images)[:, None], n_perturb_samples=samples, normalize=normalize
    )
    # With the optimal scale captum expands the square, which rounding can push below 0.
    return value.double().clamp(min=0).masked_fill(unknown, torch.nan)


@Facts("max_sensitivity", higher_is_better=False, bounds=(0.0, float("inf")), optimum=0.0)
def max_sensitivity(
    attributor: Explain, images: Tensor, class_index: Tensor, *, samples: int = 10, radius: float = 0.02, seed: int = 0
) -> Tensor:
    """``max_j ||phi(x_j) - phi(x)|| / ||phi(x)||`` over images ``x_j`` within ``radius`` of x in every value, ``[B]`` in [0,inf).

    ``samples`` uniform perturbations; NaN where the map is all zero (nothing to divide by) or holds a NaN.
    """
    from captum.metrics import sensitivity_max

    number = len(images)
    draws = torch.rand((samples, *images.shape[1:]), generator=torch.Generator().manual_seed(seed), dtype=images.dtype)
    steps = radius * (2 * draws.to(images.device) - 1)

    def explain(inputs: tuple[Tensor, ...] | Tensor) -> tuple[Tensor]:
        rows = inputs if isinstance(inputs, Tensor) else inputs[0]
        classes = class_index.repeat_interleave(len(rows) // number)
        parts = zip(rows.split(number), classes.split(number), strict=True)
        with torch.enable_grad():  # captum calls this without gradients, which many methods need
            return (torch.cat([attributor(part, index).detach() for part, index in parts]),)

    def perturb(inputs: tuple[Tensor, ...] | Tensor, *_: Any) -> Tensor:
        rows = inputs if isinstance(inputs, Tensor) else inputs[0]
        return rows + steps.repeat(number, 1, 1, 1)

    reference = explain(images)[0].flatten(1)
    value: Tensor = sensitivity_max(explain, images, perturb_func=perturb, n_perturb_samples=samples)
    undefined = reference.isnan().any(1) | (reference == 0).all(1)
    return value.double().masked_fill(undefined, torch.nan)
