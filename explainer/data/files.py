"""What all data sets of image files share: decode, cache, augment, and the one conversion from stored labels to class masks."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from explainer.data.content import content_digests
from explainer.data.contract import ExplainerDataset, Sample
from explainer.data.decoding import Stored, image_size, read_label_map, read_scaled
from explainer.data.samplers import sample_seed
from explainer.data.transforms import Augmentation, place_image, place_masks, to_picture
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.geometry import GEOMETRIES, Geometry, Placement, placement

__all__ = ["VOID", "ImageFileDataset", "Record", "checked_names", "held_out", "mask_beside", "require_directory"]

VOID = 255


@dataclass
class Record:
    """One image on disk.

    Attributes:
        id: unique in the split.
        image: path, or its bytes.
        labels: indices of the present classes.
        mask: path or bytes of its label map, or None.
        problem: why the sample cannot be used (a bad annotation); raised when the sample is asked for.
        extra: what the data set needs besides.
    """

    id: str
    image: Path | Stored
    labels: tuple[int, ...] = ()
    mask: Path | Stored | None = None
    problem: CorruptSampleError | None = None
    extra: Any = field(default=None, repr=False)


def require_directory(path: Path, name: str, where: str) -> None:
    """Raise :class:`DatasetNotFoundError` with where to get the data and where to put it."""
    if not path.is_dir():
        state = "is a file, not a folder" if path.exists() else "does not exist"
        raise DatasetNotFoundError(f"data set {name!r}: the folder {path} {state}. {where}")


def checked_names(key: str, names: Sequence[str], most: int | None = VOID - 1) -> tuple[str, ...]:
    """Class names from a configuration or a list: different strings.

    Args:
        key: where they come from, for the message.
        names: the names. Two that differ in surrounding blanks only are the same.
        most: how many there may be; the default is what an 8-bit label map can tell apart. None: any number.
    """
    bad = isinstance(names, str) or not names or not all(isinstance(n, str) and n.strip() for n in names)
    if not bad:
        bad = len({n.strip() for n in names}) != len(names) or (most is not None and len(names) > most)
    if bad:
        limit = f" (8-bit label maps tell {most} classes apart: leave the masks out, or some classes)" if most and len(names) > most else ""
        count = f"1 to {most}" if most else "one or more"
        raise ConfigError(f"{key} must be a list of {count} different names{limit}, got {len(names)}: {str(names)[:500]}.")
    return tuple(names)


def mask_beside(base: Path | None, file: Path) -> Path | None:
    """The PNG that lies below ``base`` where the image lies below its root; None where there is none."""
    if base is None:
        return None
    path = (base / file).with_suffix(".png")
    return path if path.is_file() else None


def held_out(items: Sequence[str], fraction: float, seed: int) -> set[str]:
    """A random subset of round(``fraction`` * n) items that depends on the items and the seed only, not on their order."""
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out fraction must lie strictly between 0 and 1, got {fraction!r}.")
    ordered = sorted(items)
    order = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(sample_seed(seed, len(ordered)))).tolist()
    return {ordered[i] for i in order[: round(len(ordered) * fraction)]}


class _SharedBytes:
    """``[N, *shape]`` uint8 in anonymous shared memory: forked workers fill and read one copy, and no page costs memory before it is
    written. Unlike ``/dev/shm`` it has no limit of its own. A pickled copy starts empty.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.shape = count, shape
        self.bytes = count * int(torch.Size(shape).numel())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.bytes > 0.8 * memory:
            raise ConfigError(
                f'cache="ram" would need {self.bytes / 1e9:.1f} GB for {count} decoded images; this machine has {memory / 1e9:.1f} GB. '
                'Use cache="none" or a smaller size.'
            )
        self._allocate()

    def _allocate(self) -> None:
        self.data = torch.frombuffer(mmap.mmap(-1, max(1, self.bytes)), dtype=torch.uint8)[: self.bytes].view(self.count, *self.shape)
        self.filled = torch.frombuffer(mmap.mmap(-1, max(1, self.count)), dtype=torch.uint8)[: self.count]

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "shape": self.shape, "bytes": self.bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allocate()

    def get(self, index: int) -> Tensor | None:
        return self.data[index] if self.filled[index] else None

    def put(self, index: int, value: Tensor) -> None:
        self.data[index].copy_(value)
        self.filled[index] = 1  # after the bytes: a reader in another process sees whole entries only


