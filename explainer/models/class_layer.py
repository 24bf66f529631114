"""The last layer of an Explainer, computed only for the classes that are asked for: cost does not grow with K."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer.errors import ConfigError, ShapeError

_CHOSEN: ContextVar[Tensor | None] = ContextVar("chosen_classes", default=None)


@contextmanager
def only_classes(classes: Tensor | None) -> Iterator[None]:
    """Inside, every class layer that runs in this thread gives the maps of these classes only.

    Args:
        classes: class indices, ``[n]`` for all images or ``[B,n]`` for each image its own; None: all K classes.
    """
    token = _CHOSEN.set(classes)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen_classes() -> Tensor | None:
    """What :func:`only_classes` asked for in this thread."""
    return _CHOSEN.get()


def check_classes(classes: Tensor | list[int], batch: int, num_classes: int) -> Tensor:
    """Class indices as a long tensor ``[n]`` or ``[B,n]``.

    Args:
        classes: a list or tensor of whole numbers.
        batch: number of images, B.
        num_classes: number of classes K.

    Raises:
        ShapeError: another shape, or no whole numbers.
        ConfigError: an index outside of 0..K-1.
    """
    try:
        chosen = torch.as_tensor(classes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            f"classes must be class indices [n] or, for each of the {batch} images, [{batch},n]; received {classes!r}. Names have numbers: "
            "their positions in net.class_names."
        ) from error
    wrong_rows = chosen.ndim == 2 and chosen.shape[0] != batch
    if chosen.ndim not in (1, 2) or wrong_rows or chosen.numel() == 0 or chosen.is_floating_point() or chosen.dtype == torch.bool:
        raise ShapeError(
            f"classes must be class indices [n] or, for each of the {batch} images, [{batch},n]; received "
            f"{chosen.dtype} {tuple(chosen.shape)}."
        )
    if int(chosen.min()) < 0 or int(chosen.max()) >= num_classes:
        raise ConfigError(f"classes must lie in 0..{num_classes - 1}, received {int(chosen.min())} to {int(chosen.max())}.")
    return chosen.long()


class ClassConv2d(nn.Conv2d):
    """A convolution with one filter per class. Inside :func:`only_classes` it applies the filters of those classes alone."""

    def forward(self, features: Tensor) -> Tensor:
        """``[B,C,h,w]`` -> ``[B,K,h,w]``, or ``[B,n,h,w]`` for the n classes chosen."""
        chosen = chosen_classes()
        if chosen is None:
            return super().forward(features)
        bias = None if self.bias is None else self.bias[chosen]
        weight = self.weight[chosen]
        if chosen.ndim == 1:
            return F.conv2d(features, weight, bias, self.stride, self.padding, self.dilation)
        return per_image(features, weight, bias, self.padding, self.dilation)  # type: ignore[arg-type]


def per_image(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
) -> Tensor:
    """Each image convolved with its own filters.

    Args:
        features: ``[B,C,h,w]``.
        weight: ``[B,n,C,k,k]``.
        bias: ``[B,n]`` or None.
        padding, dilation: padding and dilation of the convolution; its stride is 1.

    Returns:
        ``[B,n,h,w]``.
    """
    B, n, _, *kernel = weight.shape
    maps: Tensor
    if kernel == [1, 1]:
        # A matrix product, which every export format has with a free batch size; a grouped convolution fixes it.
        maps = torch.matmul(weight.flatten(2), features.flatten(2)).unflatten(2, features.shape[-2:])
    elif torch.compiler.is_compiling():
        # A grouped convolution would fix the batch size of an exported graph: patches, and the same product.
        patches = F.unfold(features, tuple(kernel), dilation, padding)
        maps = torch.matmul(weight.flatten(2), patches).unflatten(2, features.shape[-2:])
    else:
        stacked = F.conv2d(features.flatten(0, 1)[None], weight.flatten(0, 1), None, 1, padding, dilation, groups=B)
        maps = stacked[0].unflatten(0, (B, n))
    return maps if bias is None else maps + bias[..., None, None]


def with_class_layer(network: nn.Module, num_classes: int) -> nn.Module:
    """Turn the network's last convolution, which has one filter per class, into a :class:`ClassConv2d`; weights and names stay.

    Args:
        network: maps normalised images to logits ``[B,K,h,w]``.
        num_classes: number of classes K.

    Raises:
        ConfigError: its last convolution has another number of filters, strides or groups.
    """
    last = [m for m in network.modules() if isinstance(m, nn.Conv2d)][-1]
    if last.out_channels != num_classes or last.groups != 1 or last.stride != (1, 1) or isinstance(last.padding, str):
        raise ConfigError(
            f"{type(network).__name__} does not end in a convolution with one filter for each of the {num_classes} classes "
            f"(found {last}), so classes cannot be chosen."
        )
    last.__class__ = ClassConv2d  # the same parameters and hooks, another forward
    return network
