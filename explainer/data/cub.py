"""CUB-200-2011 birds (Wah et al. 2011) in the official layout: one label per image, with segmentations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from explainer.data.decoding import home_path, join_inside, read_label_map, read_lines
from explainer.data.files import VOID, ImageFileDataset, Record, checked_names, held_out, require_directory
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.geometry import Geometry

__all__ = ["Cub"]

WHERE = (
    "Get CUB_200_2011.tgz (and segmentations.tgz for the masks) from the Caltech-UCSD Birds 200 page of data.caltech.edu and unpack both, "
    "so that root holds CUB_200_2011/images.txt and segmentations/; point root to that folder."
)


class Cub(ImageFileDataset):
    """Single-label CUB-200-2011.

    test is the official test part; val is a fixed random ``val_fraction`` of the official training part, train the rest.
    Segmentations are looked for in ``root/segmentations`` and ``root/CUB_200_2011/segmentations``; a pixel belongs to the bird where
    at least half of the annotators said so (grey value >= 128).

    Args:
        root: the folder that holds ``CUB_200_2011``.
        val_fraction: share of the training part in the val split.
        split_seed: random seed of that choice.
        require_masks: keep only images with a segmentation.
        size, augment, masks, cache, geometry, no_region: how files become samples; see :class:`ImageFileDataset`.
    """

    name = "cub"
    task = "multiclass"

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        *,
        root: str = "data/cub",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        require_masks: bool = False,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__(split, size, augment=augment, masks=masks, cache=cache, geometry=geometry, no_region=no_region)
        base = home_path(root)
        self.folder = base / "CUB_200_2011"
        require_directory(self.folder, self.name, WHERE)
        names = [name.partition(".")[2] or name for name in self._table("classes.txt").values()]
        self.class_names = checked_names(str(self.folder / "classes.txt"), names, most=None)
        segmentations = next((p for p in (base / "segmentations", self.folder / "segmentations") if p.is_dir()), None)
        if require_masks and segmentations is None:
            raise DatasetNotFoundError(f"data set 'cub': require_masks is on, but {base / 'segmentations'} does not exist. {WHERE}")
        images, labels, training = (self._table(f"{n}.txt") for n in ("images", "image_class_labels", "train_test_split"))
        keys = self._keys(images, training, val_fraction, split_seed)
        self.records = [self._record(key, images[key], labels.get(key, ""), segmentations) for key in keys]
        if require_masks:
            self.records = [r for r in self.records if r.mask is not None]
        self._ready(self.folder, "Check train_test_split.txt" + (" and segmentations/." if require_masks else "."))

    def _table(self, file: str) -> dict[str, str]:
        path = self.folder / file
        if not path.is_file():
            raise DatasetNotFoundError(f"data set 'cub': {path} does not exist. {WHERE}")
        rows = [line.split(maxsplit=1) for line in read_lines(path)]
        if bad := next((row for row in rows if len(row) != 2), None):
            raise CorruptSampleError(f"{path}: every line must be '<id> <value>', found {' '.join(bad)!r}.")
        return dict(rows)

    def _keys(self, images: dict[str, str], training: dict[str, str], fraction: float, seed: int) -> list[str]:
        official = {key for key in images if training.get(key) == "1"}
        if self.split == "test":
            return [key for key in images if key not in official]
        chosen = held_out([images[key] for key in official], fraction, seed)
        return [key for key in images if key in official and (images[key] in chosen) == (self.split == "val")]

    def _record(self, key: str, file: str, label: str, segmentations: Path | None) -> Record:
        path = join_inside(self.folder / "images", file, self.folder / "images.txt")
        if not label.isdecimal() or not 1 <= int(label) <= self.num_classes:
            raise ConfigError(
                f"{self.folder / 'image_class_labels.txt'}: image {key} ({file}) has the unknown class {label!r}; classes are 1 to "
                f"{self.num_classes}."
            )
        mask = None if segmentations is None else (segmentations / file).with_suffix(".png")
        return Record(key, path, (int(label) - 1,), mask if mask is not None and mask.is_file() else None)

    def _read_layers(self, index: int, size: tuple[int, int]) -> Tensor:
        record = self.records[index]
        assert record.mask is not None
        return (read_label_map(record.mask, size, record.image) >= 128).to(torch.uint8)[None]

    def _expand(self, index: int, layers: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(self.num_classes, *layers.shape[-2:], dtype=torch.bool)
        masks[self.records[index].labels[0]] = layers[0] == 1
        return masks, layers[0] == VOID
