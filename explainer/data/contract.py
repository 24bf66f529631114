"""What every data set yields (:class:`Sample`), and how samples become a batch."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from explainer.data.samplers import sample_seed
from explainer.errors import ConfigError, ShapeError
from explainer.geometry import Size, as_size, height_width
from explainer.tensors import Batch

__all__ = ["SPLITS", "ExplainerDataset", "Sample", "Task", "collate"]

SPLITS = ("train", "val", "test")
Task = Literal["multilabel", "multiclass"]


@dataclass
class Sample:
    """One image with its labels.

    Attributes:
        image: ``[3,H,W]`` float, RGB in [0,1].
        target: ``[K]`` float multi-hot (one-hot for single-label data sets).
        id: stable and unique within the split.
        masks: ``[K,H,W]`` in {0,1} of any dtype (bool travels fastest), object pixels of each class, or None without ground truth.
        void: ``[H,W]`` bool, True where the ground truth is undefined, or None where it is defined everywhere.
        cues: ``[K,H,W]`` in {0,1}, pixels of planted shortcut cues, or None.
        epoch: epoch of the augmentation; the loaders set it.
    """

    image: Tensor
    target: Tensor
    id: str
    masks: Tensor | None = None
    void: Tensor | None = None
    cues: Tensor | None = None
    epoch: int = 0


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples into a :class:`Batch`; masks and cues become float like the images.

    Where only some samples have masks, the others get empty masks and a ``void`` that is True everywhere: undefined ground truth,
    which every metric leaves out. ``masks`` is None only if no sample has any. A missing ``void`` beside masks is False
    everywhere; missing cues beside others' cues are empty (no cue was planted).

    Raises:
        ShapeError: samples differ in size or number of classes (names both ids).
    """
    first = samples[0]
    for s in samples:
        if s.image.shape != first.image.shape or s.target.shape != first.target.shape:
            raise ShapeError(
                f"samples of one batch must agree in size and classes: {first.id!r} has image {tuple(first.image.shape)} and target "
                f"{tuple(first.target.shape)}, {s.id!r} has {tuple(s.image.shape)} and {tuple(s.target.shape)}. Use one `size`."
            )
    images = torch.stack([s.image for s in samples])
    B, _, H, W = images.shape
    K = first.target.shape[0]

    def stack(parts: list[Tensor | None], name: str) -> Tensor | None:
        if all(p is None for p in parts):
            return None
        out = images.new_zeros(B, K, H, W)
        for row, part, s in zip(out, parts, samples, strict=True):
            if part is not None:
                if part.shape != row.shape:
                    raise ShapeError(f"{name} of {s.id!r} is {tuple(part.shape)}, expected (K,H,W) = {tuple(row.shape)}.")
                row.copy_(part)
        return out

    masks = stack([s.masks for s in samples], "masks")
    void = None
    if masks is not None and any(s.void is not None or s.masks is None for s in samples):
        void = torch.zeros(B, H, W, dtype=torch.bool)
        for row, s in zip(void, samples, strict=True):
            if s.masks is None:
                row.fill_(True)
            elif s.void is not None:
                row.copy_(s.void)
    targets = torch.stack([s.target for s in samples]).to(images.dtype)
    ids, epochs = tuple(s.id for s in samples), tuple(s.epoch for s in samples)
    return Batch(images, targets, masks, void, ids, stack([s.cues for s in samples], "cues"), epochs)


class ExplainerDataset(Dataset[Sample], ABC):
    """Base of every data set. A concrete class has a ``name`` and takes at least the keywords ``split`` and ``size``.

    Attributes:
        class_names: names of the K classes, in the order of the targets.
        task: "multilabel" (several classes an image) or "multiclass" (exactly one).
        split: "train", "val" or "test".
        size: size of the images in pixels: the side of squares, or (height, width).
        geometry: how a picture becomes the image, see :mod:`explainer.geometry`.
        no_region: names of the classes that no pixel belongs to ("no defect", "background"): they need no mask of their own.
        epoch, augmentation_seed: with the index, all that random augmentation may depend on.
    """

    name: ClassVar[str]
    class_names: tuple[str, ...]
    task: Task
    split: str
    size: Size
    geometry: str = "squash"
    no_region: tuple[str, ...] = ()
    epoch: int = 0
    augmentation_seed: int = 0

    def __init__(self, split: str, size: int | Sequence[int]) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        checked = as_size(size)
        if checked is None:
            raise ConfigError(f"size must be a whole number of pixels in [8, 4096], or two: [height, width]; got {size!r}.")
        self.split, self.size = split, checked

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return height_width(self.size)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """One sample, a function of ``index`` and of (augmentation_seed, epoch) only. Raises CorruptSampleError naming the file."""

    def keep(self, indices: Sequence[int]) -> None:
        """Serve only these samples from now on, in this order. Data sets that can be cut override it."""
        raise ConfigError(f"data set {self.name!r} cannot be sampled: use limit, which takes the first images.")

    #: Whether :meth:`target` is free; else it makes the whole sample.
    cheap_targets: ClassVar[bool] = False

    def sample_id(self, index: int) -> str:
        """The ``id`` of a sample, without decoding it."""
        return f"{self.split}/{index:06d}"

    def order(self, seed: int, epoch: int) -> Sequence[int] | None:
        """The order of an epoch's training samples, each once, where a data set cannot be read in any order at the same cost; None: it can.

        A function of seed and epoch alone. It is sliced, never listed.
        """
        return None

    def target(self, index: int) -> Tensor:
        """``[K]`` labels of a sample. Data sets that know them without decoding the image override it."""
        return self[index].target

    def class_counts(self) -> tuple[Tensor, int]:
        """Number of images of each class ``[K]``, and of all images."""
        counts = torch.zeros(self.num_classes)
        for index in range(len(self)):
            counts += self.target(index)
        return counts, len(self)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's augmentation."""
        self.epoch = epoch

    def generator(self, index: int, epoch: int | None = None) -> torch.Generator:
        """The CPU generator of this sample's augmentation in an epoch (default: the current): independent of workers, ranks and order."""
        return torch.Generator().manual_seed(sample_seed(self.augmentation_seed, self.epoch if epoch is None else epoch, index))

    def augmented_maps(self, index: int, maps: Tensor, epoch: int) -> Tensor:
        """Maps ``[N,H,W]`` in [0,1] of the unaugmented sample, moved as its image is in that epoch. Data sets that augment override it."""
        return maps

    def identity(self) -> dict[str, Any]:
        """What makes two data sets the same, as JSON values. Subclasses add to it."""
        return {
            "name": getattr(self, "name", type(self).__name__),
            "split": self.split,
            "size": self.size if isinstance(self.size, int) else list(self.size),
            "classes": list(self.class_names),
            "ids": [self.sample_id(i) for i in range(len(self))],
        }

    def fingerprint(self) -> str:
        """16 hex digits that change with the name, split, size, classes, samples or labels."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]
