"""What a layer's patches are made of: non-negative matrix factorisation (Olah et al. 2018; Interactive Similarity Overlays, 2021)."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.errors import ConfigError

log = logging.getLogger(__name__)
_ROUNDS = 200
_CHANGE = 1e-4


def components(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``A = U V``, all of them non-negative: how much each patch holds of each component, and the components' directions.

    The start is NNDSVD, the iterations those of coordinate descent (HALS), at most 200.

    Args:
        features: ``[N,C,h,w]``, after a ReLU; negative values count as 0, and are warned of.
        count: R, the number of components.

    Returns:
        ``(U [N,h,w,R], V [R,C])``, with rows of V of length 1, and the component that weighs most in sum first.

    Raises:
        ConfigError: scikit-learn is missing, or there are fewer patches or channels than components.
    """
    try:
        from sklearn.decomposition import NMF
    except ImportError as error:
        raise ConfigError(
            "components are found by scikit-learn, which is not installed: pip install 'explainer-net[components]'."
        ) from error
    N, C, h, w = features.shape
    if not 1 <= count <= min(C, N * h * w):
        raise ConfigError(f"components must lie in 1..{min(C, N * h * w)} (patches and channels of this layer), received {count}.")
    if bool((features < 0).any()):
        log.warning("components: negative activations count as 0. Name a layer after a ReLU with --layers.")
    flat = features.clamp(min=0).permute(0, 2, 3, 1).reshape(-1, C).double().cpu().numpy()
    if not flat.any():
        return torch.zeros(N, h, w, count), torch.zeros(count, C)
    model = NMF(count, init="nndsvd", solver="cd", max_iter=_ROUNDS, tol=_CHANGE)
    weights = model.fit_transform(flat / flat.max())
    parts = np.asarray(model.components_)
    lengths = np.linalg.norm(parts, axis=1)
    weights, parts = weights * lengths * flat.max(), parts / np.where(lengths > 0, lengths, 1)[:, None]
    order = np.argsort(-weights.sum(0), kind="stable")
    return torch.from_numpy(weights[:, order]).float().view(N, h, w, count), torch.from_numpy(parts[order]).float()


def pooled(features: Tensor, grid: int) -> Tensor:
    """``[N,C,h,w]`` averaged to at most ``grid`` patches a side."""
    size = (min(features.shape[-2], grid), min(features.shape[-1], grid))
    return F.adaptive_avg_pool2d(features, size) if size != tuple(features.shape[-2:]) else features
