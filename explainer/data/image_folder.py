"""A user's own images with no code: class folders, one label an image. Several labels: :mod:`explainer.data.csv_table`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from explainer.data.decoding import IMAGE_SUFFIXES, home_path, read_label_map, read_xml
from explainer.data.files import VOID, ImageFileDataset, Record, checked_names, mask_beside, require_directory
from explainer.data.listing import image_files, printable, report_links, subfolders
from explainer.data.voc import Box, annotated_boxes
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.geometry import Geometry

__all__ = ["ImageFolder", "divide"]

log = logging.getLogger(__name__)

WHERE = "Put one folder per class there (root/<class>/*.jpg, or root/train/<class>/*.jpg with val and test beside it)."
_MASKS = ("masks", "mask", "labels", "annotations", "segmentations", "ground_truth")
_OTHER_LAYOUTS = {
    "JPEGImages": "voc, with root at the folder that holds VOCdevkit",
    "VOCdevkit": "voc",
    "train2014": "coco",
    "CUB_200_2011": "cub",
}


def divide(items: Iterable[str], fractions: Sequence[float], seed: int = 0) -> dict[str, list[str]]:
    """Cut items into train, val and test by the order of their hashes: a function of names and seed, whatever the listing's order."""
    valid = len(fractions) == 3 and all(isinstance(f, (int, float)) and f >= 0 for f in fractions)
    if not valid or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"fractions must be three shares (train, val, test) that add up to 1, got {list(fractions)}.")
    ordered = sorted(items, key=lambda item: hashlib.blake2b(f"{seed}/{item}".encode()).digest())
    first, second = round(len(ordered) * fractions[0]), round(len(ordered) * (fractions[0] + fractions[1]))
    return {"train": sorted(ordered[:first]), "val": sorted(ordered[first:second]), "test": sorted(ordered[second:])}


class ImageFolder(ImageFileDataset):
    """Single-label: ``root/<split>/<class>/*.jpg``, or ``root/<class>/*.jpg`` divided by ``fractions`` within each class.

    A root that holds ``images`` and ``masks`` instead is read as ``root/images`` with ``mask_root: root/masks``. Hidden files and folders
    and those that systems leave (``@eaDir``, ``__MACOSX``) do not count.

    Args:
        root: the folder.
        class_names: the classes in order; default the sorted names of the folders that hold an image (of the training split).
        layout: "splits", "flat", or "auto": splits if ``root/train`` holds folders.
        fractions: shares of train, val and test in the flat layout.
        split_seed: random seed of that division.
        mask_root: folder with a mask for an image at the same relative path, as PNG; 0 is background.
        mask_void: value of undefined mask pixels, or None; every other value is the object.
        box_root: folder with an annotation in VOC's XML for an image, at the image's relative path or simply ``<the image's name>.xml``, as
            ImageNet's localisation task has them (``Annotations/CLS-LOC/val``); all its objects are of the image's class. An image without
            one has no boxes.
        size, augment, masks, cache, geometry, no_region: see :class:`ImageFileDataset`.
    """

    name = "image_folder"
    task = "multiclass"

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        *,
        root: str = "data/images",
        class_names: Sequence[str] | None = None,
        layout: Literal["auto", "splits", "flat"] = "auto",
        fractions: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        mask_root: str | None = None,
        mask_void: int | None = None,
        box_root: str | None = None,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__(split, size, augment=augment, masks=masks, cache=cache, geometry=geometry, no_region=no_region)
        if layout not in ("auto", "splits", "flat"):
            raise ConfigError(f"layout must be auto, splits or flat, got {layout!r}.")
        self.folder, self.mask_void = home_path(root), mask_void
        require_directory(self.folder, self.name, WHERE)
        if layout == "auto" and class_names is None:
            self.folder, mask_root = _recognized(self.folder, mask_root)
        parted = (self.folder / "train").is_dir() and bool(subfolders(self.folder / "train"))
        if layout == "auto":
            layout = "splits" if parted else "flat"
        top = self.folder / split if layout == "splits" else self.folder
        if layout == "flat" and parted and class_names is None:
            raise ConfigError(
                f"layout: flat takes the folders of {self.folder} as classes, and its train holds class folders itself: leave layout out, "
                f"or take {self.folder / 'train'} as data.options.root. If train is a class, give class_names."
            )
        require_directory(top, self.name, _without_split(self.folder, split) if parted else WHERE)
        found = {name: files for name in subfolders(top) if (files := image_files(top / name))}
        reference = self.folder / "train" if layout == "splits" and (self.folder / "train").is_dir() else top
        self.class_names = (
            checked_names("class_names", class_names, most=None) if class_names is not None else _names(reference, found, top)
        )
        mask_base = None if mask_root is None else home_path(mask_root)
        if mask_base is not None:
            require_directory(mask_base, self.name, "It is given as mask_root: one PNG per image, at the image's relative path.")
        self.records = []
        for name, files in found.items():
            if name not in self.class_names:
                raise ConfigError(
                    f"{top / name}: unknown class {name!r}. Known: {', '.join(self.class_names)}. "
                    "Remove the folder or add it to class_names."
                )
            paths = {printable(p.relative_to(self.folder)): p for p in files}
            chosen = list(paths) if layout == "splits" else divide(paths, fractions, split_seed)[split]
            label = (self.class_names.index(name),)
            self.records += [Record(key, paths[key], label, mask_beside(mask_base, paths[key].relative_to(self.folder))) for key in chosen]
        if box_root is not None:
            base = home_path(box_root)
            require_directory(base, self.name, "It is given as box_root: one XML per image, named like the image.")
            for record in self.records:
                record.extra = _annotation(base, self.folder, record)
            self.boxes = self._boxes  # an attribute only where there are boxes: their readers ask whether it exists
        report_links(self.folder, (r.image for r in self.records if isinstance(r.image, Path)))
        advice = f"Image files end in {', '.join(sorted(IMAGE_SUFFIXES))}."
        if layout == "flat" and found:
            most = max(len(files) for files in found.values())
            advice = (
                f"The shares {list(fractions)} of each class's images (at most {most}) leave none for it: add images, or give another "
                "division, e.g. data.options.fractions: [0.6, 0.2, 0.2]."
            )
        self._ready(top, advice)

    def _boxes(self, index: int) -> tuple[Box, ...]:
        """The annotated boxes of an image; their frame is ``original_size(index)``."""
        return tuple(self.records[index].extra)

    def identity(self) -> dict[str, Any]:
        """Adds the boxes, where there are any."""
        if not hasattr(self, "boxes"):
            return super().identity()
        boxes = json.dumps([[astuple(box) for box in r.extra] for r in self.records])
        return super().identity() | {"boxes": hashlib.sha256(boxes.encode()).hexdigest()}

    def _read_layers(self, index: int, size: tuple[int, int]) -> Tensor:
        record = self.records[index]
        assert record.mask is not None
        values = read_label_map(record.mask, size, record.image)
        layer = (values > 0).to(torch.uint8)
        return (layer if self.mask_void is None else layer.masked_fill(values == self.mask_void, VOID))[None]

    def _expand(self, index: int, layers: Tensor) -> tuple[Tensor, Tensor]:
        masks = torch.zeros(self.num_classes, *layers.shape[-2:], dtype=torch.bool)
        void = layers[0] == VOID
        masks[self.records[index].labels[0]] = layers[0] == 1
        return masks, void


