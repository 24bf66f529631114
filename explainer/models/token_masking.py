"""Images with parts left out instead of filled: a vision transformer runs on the tokens that a mask keeps.

A fill shows the classifier something else, which it may take for evidence. A transformer needs no fill: a token
that no other token attends to is not there. Where a mask is soft, its token counts in part, and gradients reach
the mask.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from explainer.attribution.attention import TokenWatch
from explainer.errors import ShapeError, UnsupportedLayerError

_FILLS = "Use masking.fill mean, blur or another that replaces pixels."
_probed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def weighted_softmax(scores: Tensor, weights: Tensor) -> Tensor:
    """``w_j exp(s_ij) / sum_k w_k exp(s_ik)``: the softmax of ``s + log w``, also where ``w`` is 0.

    Keys of weight 0 are left out exactly, keys of weight 1 count fully. The gradient with respect to a weight is
    finite at 0, where that of ``log w`` is not. A row without any key becomes 0.

    Args:
        scores: ``[...,N,M]``.
        weights: how much each token counts in [0,1], broadcastable to ``scores``.
    """
    top = scores.detach().masked_fill(weights == 0, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    # A key that is left out may lie above the others without end; its gradient is cut there.
    shares = weights * (scores - top).clamp(max=60).exp()
    return shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)


class MaskedTokens(TokenWatch):
    """Inside, patches count in attention and in the mean over tokens as much as a mask keeps of them.

    Args:
        classifier: the network.
        mask: ``[B,H,W]`` in [0,1] at the size of the classifier's input; a patch's weight is its mean over the patch.
    """

    def __init__(self, classifier: nn.Module, mask: Tensor) -> None:
        super().__init__(classifier, "fill 'tokens'")
        self.mask = mask

    def weights(self, tokens: int) -> Tensor | None:
        """Weights ``[B,tokens]``, 1 for prefix tokens; None where there are fewer tokens than patches."""
        if self.grid is None or self.padded is None or tokens < self.grid[0] * self.grid[1]:
            return None
        bottom, right = (max(0, p - s) for p, s in zip(self.padded, self.mask.shape[-2:], strict=True))
        padded = functional.pad(self.mask[:, None], (0, right, 0, bottom), mode="replicate")
        patches = functional.adaptive_avg_pool2d(padded, self.grid).flatten(1)
        return functional.pad(patches, (tokens - patches.shape[1], 0), value=1.0)

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Softmaxes over keys and means over tokens are weighted."""
        if name not in ("softmax", "mean"):
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if name == "softmax" and x.ndim == 4 and dim in (-1, 3):
            weights = self.weights(x.shape[-1]) if len(x) == len(self.mask) else None
            if weights is None:
                raise self.unsupported(f"attention {tuple(x.shape)}, which is not over all patches of an image,", _FILLS)
            return weighted_softmax(x, weights[:, None, None].to(x.dtype))
        if name == "mean" and x.ndim == 3 and dim in (1, -2) and self.attentions:
            weights = self.weights(x.shape[1])
            if weights is not None:
                share = weights[..., None].to(x.dtype)
                total = share.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
                pooled = (x * share).sum(1, keepdim=True) / total
                return pooled if kwargs.get("keepdim", False) else pooled[:, 0]
        return func(*args, **kwargs)


def forward_masked(explanandum: Any, images: Tensor, mask: Tensor) -> Tensor:
    """Logits of a vision transformer on the tokens that a mask keeps.

    A patch of mask 0 is left out: the logits are those of the network run on the other tokens, at their places. In
    between, a patch weighs as a key of attention what the mask keeps of it (``log m`` is added to its scores), and
    gradients reach the mask. Class, distillation and register tokens always stay. With a mask of ones: the plain logits.

    Args:
        explanandum: the :class:`~explainer.models.explanandum.Explanandum` of a ViT.
        images: ``[B,3,H,W]`` in [0,1].
        mask: ``[B,H,W]`` or ``[B,1,H,W]`` in [0,1]; a patch's weight is its mean over the patch.

    Returns:
        Logits ``[B,K]``.

    Raises:
        UnsupportedLayerError: a classifier without attention over all tokens, or one in which pixels that are left out
            still have an effect (a convolution across patches, another pooling). Asked of every classifier once.
    """
    mask = mask[:, 0] if mask.ndim == 4 else mask
    if mask.shape != (len(images), *images.shape[-2:]):
        raise ShapeError(f"mask must be [B,H,W] of the images' size, received {tuple(mask.shape)} for {tuple(images.shape)}.")
    classifier = explanandum.classifier
    if classifier not in _probed:
        _probe(explanandum, images[:1].detach())
        _probed.add(classifier)
    return _run(explanandum, images, mask)[0]


def _run(explanandum: Any, images: Tensor, mask: Tensor) -> tuple[Tensor, MaskedTokens]:
    side = explanandum.input_size
    if side is not None and mask.shape[-2:] != (side, side):
        mask = functional.interpolate(mask[:, None], (side, side), mode="bilinear", align_corners=False)[:, 0]
    watch = MaskedTokens(explanandum.classifier, mask)
    with watch.watching():
        logits = explanandum(images)
    if not watch.attentions:
        raise UnsupportedLayerError(
            f"fill 'tokens' leaves tokens out of attention, but no attention ran in {type(explanandum.classifier).__name__}. {_FILLS}"
        )
    return logits, watch


def _probe(explanandum: Any, image: Tensor) -> None:
    """Refuse a classifier in which the pixels of patches that are left out have an effect: seen on a chessboard of patches."""
    side = explanandum.input_size
    with torch.no_grad():
        if side is not None:
            image = functional.interpolate(image, (side, side), mode="bilinear", align_corners=False)
        watch = _run(explanandum, image, torch.ones_like(image[:, 0]))[1]
        assert watch.grid is not None and watch.padded is not None
        rows, columns = (torch.arange(n, device=image.device) for n in watch.grid)
        board = ((rows[:, None] + columns) % 2).to(image)[None, None]
        mask = functional.interpolate(board, watch.padded, mode="nearest")[:, :, : image.shape[-2], : image.shape[-1]]
        first, second = (_run(explanandum, x, mask[:, 0])[0] for x in (image, image * mask + (1 - image) * (1 - mask)))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max())):
        raise UnsupportedLayerError(
            f"fill 'tokens': in {type(explanandum.classifier).__name__} the pixels of patches that are left out still "
            f"change the logits (by {float((first - second).abs().max()):.2g}): something other than attention or a mean "
            f"carries them on. {_FILLS}"
        )