class ImageFileDataset(ExplainerDataset):
    """A list of :class:`Record` with the shared options. Subclasses fill ``records`` and ``class_names`` and call :meth:`_ready`.

    Ground truth is one uint8 label map per image (0 background, i + 1 class i, 255 void); a data set with overlapping classes
    overrides :meth:`_read_layers` and :meth:`_expand`.

    Args:
        split: "train", "val" or "test".
        size: size of the images in pixels: the side of squares, or (height, width), for pictures that are mostly portraits or landscapes.
        augment: None, "light", "standard" or a mapping, see :class:`~explainer.data.transforms.Augmentation`.
        masks: False leaves the ground-truth masks out (training needs none: faster batches).
        cache: "ram" keeps each decoded, resized image after its first use; "none" decodes every time. The samples are the same.
        geometry: how a picture becomes an image of that size: "squash", "letterbox" (padding is void) or "crop",
            see :mod:`explainer.geometry`.
        no_region: classes that no pixel belongs to ("no defect", "background"). An image with such labels only and without a mask file has
            ground truth all the same: no pixel of it is any class's object.
    """

    records: Sequence[Record]
    palette: tuple[str, ...] = ()
    """Classes in the order of the stored indices, where they are more than ``class_names``."""

    def __init__(
        self,
        split: str,
        size: int | Sequence[int],
        *,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__(split, size)
        if geometry not in GEOMETRIES:
            raise ConfigError(f"geometry must be one of {', '.join(GEOMETRIES)}, got {geometry!r}.")
        if isinstance(no_region, str):
            raise ConfigError(f"no_region must be a list of class names, got {no_region!r}.")
        if cache not in ("none", "ram"):
            raise ConfigError(f'cache must be "none" or "ram", got {cache!r}.')
        self.augmentation = Augmentation.parse(augment)
        self.with_masks, self.cache, self.geometry, self.no_region = masks, cache, geometry, tuple(no_region)
        self.work = self.augmentation.working_size(self.shape)

    def _ready(self, source: Path | str, advice: str = "") -> None:
        """Check that there is something to serve, and set up the cache."""
        if unknown := [name for name in self.no_region if name not in self.class_names]:
            raise ConfigError(f"no_region names {unknown[0]!r}, which is not a class. Classes: {', '.join(self.class_names)}.")
        if not self.records:
            raise DatasetNotFoundError(f"the {self.split} split of {source} is empty: no sample is left. {advice}".rstrip())
        self._images = _SharedBytes(len(self), (3, *self.work)) if self.cache == "ram" else None
        self._layers = _SharedBytes(len(self), (1, *self.work)) if self.cache == "ram" and self._cacheable_layers else None

    _cacheable_layers = True
    cheap_targets = True

    # ------------------------------------------------------------------ samples
    def __len__(self) -> int:
        return len(self.records)

    def keep(self, indices: Sequence[int]) -> None:
        """See :meth:`ExplainerDataset.keep`."""
        self.records = [self.records[i] for i in indices]
        self._ready(f"{self.name} after sampling")

    def sample_id(self, index: int) -> str:
        """The record's id."""
        return self.records[index].id

    def target(self, index: int) -> Tensor:
        """``[K]`` multi-hot labels, without decoding the image."""
        target = torch.zeros(self.num_classes)
        target[list(self.records[index].labels)] = 1
        return target

    def __getitem__(self, index: int) -> Sample:
        record = self.records[index]
        if record.problem is not None:
            raise record.problem
        image, layers = self._working(index)
        generator = self.generator(index)
        image, layers = self.augmentation(image, layers, self.shape, generator)
        masks, void = (None, None) if layers is None else self._expand(index, layers)
        return Sample(image.float().div_(255), self.target(index), record.id, masks, void)

    def augmented_maps(self, index: int, maps: Tensor, epoch: int) -> Tensor:
        """See :meth:`ExplainerDataset.augmented_maps`; in 255 steps, as ground truth moves."""
        if self.augmentation == Augmentation():
            return maps
        layers = (maps.cpu() * 255).round().to(torch.uint8)
        blank = torch.zeros(3, *layers.shape[1:], dtype=torch.uint8)
        _, moved = self.augmentation(blank, layers, self.shape, self.generator(index, epoch))
        assert moved is not None
        return moved.to(maps) / 255

    def _working(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Image and labels at the working size, from the cache where it has them."""
        wanted = self.with_masks and self.has_masks(index)
        image = None if self._images is None else self._images.get(index)
        layers = None if self._layers is None or not wanted else self._layers.get(index)
        own: tuple[int, int] | None = None
        if image is None:
            decoded, own = read_scaled(self.records[index].image, 2 * max(self.work))
            image = place_image(decoded, self._place(own))
            if self._images is not None:
                self._images.put(index, image)
        if wanted and layers is None:
            own = own or image_size(self.records[index].image)
            layers = place_masks(self._labels(index, own), self._place(own), VOID)
            if self._layers is not None:
                self._layers.put(index, layers)
        return image, layers if wanted else None

    def _place(self, own: tuple[int, int]) -> Placement:
        return placement(self.geometry, own, self.work)

    def original_maps(self, index: int, maps: Tensor) -> Tensor:
        """Maps ``[N,h,w]`` of the unaugmented sample in the picture's own pixels; what was cropped away gets the least value."""
        place = placement(self.geometry, self.original_size(index), self.shape)
        return to_picture(maps, place, float(maps.min()) if maps.numel() else 0.0)

    # ------------------------------------------------------------------ ground truth
    def has_masks(self, index: int) -> bool:
        """Whether the image has ground truth."""
        return self._has_labels(index) or self._is_empty(index)

    def _has_labels(self, index: int) -> bool:
        """Whether labels are stored for this image."""
        return self.records[index].mask is not None

    def _is_empty(self, index: int) -> bool:
        """Whether all its labels are of classes that no pixel belongs to."""
        labels = self.records[index].labels
        return bool(labels) and all(self.class_names[k] in self.no_region for k in labels)

    def _labels(self, index: int, size: tuple[int, int]) -> Tensor:
        """Stored labels, or those of an image without any object; a data set of several layers overrides it."""
        return self._read_layers(index, size) if self._has_labels(index) else torch.zeros(1, *size, dtype=torch.uint8)

    def _read_layers(self, index: int, size: tuple[int, int]) -> Tensor:
        """uint8 ``[N,H,W]`` at the image's own ``size`` (height, width)."""
        record = self.records[index]
        assert record.mask is not None
        stored = self.palette or self.class_names
        labels = read_label_map(record.mask, size, record.image)
        found = labels[(labels > len(stored)) & (labels != VOID)]
        if found.numel():
            raise CorruptSampleError(
                f"{record.mask}: the mask holds the value {int(found[0])}; expected 0 (background), 1 to {len(stored)} (the classes "
                f"in order) or {VOID} (void). Check class_names."
            )
        if stored != self.class_names:
            table = torch.zeros(256, dtype=torch.uint8)
            table[VOID] = VOID
            for i, name in enumerate(self.class_names):
                table[stored.index(name) + 1] = i + 1
            labels = table[labels.long()]
        return labels[None]

    def _expand(self, index: int, layers: Tensor) -> tuple[Tensor, Tensor]:
        """``[N,H,W]`` labels to bool class masks ``[K,H,W]`` and void ``[H,W]``. :data:`VOID` is padding in every layer."""
        classes = torch.arange(1, self.num_classes + 1, dtype=torch.int16).view(-1, 1, 1)
        return layers.to(torch.int16) == classes, layers[0] == VOID

    def original_size(self, index: int) -> tuple[int, int]:
        """``(height, width)`` of the image file, from its header."""
        return image_size(self.records[index].image)

    def original_masks(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Class masks ``[K,H,W]`` and void ``[H,W]``, bool, at the image's own size (pointing game), or None without ground truth."""
        if not self.has_masks(index):
            return None
        return self._expand(index, self._labels(index, self.original_size(index)))

    def image_digests(self) -> list[str]:
        """One digest an image, of its file's content: the same picture has the same."""
        return content_digests([r.image for r in self.records if isinstance(r.image, Path)])

    def identity(self) -> dict[str, Any]:
        """Adds the labels, the content of each image and mask file, whether masks are served, and the geometry."""
        images = self.image_digests()
        masks = iter(content_digests([r.mask for r in self.records if isinstance(r.mask, Path)]))
        rows = [[list(r.labels), image, next(masks) if r.mask is not None else None] for r, image in zip(self.records, images, strict=True)]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        shape = {"geometry": self.geometry, "no_region": list(self.no_region)}
        return super().identity() | {"content": digest, "masks": self.with_masks, **shape}
