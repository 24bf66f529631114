"""The one protocol of everything that explains: per-image methods and trained Explainers alike.

:class:`Attributor` answers "where does *this class* get its evidence?": ``attributor(images, class_index) -> [B,H,W]``.
:class:`DenseAttributor` answers for all classes in one pass: ``attributor(images) -> [B,K,H,W]``.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from explainer.errors import ConfigError, ShapeError

# Far above [0,1] and above normalised images (about 3), which an Explanandum with mean 0 and std 1 takes; far below 255.
_MOST = 10.0


def check_images(images: Tensor) -> None:
    """Raise :class:`ShapeError` unless ``images`` is a float tensor ``[B,C,H,W]`` with B >= 1, finite and not in 0..255."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point() or images.shape[0] == 0:
        got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(
            f"images must be a float tensor [B,C,H,W] in [0,1] with B >= 1, received {got}; add the batch axis or divide by 255."
        )
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= -_MOST and high <= _MOST):  # NaN is in no range
        bad = [i for i, image in enumerate(images.detach()) if not bool((image.abs() <= _MOST).all())]
        raise ShapeError(
            f"images must be finite and lie in [0,1], received values {low:.4g} to {high:.4g} (positions {bad[:8]} in the batch). Divide "
            "images in 0..255 by 255; the Explanandum normalises."
        )


def check_class_index(class_index: Tensor | int | list[int], images: Tensor, num_classes: int) -> Tensor:
    """``class_index`` as a long tensor ``[B]`` on the images' device. An int is used for every image."""
    try:
        index = torch.as_tensor(class_index, device=images.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"class_index must be an int, a list of ints or an integer tensor, received {class_index!r}: say which class is explained, "
            "for example logits.argmax(1)."
        ) from error
    if index.ndim == 0:
        index = index.expand(images.shape[0])
    if index.shape != images.shape[:1] or index.is_floating_point() or index.dtype == torch.bool:
        raise ShapeError(
            f"class_index must hold one integer per image, shape ({images.shape[0]},), received {index.dtype} {tuple(index.shape)}."
        )
    index = index.long()
    if int(index.min()) < 0 or int(index.max()) >= num_classes:
        raise ConfigError(f"class_index must lie in 0..{num_classes - 1}, received {index.tolist()}.")
    return index


