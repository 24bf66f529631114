"""DeepLIFT-SHAP (Lundberg, Lee 2017; Shrikumar, Greenside, Kundaje 2017): DeepLIFT averaged over reference images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from explainer.attribution.watching import place_of, refuse_compiled
from explainer.baselines.gradient_shap import reference_images
from explainer.baselines.kernels.channels import ChannelBaseline
from explainer.baselines.kernels.functions import module_stack
from explainer.baselines.kernels.maps import Reduction
from explainer.baselines.kernels.operations import ACTIVATIONS, CLAMPS, PRODUCTS, QUOTIENTS, overwrites, plain_name
from explainer.errors import ConfigError, UnsupportedLayerError

_ELEMENTWISE = ACTIVATIONS | CLAMPS | {"exp", "log", "sqrt", "rsqrt", "square", "abs"}
_MAX_POOLS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "max_pool2d": functional.max_pool2d_with_indices,
    "adaptive_max_pool2d": functional.adaptive_max_pool2d_with_indices,
}
_NO_RULE = {
    "max_pool1d",
    "max_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool3d",
    "layer_norm",
    "group_norm",
    "instance_norm",
    "softmax",
    "log_softmax",
    "pow",
    "norm",
    "vector_norm",
    "normalize",
    "maximum",
    "minimum",
    "max",
    "amax",
    "min",
    "amin",
    "logsumexp",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
}
_PRODUCTS = PRODUCTS | QUOTIENTS | {"matmul", "bmm", "mm", "einsum", "addcmul", "rtruediv"}
_SMALL = 1e-10


class _RescaleElementwise(torch.autograd.Function):
    """``f`` applied to a batch of images and their references; backward multiplies by ``delta f / delta x`` (rescale rule, eq. 9).

    Where ``|delta x| < 1e-10`` the derivative stands in. Only the images' half has gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        y = function(x.clone())
        ctx.function = function
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        (x1, x0), (y1, y0), gradient = x.chunk(2), y.chunk(2), grads[0].chunk(2)[0]
        with torch.enable_grad():
            leaf = x1.detach().requires_grad_()
            (derivative,) = torch.autograd.grad(ctx.function(leaf.clone()).sum(), leaf)
        step = x1 - x0
        flat = step.abs() < _SMALL
        slope = torch.where(flat, derivative, (y1 - y0) / step.masked_fill(flat, 1))
        return torch.cat([gradient * slope, torch.zeros_like(x0)]), None


