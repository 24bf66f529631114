"""Fidelity: does the attribution of a set of pixels predict how much their removal costs?

Bhatt et al., IJCAI 2020; SRD (ICLR 2024) Table 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from explainer.errors import ConfigError
from explainer.fills import FillKind
from explainer.metrics.classifier import Classifier, Output, class_scores, removal_fill
from explainer.metrics.correlation import pearson
from explainer.metrics.facts import Facts

Unit = Literal["pixel", "feature"]


@Facts("fidelity", higher_is_better=True, bounds=(-1.0, 1.0), optimum=1.0)
def fidelity(
    explanandum: Classifier,
    images: Tensor,
    saliency: Tensor,
    class_index: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 200,
    fill: FillKind | Tensor = "mean",
    unit: Unit = "pixel",
    output: Output = "logit",
    seed: int = 0,
) -> Tensor:
    """Pearson correlation over random subsets S of ``sum_{i in S} saliency_i`` and ``F_c(x) - F_c(x without S)``, ``[B]`` in [-1,1].

    Args:
        explanandum: classifier.
        images: ``[B,C,H,W]`` in [0,1].
        saliency: ``[B,H,W]``, prepared as :func:`explainer.metrics.preparation.prepare` does.
        class_index: ``[B]``.
        subsets: number of subsets (the paper does not say; Quantus: 100).
        subset_size: distinct pixels per subset (Quantus: 224).
        fill: ``mean`` is 0 in the normalised image.
        unit: ``pixel`` removes all channels together; ``feature`` draws among the ``C*H*W`` scalars, as Quantus does.
        output: the paper uses logits.
        seed: random seed of the subsets, which are the same for every image and every method.

    NaN where the sums or the drops do not vary (constant map), or the map holds a NaN.
    """
    units = saliency[0].numel() * (images.shape[1] if unit == "feature" else 1)
    if unit not in ("pixel", "feature") or not 1 <= subset_size <= units or subsets < 2:
        raise ConfigError(
            f"fidelity needs unit 'pixel' or 'feature', at least 2 subsets and subset_size in 1..{units} for these images, "
            f"received {unit!r}, {subsets} and {subset_size}."
        )
    generator = torch.Generator().manual_seed(seed)
    background = removal_fill(explanandum, images, fill).expand_as(images)
    whole = class_scores(explanandum, images, class_index, output)
    shape = (images.shape[1] if unit == "feature" else 1, *images.shape[2:])
    sums, drops = [], []
    for _ in range(subsets):
        chosen = torch.zeros(units, dtype=torch.bool)
        chosen[torch.randperm(units, generator=generator)[:subset_size]] = True
        chosen = chosen.reshape(shape).to(images.device)
        sums.append((saliency.double() * chosen.sum(0)).sum((1, 2)))
        drops.append(whole - class_scores(explanandum, torch.where(chosen, background, images), class_index, output))
    sums_, drops_ = torch.stack(sums, 1), torch.stack(drops, 1)
    value = pearson(sums_, drops_)
    # Equal pixels may add up to sums that differ in the last digit only: that is no variance.
    flat = saliency.flatten(1)
    return value.masked_fill((flat == flat[:, :1]).all(1), torch.nan)
