"""PASCAL VOC in its official layout (Everingham et al. 2010), and any other data set that is laid out like it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from explainer.data.contract import SPLITS
from explainer.data.decoding import MAX_SIDE, home_path, join_inside, read_lines, read_xml
from explainer.data.files import ImageFileDataset, Record, checked_names, held_out, require_directory
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.geometry import Geometry

__all__ = ["VOC_CLASSES", "Box", "Voc", "annotated_boxes"]

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

# VOC-2012 has no public test annotations: its val list is the test split, and part of its train list is for validation.
LISTS = {"2007": {"train": "train", "val": "val", "test": "test"}, "2012": {"train": "train", "val": "train", "test": "val"}}


@dataclass(frozen=True)
class Box:
    """One annotated object: class index and half-open pixel ranges [x0, x1) x [y0, y1) in the original image, counted from 0."""

    label: int
    x0: int
    y0: int
    x1: int
    y1: int
    difficult: bool = False


class Voc(ImageFileDataset):
    """Multi-label VOC-2007 / VOC-2012: ``root/VOCdevkit/VOC<year>/{JPEGImages,Annotations,SegmentationClass,ImageSets}``.

    Args:
        root: the folder that holds ``VOCdevkit``.
        year: 2007 or 2012 (or any other whose folder exists).
        class_names: names in the order of the mask's palette indices 1..K; default the 20 VOC classes.
        difficult: "include" counts objects marked difficult, "exclude" does not (boxes keep the mark either way).
        keep: the classes to predict, in order, where only some of ``class_names`` are wanted; the others become background.
        require_masks: keep only images with a segmentation (the ImageSets/Segmentation list where it exists).
        lists: names of the ImageSets lists by split, e.g. ``{"train": "trainval"}``. Where train and val name the same list, val is a
            fixed random ``holdout`` of it and train the rest (the default for 2012, which has no public test annotations).
        holdout: that share.
        split_seed: random seed of that choice.
        download: fetch and unpack the official archives (2007: 0.9 GB, 2012: 2 GB) through torchvision where they are missing.
        size, augment, masks, cache, geometry, no_region: how files become samples; see :class:`ImageFileDataset`.
    """

    name = "voc"
    task = "multilabel"

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        *,
        root: str = "data/voc",
        year: int | str = 2007,
        class_names: Sequence[str] | None = None,
        difficult: Literal["include", "exclude"] = "include",
        keep: Sequence[str] | None = None,
        require_masks: bool = False,
        lists: Mapping[str, str] | None = None,
        holdout: float = 0.1,
        split_seed: int = 0,
        download: bool = False,
        augment: str | Mapping[str, Any] | None = None,
        masks: bool = True,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__(split, size, augment=augment, masks=masks, cache=cache, geometry=geometry, no_region=no_region)
        if difficult not in ("include", "exclude"):
            raise ConfigError(f'difficult must be "include" or "exclude", got {difficult!r}.')
        self.palette = VOC_CLASSES if class_names is None else checked_names("class_names", class_names)
        self.class_names = self.palette if keep is None else checked_names("keep", keep)
        for wanted in self.class_names:
            if wanted not in self.palette:
                raise ConfigError(f"keep names {wanted!r}, which is not one of class_names: {', '.join(self.palette)}.")
        self.difficult, self.require_masks = difficult, require_masks
        self.folder = home_path(root) / "VOCdevkit" / f"VOC{year}"
        names = {**LISTS.get(str(year), LISTS["2007"]), **(lists or {})}
        if extra := set(names) - set(SPLITS):
            raise ConfigError(f"lists has the unknown split {sorted(extra)[0]!r}; splits are {', '.join(SPLITS)}.")
        if download and not self.folder.is_dir():
            _download(home_path(root), str(year))
        require_directory(
            self.folder,
            self.name,
            f"Get VOC{year} from the PASCAL VOC site (host.robots.ox.ac.uk/pascal/VOC) and unpack it so that this folder holds JPEGImages, "
            "Annotations and ImageSets, or set download: true (needs the network), or point root to the folder that holds VOCdevkit.",
        )
        self.records = [self._record(key) for key in self._ids(names, holdout, split_seed)]
        if require_masks:
            self.records = [r for r in self.records if r.mask is not None]
        self._ready(self.folder, "Check the ImageSets list" + (", or set require_masks: false." if require_masks else "."))

    # ------------------------------------------------------------------ lists and annotations
    def _ids(self, names: Mapping[str, str], holdout: float, seed: int) -> list[str]:
        kind = "Segmentation" if self.require_masks and (self.folder / "ImageSets" / "Segmentation").is_dir() else "Main"
        path = join_inside(self.folder / "ImageSets" / kind, names[self.split] + ".txt", "lists")
        if not path.is_file():
            known = sorted(p.stem for p in path.parent.glob("*.txt") if "_" not in p.stem)
            raise DatasetNotFoundError(
                f"{path} does not exist, so there is no {self.split} split. Lists there: {', '.join(known) or 'none'}. "
                "Name one in the option lists, e.g. lists: {val: trainval}."
            )
        ids = list(dict.fromkeys(line.split()[0] for line in read_lines(path)))
        if self.split in ("train", "val") and names["train"] == names["val"]:
            chosen = held_out(ids, holdout, seed)
            ids = [i for i in ids if (i in chosen) == (self.split == "val")]
        return ids

    def _record(self, key: str) -> Record:
        source = self.folder / "ImageSets"
        annotation = join_inside(self.folder / "Annotations", key + ".xml", source)
        mask = self.folder / "SegmentationClass" / f"{key}.png"
        record = Record(key, self.folder / "JPEGImages" / f"{key}.jpg", mask=mask if mask.is_file() else None, extra=())
        try:
            record.extra = tuple(self._boxes(read_xml(annotation), annotation))
        except CorruptSampleError as error:  # raised when the sample is asked for, so that on_error decides
            record.problem = error
        except DatasetNotFoundError as error:
            record.problem = CorruptSampleError(f"{annotation}: the annotation is missing. Restore it, or remove {key!r} from {source}.")
            record.problem.__cause__ = error
        record.labels = tuple(sorted({b.label for b in record.extra if self.difficult == "include" or not b.difficult}))
        return record

    def _boxes(self, root: ElementTree.Element, path: Path) -> list[Box]:
        def label_of(name: str) -> int | None:
            if name not in self.palette:
                raise ConfigError(
                    f"{path}: unknown class {name!r}. class_names has {len(self.palette)}: {', '.join(self.palette)}. "
                    "Correct class_names, or the annotation."
                )
            return self.class_names.index(name) if name in self.class_names else None

        return annotated_boxes(root, path, label_of)

    def identity(self) -> dict[str, Any]:
        """Adds the boxes, which the pointing game reads."""
        boxes = json.dumps([[astuple(box) for box in r.extra] for r in self.records])
        return super().identity() | {"boxes": hashlib.sha256(boxes.encode()).hexdigest()}

    def boxes(self, index: int) -> tuple[Box, ...]:
        """The annotated boxes of an image, difficult ones marked (pointing game); their frame is ``original_size(index)``."""
        boxes: tuple[Box, ...] = self.records[index].extra
        return boxes


def annotated_boxes(root: ElementTree.Element, path: Path, label_of: Callable[[str], int | None]) -> list[Box]:
    """The objects of one annotation in VOC's XML, which ImageNet's localisation task uses as well.

    Args:
        root: root element of the parsed file.
        path: the file, for messages.
        label_of: class index of an object's name; None leaves the object out.

    Raises:
        CorruptSampleError: an object without a box of four numbers, or an impossible box.
    """
    boxes = []
    for item in root.iter("object"):
        name = (item.findtext("name") or "").strip()
        label = label_of(name)
        if label is None:
            continue
        try:
            x0, y0, x1, y1 = (round(float(item.findtext(f"bndbox/{k}") or "")) for k in ("xmin", "ymin", "xmax", "ymax"))
        except (ValueError, OverflowError) as error:
            raise CorruptSampleError(f"{path}: an object of class {name!r} has no bndbox of four numbers.") from error
        if not (-1 <= x0 < x1 <= MAX_SIDE and -1 <= y0 < y1 <= MAX_SIDE):
            raise CorruptSampleError(f"{path}: an object of class {name!r} has the impossible box {x0}, {y0}, {x1}, {y1}.")
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        # VOC counts pixels from 1 and includes the last one
        boxes.append(Box(label, max(0, x0 - 1), max(0, y0 - 1), x1, y1, difficult))
    return boxes


def _download(root: Path, year: str) -> None:
    """Fetch the official archives through torchvision, which checks their sums."""
    from torchvision.datasets import VOCDetection

    try:
        root.mkdir(parents=True, exist_ok=True)
        for image_set in ("trainval", "test") if year == "2007" else ("trainval",):
            VOCDetection(str(root), year=year, image_set=image_set, download=True)
    except Exception as error:
        raise DatasetNotFoundError(
            f"VOC{year} could not be downloaded to {root} ({str(error)[:200]}). Fetch the archives from the PASCAL VOC site by hand and "
            f"unpack them in {root}, then set download: false."
        ) from error