class _RescaleMaxPool(torch.autograd.Function):
    """Max pooling of images and references; what the maximum changed is credited to the winners on both sides.

    With ``t = max(y1, y0)``: ``t - y0`` to the image's winner and ``y1 - t`` to the reference's winner, overlapping windows added.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        y, winners = pool(x)
        ctx.save_for_backward(x, y, winners)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, y, winners = ctx.saved_tensors
        (x1, x0), (y1, y0), (w1, w0) = x.chunk(2), y.chunk(2), winners.flatten(2).chunk(2)
        gradient = grads[0].chunk(2)[0]
        top = torch.maximum(y1, y0)
        credit = torch.zeros_like(x1).flatten(2)
        credit.scatter_add_(2, w1, (gradient * (top - y0)).flatten(2))
        credit.scatter_add_(2, w0, (gradient * (y1 - top)).flatten(2))
        plain = torch.zeros_like(credit).scatter_add_(2, w1, gradient.flatten(2))
        step = (x1 - x0).flatten(2)
        flat = step.abs() < _SMALL
        slope = torch.where(flat, plain, credit / step.masked_fill(flat, 1))
        return torch.cat([slope.view_as(x1), torch.zeros_like(x0)]), None


def _call(function: Callable[..., Any], others: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Any:
    return function(x, *others, **kwargs)


class _RescaleMode(TorchFunctionMode):
    """Gives every nonlinearity that runs the rescale rule, and remembers the first that has none."""

    def __init__(self, stack: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.stack = stack
        self.refusal = ""

    def _refuse(self, what: str) -> None:
        # kept for the end: Python turns a TypeError out of an operator (x * y) into "unsupported operand"
        path, module = self.stack[-1] if self.stack else ("", None)
        place = "the Explanandum" if module is None else place_of(path, module)
        self.refusal = self.refusal or (
            f"deeplift_shap has no rule for {what}, called by {place}. Use gradient_shap or integrated_gradients for this classifier."
        )

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        raw = getattr(func, "__name__", "")
        name, _ = plain_name(raw)
        moving = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        if name in _PRODUCTS and len(moving) > 1:
            self._refuse(f"the product of two activations ({name})")
        if name in _NO_RULE and moving:
            self._refuse(name)
        x = args[0] if args else kwargs.get("input")
        if not (isinstance(x, Tensor) and x.requires_grad and (name in _ELEMENTWISE or name in _MAX_POOLS)):
            return func(*args, **kwargs)
        kwargs.pop("input", None)
        # The graph keeps the closure below. It must not keep the tensor that is written in place, whose graph this is: neither of them
        # would ever be freed. So it gets the other arguments alone.
        others = tuple(args[1:])
        if name in _MAX_POOLS:
            kwargs.pop("return_indices", None)
            return _RescaleMaxPool.apply(x, partial(_call, _MAX_POOLS[name], others, kwargs))
        if not overwrites(raw, kwargs):
            return _RescaleElementwise.apply(x, partial(_call, func, others, kwargs))
        return x.copy_(_RescaleElementwise.apply(x.clone(), partial(_call, func, others, kwargs)))


class DeepLiftShap(ChannelBaseline):
    """Mean over references of DeepLIFT's rescale rule ``(x - r) * m``; summed over channels, so signed.

    The map sums to ``s_k(x) - mean s_k(references)``. Equal to captum's ``DeepLiftShap`` where that is right; captum's is not used
    because its max pooling is wrong (completeness fails behind a ReLU, and for overlapping windows), it refuses modules that are used
    twice (every torchvision ResNet) and silently takes the plain gradient of functional activations. Here the calls themselves get the
    rule, wherever they come from.

    Args:
        baselines: ``[N,C,H,W]`` references in [0,1]; None: black, grey, white and the classifier's mean colour.
        batch_size: pairs of image and reference per pass.
        reduction, smooth: how channels become one map, and the width of a final Gaussian blur; see
            :class:`~explainer.baselines.kernels.channels.ChannelBaseline`.

    Raises:
        UnsupportedLayerError: products of activations (gates, attention), layer or group norms, softmax, scripted or compiled parts.
    """

    name = "deeplift_shap"
    signed = True
    default_reduction = "sum"
    passes: ClassVar[str] = "N x (2 forward + 2 backward), N references (4)"

    def __init__(
        self,
        explanandum: Any,
        baselines: Tensor | None = None,
        batch_size: int = 16,
        reduction: Reduction | None = None,
        smooth: float = 0.0,
    ) -> None:
        super().__init__(explanandum, reduction, smooth)
        if batch_size < 1:
            raise ConfigError(f"deeplift_shap: batch_size must be at least 1, received {batch_size}.")
        self.baselines, self.batch_size = baselines, batch_size

    def _channels(self, images: Tensor, class_index: Tensor, generator: torch.Generator) -> Tensor:
        refuse_compiled(self.explanandum.classifier, self.name)
        references = reference_images(self.explanandum, images, self.baselines)
        count = len(references)
        maps = torch.zeros_like(images)
        for pair in torch.arange(len(images) * count, device=images.device).split(self.batch_size):
            image, start = images[pair // count], references[pair % count]
            multiplier = self._multipliers(image, start, class_index[pair // count])
            maps.index_add_(0, pair // count, (image - start) * multiplier / count)
        return maps

    def _multipliers(self, images: Tensor, references: Tensor, class_index: Tensor) -> Tensor:
        """DeepLIFT's ``m`` of each pair, ``[n,C,H,W]``."""
        with torch.enable_grad(), module_stack(self.explanandum.classifier) as stack:
            leaf = images.detach().clone().requires_grad_()
            with _RescaleMode(stack) as mode:
                logits = self.explanandum(torch.cat([leaf, references]))
            if mode.refusal:
                raise UnsupportedLayerError(mode.refusal)
            scores = logits[: len(images)].gather(1, class_index[:, None]).sum()
            return torch.autograd.grad(scores, leaf)[0]
