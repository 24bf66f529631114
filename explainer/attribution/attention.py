"""Attention taken apart while a transformer runs, whichever library wrote it.

timm and Hugging Face call the fused ``scaled_dot_product_attention``, torchvision calls
``multi_head_attention_forward``: neither shows its attention matrix. :class:`OpenAttention` watches the torch
operations of a forward pass and runs those two as the elementary operations they stand for (matmul, scale,
softmax, matmul). Nothing of the network is touched, so there is nothing to restore.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from explainer.errors import UnsupportedLayerError

WITHOUT_ATTENTION = "gradient, integrated_gradients, grad_cam, rise, extremal_perturbation"


def operation_name(func: Any) -> str:
    """Plain name of a torch function, method, operator or attribute: ``Tensor.__matmul__`` -> matmul,
    ``Tensor.mT`` -> mT.
    """
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return getattr(func.__self__, "__name__", "") + ("=" if name == "__set__" else "")
    return name.strip("_") if name.startswith("__") else name


class OpenAttention(TorchFunctionMode):
    """Inside ``with OpenAttention(classifier, method):`` attention runs as elementary operations.

    Subclasses override :meth:`operate`, which every operation of the forward pass goes through.

    Args:
        classifier: the network whose module paths messages name.
        method: who watches, for messages.
    """

    def __init__(self, classifier: nn.Module, method: str) -> None:
        super().__init__()
        self.classifier, self.method = classifier, method
        self.place: list[tuple[str, nn.Module]] = []
        self.in_multi_head = False
        self.error: UnsupportedLayerError | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The mode is on, and :attr:`place` is the chain of modules that are running, outermost first."""
        handles = []
        for path, module in self.classifier.named_modules():
            handles.append(module.register_forward_pre_hook(lambda m, _, path=path: self.place.append((path, m))))
            handles.append(module.register_forward_hook(lambda m, _, out: self.place.pop() and None))
        try:
            with self:
                yield
        except TypeError as error:
            # Python's operators turn a TypeError, which an UnsupportedLayerError is, into their own vaguer
            # one.
            raise (self.error or error) from None
        finally:
            for handle in handles:
                handle.remove()

    def unsupported(self, what: str, remedy: str) -> UnsupportedLayerError:
        """An error that names the method, the operation and the module that ran it."""
        path, module = self.place[-1] if self.place else ("", self.classifier)
        where = f"layer {path!r} ({type(module).__name__})" if path else f"the forward of {type(module).__name__}"
        self.error = UnsupportedLayerError(f"{self.method} cannot pass through {what} in {where}. {remedy}")
        return self.error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = operation_name(func)
        if name == "scaled_dot_product_attention":
            return self.attend(*args, **kwargs)
        if name == "multi_head_attention_forward":
            return self.multi_head(*args, **kwargs)
        return self.operate(name, func, args, kwargs)

    def operate(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One elementary operation. ``name`` is plain, with ``_`` at its end where it changes its argument in
        place.
        """
        return func(*args, **kwargs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``softmax(q k' * scale + mask) v``, each ``[...,N,d]``; the arguments are those of
        ``scaled_dot_product_attention``.
        """
        if is_causal or dropout_p > 0:
            raise self.unsupported(
                "causal attention or attention in training mode", f"Use a method without attention: {WITHOUT_ATTENTION}."
            )
        with self:
            return self._attend(query, key, value, attn_mask, scale, enable_gqa)[0]

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What :meth:`attend` returns, and the attention matrix. The mode must be on, once: twice, every
        operation would be seen twice.
        """
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
        scores = (query @ key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
            scores = scores + attn_mask
        attention = scores.softmax(dim=-1)
        return attention @ value, attention

    def multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of ``nn.MultiheadAttention``, tokens first: ``[N,B,D]``; the arguments are those of
        ``multi_head_attention_forward``.
        """
        masked = any(m is not None for m in (bias_k, bias_v, key_padding_mask, attn_mask, rest.get("static_k"), rest.get("static_v")))
        itself = query is key and key is value and query.ndim == 3
        if in_proj_weight is None or masked or add_zero_attn or training or not itself:
            raise self.unsupported("nn.MultiheadAttention other than plain self-attention", f"Use one of: {WITHOUT_ATTENTION}.")
        tokens, batch, width = query.shape
        self.in_multi_head = True
        try:
            with self:
                packed = nn.functional.linear(query, in_proj_weight, in_proj_bias)
                heads = packed.view(tokens, batch, 3, num_heads, width // num_heads).permute(2, 1, 3, 0, 4)
                q, k, v = heads.unbind(0)
                out, attention = self._attend(q, k, v)
                out = out.permute(2, 0, 1, 3).reshape(tokens, batch, width)
                out = nn.functional.linear(out, out_proj_weight, out_proj_bias)
                if not need_weights:
                    return out, None
                return out, attention.mean(dim=1) if average_attn_weights else attention
        finally:
            self.in_multi_head = False


class TokenWatch(OpenAttention):
    """Also finds where the tokens come from: the last feature map before the first attention is the grid of
    patches.

    Attributes:
        grid: rows and columns of that map, None before.
        padded: height and width of what the first convolution read: the image, with the padding that the
            network added.
        attentions: the attention matrices ``[B,heads,N,M]`` in forward order, with the module that ran them.
    """

    def __init__(self, classifier: nn.Module, method: str) -> None:
        super().__init__(classifier, method)
        self.grid: tuple[int, int] | None = None
        self.padded: tuple[int, int] | None = None
        self.attentions: list[tuple[str, Tensor]] = []

    def operate(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Watches convolutions and softmaxes."""
        out = self.run(name, func, args, kwargs)
        if name == "conv2d" and not self.attentions and out.ndim == 4:
            image = args[0] if args else kwargs["input"]
            self.padded = self.padded or (image.shape[-2], image.shape[-1])
            self.grid = (out.shape[-2], out.shape[-1])
        if name == "softmax" and out.ndim == 4:
            out = self.seen(out)
            self.attentions.append((self.place[-1][0] if self.place else "", out))
        return out

    def run(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation itself; for subclasses."""
        return func(*args, **kwargs)

    def seen(self, attention: Tensor) -> Tensor:
        """What goes on in the place of an attention matrix; for subclasses."""
        return attention

    def prefix(self, batch: int, size: tuple[int, int]) -> int:
        """Tokens in front of the patches (class token, distillation token, registers).

        Args:
            batch: number of images that ran.
            size: height and width of the classifier's input. Where no convolution made the patches, the grid is the one of
                the image's proportions that leaves the fewest prefix tokens.

        Raises:
            UnsupportedLayerError: there is no attention, or not every layer attends from all tokens of one
            image to all of them.
        """
        name = type(self.classifier).__name__
        if not self.attentions:
            raise UnsupportedLayerError(
                f"{self.method} reads the attention between tokens, but no attention [B,heads,N,N] ran in {name}. "
                f"Use a method for networks without it: {WITHOUT_ATTENTION}."
            )
        first = self.attentions[0][1]
        for path, attention in self.attentions:
            if attention.shape != first.shape or attention.shape[-1] != attention.shape[-2]:
                raise self._not_global(path, f"{tuple(attention.shape)} after {tuple(first.shape)} in the first layer")
        if self.grid is None:
            self.grid, self.padded = _proportional(first.shape[-1], size), size
        patches = math.prod(self.grid) if self.grid else 0
        if self.grid is None or first.shape[-1] < patches or first.shape[0] != batch:
            raise self._not_global(self.attentions[0][0], f"{tuple(first.shape)} for {batch} images of {self.grid} patches")
        return first.shape[-1] - patches

    def _not_global(self, path: str, found: str) -> UnsupportedLayerError:
        return UnsupportedLayerError(
            f"{self.method} needs attention [B,heads,N,N] from all tokens of an image to all of them in every layer, but layer {path!r} "
            f"has {found} (windows, merged tokens or a pooling attention). Use attn_lrp, cp_lrp, integrated_gradients or grad_cam."
        )


def _proportional(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The largest grid of at most ``tokens`` patches, at most 16 fewer, with the proportions of ``size``."""
    for patches in range(tokens, max(0, tokens - 17), -1):
        rows = math.isqrt(patches * size[0] // size[1])
        if rows > 0 and patches % rows == 0 and rows * size[1] == patches // rows * size[0]:
            return rows, patches // rows
    return None