class Attributor(abc.ABC):
    """Per-class explanation of a classifier.

    Class attributes (facts which the contract tests verify):
        needs_gradients: the method backpropagates through the classifier.
        deterministic: no random numbers are drawn.
        signed: maps may be negative (evidence against the class).
        class_specific: maps differ between classes.
        needs_masks: the method reads ground truth (sanity rows only).
        reference: the method asks no classifier; other rows are read against its own, which a table never marks as best.
        classes_share_work: :meth:`all_classes` costs less than one call per class.
        needs_attention: the method is for transformers and refuses classifiers without attention.
        passes: cost per image and class in passes through the classifier, in words.
        inner: of a method that changes another one's maps: that one.
        map_axes: sizes of the axes between image and pixels, for a method that returns more than one map an image; see :func:`one_map`.
        paper_options: options that ``mode: paper`` of an evaluation sets where the configuration does not.
        revision: raised whenever the maps change under unchanged options, so that stored maps and rows of the old ones are not reused.
    """

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    class_specific: ClassVar[bool] = True
    needs_masks: ClassVar[bool] = False
    reference: ClassVar[bool] = False
    classes_share_work: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False
    passes: ClassVar[str] = "none"
    revision: ClassVar[int] = 0
    paper_options: ClassVar[Mapping[str, Any]] = {}
    inner: Attributor | None = None
    map_axes: tuple[int, ...] = ()
    num_classes: int

    @classmethod
    def inner_method(cls, options: Mapping[str, Any]) -> tuple[str, type, Mapping[str, Any]] | None:
        """Name, class and options of :attr:`inner`, from one's own options ``method`` and ``options``; None for a method without one."""
        return None

    @classmethod
    def inner_methods(cls, options: Mapping[str, Any]) -> list[tuple[str, type, Mapping[str, Any]]]:
        """Name, class and options of every method inside, from one's own options: what decides the maps besides one's own code."""
        inner = cls.inner_method(options)
        return [] if inner is None else [inner]

    def __call__(
        self,
        images: Tensor,
        class_index: Tensor | int | list[int],
        *,
        generator: torch.Generator | None = None,
        masks: Tensor | None = None,
    ) -> Tensor:
        """Explain one class per image.

        Args:
            images: ``[B,3,H,W]`` in [0,1], float32 or float64, on the classifier's device.
            class_index: class per image, ``[B]`` or one int for all.
            generator: source of randomness (CPU generator). None: a fresh one with seed 0, so equal calls give equal maps.
            masks: ``[B,K,H,W]`` ground truth; read only by methods with ``needs_masks``.

        Returns:
            Maps ``[B,H,W]`` (``[B,*map_axes,H,W]``), detached, in the images' dtype and device; larger means more evidence.
        """
        check_images(images)
        index = check_class_index(class_index, images, self.num_classes)
        if self.needs_masks and masks is None:
            raise ConfigError(f"{self.name} needs ground-truth masks: pass masks=[B,K,H,W], or leave this row out for data without masks.")
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        maps = self._explain(images.detach(), index, generator, masks)
        expected = (images.shape[0], *self.map_axes, *images.shape[-2:])
        if tuple(maps.shape) != expected:
            raise ShapeError(f"{self.name} returned {tuple(maps.shape)}, expected {expected} (B,H,W).")
        return maps.detach().to(images.dtype)

    @abc.abstractmethod
    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        """The method itself: checked arguments in, ``[B,H,W]`` out."""

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Maps of several classes, ``[B,len(classes),H,W]`` (all K when None). Methods that share work between classes override it."""
        chosen = range(self.num_classes) if classes is None else classes
        return torch.stack([self(images, k, generator=generator, masks=masks) for k in chosen], dim=1)


def one_map(attributor: Attributor) -> Attributor:
    """The attributor itself; :class:`ConfigError` where it returns more than one map an image and the caller can use only one."""
    if attributor.map_axes:
        raise ConfigError(
            f"{attributor.name} returns {' x '.join(map(str, attributor.map_axes))} maps an image with these options, and one is needed: "
            "ask for one (output: smallest), or call the method from Python."
        )
    return attributor


class DenseAttributor(abc.ABC):
    """Explanation of all classes in one pass."""

    name: ClassVar[str]
    needs_gradients: ClassVar[bool] = False
    deterministic: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    num_classes: int

    def __call__(self, images: Tensor) -> Tensor:
        """``[B,3,H,W]`` in [0,1] -> class masks ``[B,K,H,W]``, detached."""
        check_images(images)
        maps = self._explain_all(images)
        expected = (images.shape[0], self.num_classes, *images.shape[-2:])
        if tuple(maps.shape) != expected:
            raise ShapeError(f"{self.name} returned {tuple(maps.shape)}, expected {expected} (B,K,H,W).")
        return maps.detach()

    def some(self, images: Tensor, classes: Tensor) -> Tensor:
        """Masks of each image's own classes, ``[B,n,H,W]`` for class indices ``[B,n]``. Where they cost less than all, it is overridden."""
        return self(images)[torch.arange(len(images), device=images.device)[:, None], classes]

    @abc.abstractmethod
    def _explain_all(self, images: Tensor) -> Tensor:
        """The method itself: ``[B,3,H,W]`` -> ``[B,K,H,W]``."""


class FromDense(Attributor):
    """A :class:`DenseAttributor` seen as an :class:`Attributor`: picks each image's class."""

    needs_gradients = False
    classes_share_work = True

    def __init__(self, dense: DenseAttributor) -> None:
        self.dense = dense
        self.num_classes = dense.num_classes

    @property
    def name(self) -> str:  # type: ignore[override]
        """The dense method's own name."""
        return self.dense.name

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        return self.dense.some(images, class_index[:, None])[:, 0]

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """All classes from the one forward pass."""
        maps = self.dense(images)
        return maps if classes is None else maps[:, classes]
