"""Photographs without labels: any folders of images. What is in them is asked of the classifier (``data.targets: predicted``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from explainer.data.contract import Task
from explainer.data.decoding import IMAGE_SUFFIXES, home_path
from explainer.data.files import ImageFileDataset, Record, checked_names, require_directory
from explainer.data.image_folder import divide
from explainer.data.imagenet import imagenet_names
from explainer.data.listing import image_files, printable, report_links, subfolders
from explainer.errors import ConfigError
from explainer.geometry import Geometry

WHERE = "Put photographs there; folders inside it are read too."


class Images(ImageFileDataset):
    """Every image below one or several folders. Folders ``train``, ``val`` and ``test`` right below a root are its splits; without
    them its images are divided at random by ``fractions``.

    An image has no label here: its target is all zeros until the run asks the classifier (``data.targets: predicted``).

    Args:
        root: the folder, or a list of folders whose images are put together.
        class_names: the classifier's classes in their order, ``imagenet`` for the 1000 of ILSVRC-2012, or their number.
        task: ``multiclass`` or ``multilabel``: what the classifier's scores mean.
        fractions: shares of train, val and test.
        split_seed: random seed of that division.
        size, augment, cache, geometry: how files become samples; see :class:`~explainer.data.files.ImageFileDataset`.
    """

    name = "images"

    def __init__(
        self,
        split: str = "train",
        size: int | Sequence[int] = 224,
        *,
        root: str | Sequence[str] = "data/images",
        class_names: Sequence[str] | Literal["imagenet"] | int = "imagenet",
        task: Task = "multiclass",
        fractions: Sequence[float] = (0.9, 0.05, 0.05),
        split_seed: int = 0,
        augment: str | Mapping[str, Any] | None = None,
        cache: Literal["none", "ram"] = "none",
        geometry: Geometry = "squash",
    ) -> None:
        super().__init__(split, size, augment=augment, masks=False, cache=cache, geometry=geometry)
        if task not in ("multilabel", "multiclass"):
            raise ConfigError(f"task must be multiclass or multilabel, got {task!r}.")
        self.class_names, self.task = _names(class_names), task
        roots = [root] if isinstance(root, str) else list(root)
        if not roots:
            raise ConfigError("root must be a folder or a list of folders, got an empty list.")
        self.records = []
        for number, folder in enumerate(home_path(r) for r in roots):
            require_directory(folder, self.name, WHERE)
            label = printable(folder.name) if len(roots) > 1 else ""
            self.records += _records(folder, split, fractions, split_seed, f"{number}-{label}/" if label else "")
        self._ready(", ".join(roots), f"Image files end in {', '.join(sorted(IMAGE_SUFFIXES))}; check fractions.")


def _names(given: Sequence[str] | str | int) -> tuple[str, ...]:
    if given == "imagenet":
        return imagenet_names()
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return tuple(str(k) for k in range(given))
    return checked_names("class_names", given, most=None)  # type: ignore[arg-type]


def _records(folder: Path, split: str, fractions: Sequence[float], seed: int, prefix: str) -> list[Record]:
    """The split's images of one root; ``prefix`` keeps the ids of several roots apart."""
    parted = {"train", "val", "test"} & set(subfolders(folder))
    top = folder / split if parted else folder
    if parted and not top.is_dir():
        raise ConfigError(f"{folder} has the splits {', '.join(sorted(parted))} and no {split}: add the folder {top}.")
    paths = {prefix + printable(p.relative_to(folder)): p for p in image_files(top)}
    chosen = sorted(paths) if parted else divide(paths, fractions, seed)[split]
    report_links(folder, paths.values())
    return [Record(key, paths[key]) for key in chosen]
