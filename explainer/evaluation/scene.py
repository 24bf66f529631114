"""One batch as protocols see it: images, labels, ground truth, the classifier's view, and one method's maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from explainer.attribution import Attributor, DenseAttributor, FromDense
from explainer.errors import ConfigError
from explainer.metrics.classifier import class_outputs, predicted_classes
from explainer.tensors import Batch, min_max

Scale = Literal["raw", "minmax"]
DifferentiableMap = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A ready-made attributor with what the runner must know about it.

    Attributes:
        label: row of the tables.
        attributor: per-class or dense.
        fingerprint: plain values that decide its maps (name, options, weights); without the classifier's.
        scales: how its maps become masks.
        batch_size: most (image, class) pairs per call.
        differentiable_map: ``(images [B,3,H,W], class_index [B]) -> [B,h,w]`` or ``[B,C,h,w]`` with a graph to the images, for protocols
            that attack the method; None: it has none.
        needs_softplus: its gradient has no useful derivative in a ReLU network; an attack smooths the network.
        threshold: where its maps are cut into object and background, "zero" or "mean"; None: zero for methods with signs, else mean.
    """

    label: str
    attributor: Attributor | DenseAttributor
    fingerprint: dict[str, Any]
    scales: tuple[Scale, ...] = ("raw",)
    batch_size: int = 64
    differentiable_map: DifferentiableMap | None = None
    needs_softplus: bool = False
    threshold: Literal["zero", "mean"] | None = None

    @property
    def cut_at_zero(self) -> bool:
        """Whether the object is where maps are above 0, not above their mean."""
        return self.signed if self.threshold is None else self.threshold == "zero"

    @property
    def signed(self) -> bool:
        """Whether maps may be negative."""
        return bool(self.attributor.signed)

    @property
    def holds_classifier(self) -> bool:
        """Whether maps are computed from a classifier that the method holds, so that a copy of the method can be given another."""
        return isinstance(getattr(self.attributor, "explanandum", None), nn.Module)

    @property
    def needs_truth(self) -> bool:
        """Whether the method reads ground-truth masks."""
        return bool(getattr(self.attributor, "needs_masks", False))

    @property
    def reference(self) -> bool:
        """Whether the method asks no classifier, so that its row is there to be compared with."""
        return bool(getattr(self.attributor, "reference", False))

    def explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator | None = None, masks: Tensor | None = None) -> Tensor:
        """One class per image, ``[B,H,W]``, for either kind of attributor."""
        attributor = FromDense(self.attributor) if isinstance(self.attributor, DenseAttributor) else self.attributor
        return attributor(images, class_index, generator=generator, masks=masks)