def _annotation(base: Path, folder: Path, record: Record) -> tuple[Box, ...]:
    """The boxes of an image, all of its class; none without a file. A broken file is raised when the sample is asked for."""
    assert isinstance(record.image, Path), "images of class folders lie in files of their own"
    beside = (base / record.image.relative_to(folder)).with_suffix(".xml")
    path = beside if beside.is_file() else base / f"{record.image.stem}.xml"
    if not path.is_file():
        return ()
    try:
        return tuple(annotated_boxes(read_xml(path), path, lambda _: record.labels[0]))
    except CorruptSampleError as error:
        record.problem = error
        return ()


def _names(reference: Path, found: Mapping[str, object], top: Path) -> tuple[str, ...]:
    """The folders that hold images; an empty one is a class only where ``class_names`` says so."""
    every = subfolders(reference)
    names = [n for n in every if (n in found if reference == top else image_files(reference / n))]
    if not names:
        raise DatasetNotFoundError(f"{reference} has no class folders with images, so there are no classes. {WHERE}")
    if empty := [n for n in every if n not in names]:
        log.warning("%s: %d folder(s) without images are no classes: %s.", reference, len(empty), ", ".join(empty[:10]))
    return tuple(names)


def _without_split(root: Path, split: str) -> str:
    """What to do where a folder with ``train`` has no folder of this split."""
    return (
        f"With {root / 'train'} there must be a folder for every split: move some of its images to {root / split}, or take "
        f"{root / 'train'} as data.options.root, whose class folders are then divided at random."
    )


def _recognized(root: Path, mask_root: str | None) -> tuple[Path, str | None]:
    """The folder of the images and that of the masks, where ``root`` holds both; a layout that must not be guessed is asked about."""
    names = subfolders(root)
    for mark, data_set in _OTHER_LAYOUTS.items():
        if mark in names:
            raise ConfigError(
                f"{root} holds {mark}: that is another layout. Use data.name: {data_set}. Class folders named so: give class_names."
            )
    masks = [n for n in names if n.lower() in _MASKS]
    if "images" in names and not set(names) - {"images", *masks}:
        if len(masks) == 1 and mask_root is None:
            mask_root = str(root / masks[0])
        log.info("%s: class folders are looked for in %s%s.", root, root / "images", f", masks in {mask_root}" if mask_root else "")
        return root / "images", mask_root
    if masks and not (root / "train").is_dir():
        others = ", ".join(n for n in names if n != masks[0]) or "nothing else"
        raise ConfigError(
            f"{root} holds the folder {masks[0]!r} beside {others}. If it holds masks, give mask_root: {root / masks[0]} and root: the "
            "folder of the class folders; if it is a class, give all class_names."
        )
    return root, mask_root