@dataclass
class Scene:
    """A batch on the device.

    Attributes:
        batch: images ``[B,3,H,W]``, targets, masks, void, ids.
        indices: the samples' positions in the data set.
        explanandum: the classifier.
        classes: explain the ``labels`` or the ``predicted`` classes.
        seed: random seed of whatever a protocol draws.
        dataset: the data set, for protocols that need more than the batch (boxes at the original resolution); or None.
    """

    batch: Batch
    indices: list[int]
    explanandum: Any
    classes: Literal["labels", "predicted"] = "labels"
    seed: int = 0
    dataset: Any = None

    @property
    def images(self) -> Tensor:
        """``[B,3,H,W]``."""
        return self.batch.images

    @property
    def size(self) -> tuple[int, int]:
        """H, W."""
        return self.images.shape[-2], self.images.shape[-1]

    @cached_property
    def logits(self) -> Tensor:
        """Of the whole images, ``[B,K]``."""
        return class_outputs(self.explanandum, self.images, "logit")

    @cached_property
    def labels(self) -> Tensor:
        """True classes, bool ``[B,K]``."""
        return self.batch.targets > 0.5

    @cached_property
    def top(self) -> Tensor:
        """The most likely class ``[B]``."""
        return self.logits.argmax(1)

    @cached_property
    def predicted(self) -> Tensor:
        """Predicted classes, bool ``[B,K]``: see :func:`~explainer.metrics.classifier.predicted_classes`."""
        return predicted_classes(self.logits, self.explanandum.task)

    @cached_property
    def without_region(self) -> Tensor:
        """Classes that no pixel belongs to, bool ``[K]``."""
        names = set(getattr(self.dataset, "no_region", ()))
        if not names:
            return torch.zeros(self.labels.shape[1], dtype=torch.bool, device=self.labels.device)
        return torch.tensor([name in names for name in self.dataset.class_names], device=self.labels.device)

    @cached_property
    def explained(self) -> Tensor:
        """Classes that are explained, bool ``[B,K]``; never those that no pixel belongs to."""
        return (self.labels if self.classes == "labels" else self.predicted) & ~self.without_region

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """``(image in the batch [P], class [P])`` of every explained class."""
        rows, classes = self.explained.nonzero(as_tuple=True)
        return rows, classes

    def truth(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Object pixels of the pairs, ``[P,H,W]`` in {0,1}."""
        return self._masks[rows, classes]

    @cached_property
    def merged_truth(self) -> Tensor:
        """Union of the explained classes' objects, ``[B,H,W]``."""
        return (self._masks * self.explained[:, :, None, None]).amax(1)

    def void(self, rows: Tensor | None = None) -> Tensor | None:
        """Undefined pixels ``[B,H,W]`` (or of the rows), None if there are none."""
        void = self.batch.void
        return void if void is None or rows is None else void[rows]

    @property
    def _masks(self) -> Tensor:
        if self.batch.masks is None:
            raise ConfigError(
                "the protocol compares maps with ground-truth masks, which this data does not have: leave it out, or use other data."
            )
        return self.batch.masks


@dataclass
class Maps:
    """One method's raw maps of one batch.

    Attributes:
        method: whose maps.
        scene: the batch that the maps explain.
        raw: ``[B,K,H,W]``; NaN where a class was not asked for.
        scale: how :meth:`mask` turns maps into masks.
        generator: makes a fresh generator for further calls of the method.
    """

    method: Method
    scene: Scene
    raw: Tensor
    scale: Scale = "raw"
    generator: Callable[[], torch.Generator] = field(default=lambda: torch.Generator().manual_seed(0))

    def saliency(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Raw maps of pairs, ``[P,H,W]``."""
        return self.raw[rows, classes]

    def mask(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Masks of pairs in [0,1], ``[P,H,W]``: clamped (``raw``) or rescaled per map (``minmax``)."""
        return self.as_mask(self.saliency(rows, classes))

    def class_masks(self) -> Tensor:
        """All classes' masks in [0,1], ``[B,K,H,W]``."""
        return self.as_mask(self.raw)

    def merged(self) -> Tensor:
        """The target mask ``[B,H,W]``: maximum over the explained classes' masks, 0 without any."""
        chosen = self.scene.explained[:, :, None, None]
        return torch.where(chosen, self.class_masks(), torch.zeros((), dtype=self.raw.dtype, device=self.raw.device)).amax(1)

    def as_mask(self, maps: Tensor) -> Tensor:
        """Maps of any range as masks."""
        return min_max(maps) if self.scale == "minmax" else maps.clamp(0, 1)

    def explain(self, images: Tensor, class_index: Tensor) -> Tensor:
        """The method itself on other images (never cached), ``[B,H,W]``."""
        return self.method.explain(images, class_index, self.generator())

    def by_twin(self, twin: Attributor, rows: Tensor, classes: Tensor) -> Tensor:
        """Maps of pairs by a copy of the method (never cached), ``[P,H,W]``, with the method's batches and randomness."""
        images = self.scene.images[rows]
        parts = torch.arange(len(rows)).split(self.method.batch_size)
        return torch.cat([twin(images[part], classes[part], generator=self.generator()) for part in parts])
