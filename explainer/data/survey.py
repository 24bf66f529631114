"""What a data set holds, from labels and headers alone: counts by class and split, imbalance, sizes and geometry."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from explainer.data.contract import ExplainerDataset
from explainer.data.decoding import image_size
from explainer.data.files import ImageFileDataset
from explainer.data.samplers import spread
from explainer.errors import CorruptSampleError
from explainer.geometry import size_text

__all__ = ["SplitSurvey", "advice", "describe", "survey"]

_HEADERS = 200  # headers that are read for the sizes
_DRAWN = 200  # samples that are made where labels cannot be had without
_ROWS = 24  # classes in a table; of more, the most and the least frequent ones
_IMBALANCE = 10.0  # ratio of the most to the least frequent class from which it is worth a word
_ASPECT = 1.25  # median aspect from which squashing is worth a word


@dataclass
class SplitSurvey:
    """Counts of one split.

    Attributes:
        split: its name.
        images: number of samples.
        counted: number of samples whose labels were counted: all of them, where that costs nothing.
        labels: number of counted images of each class, in the order of the classes.
        unlabelled: counted images without a label.
        masks: images with ground truth, None where it is not known without reading them.
        sizes: (height, width) of some images, from all over the split.
    """

    split: str
    images: int
    counted: int
    labels: list[int]
    unlabelled: int
    masks: int | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)


def survey(dataset: ExplainerDataset) -> SplitSurvey:
    """Count the labels of a split and look at the headers of some of its images."""
    indices: Sequence[int] = range(len(dataset)) if dataset.cheap_targets else spread(len(dataset), min(_DRAWN, len(dataset)))
    labels, unlabelled = [0] * dataset.num_classes, 0
    for index in indices:
        present = dataset.target(index).nonzero().flatten().tolist()
        unlabelled += not present
        for k in present:
            labels[k] += 1
    found = SplitSurvey(dataset.split, len(dataset), len(indices), labels, unlabelled)
    if isinstance(dataset, ImageFileDataset):
        found.masks = sum(dataset.has_masks(i) for i in range(len(dataset)))
        found.sizes = _sizes(dataset)
    return found


def _sizes(dataset: ImageFileDataset) -> list[tuple[int, int]]:
    sizes = []
    for index in spread(len(dataset), min(_HEADERS, len(dataset))):
        try:
            sizes.append(image_size(dataset.records[index].image))
        except CorruptSampleError:  # the reader says so when it is its turn
            continue
    return sizes


def describe(dataset: ExplainerDataset, splits: Sequence[SplitSurvey]) -> list[str]:
    """A small table, as lines: classes by split, then imbalance, sizes and geometry.

    Args:
        dataset: any split, for what all have in common.
        splits: the counts.
    """
    kind = "one label an image" if dataset.task == "multiclass" else "several labels an image"
    name = getattr(dataset, "name", type(dataset).__name__)
    lines = [f"data: {name}, {dataset.num_classes} classes, {kind}, {size_text(dataset.size)} ({dataset.geometry})"]
    shown = _shown([sum(counts) for counts in zip(*(s.labels for s in splits), strict=True)])
    rows: list[list[str]] = [["", *(s.split for s in splits)], ["images", *(f"{s.images}" for s in splits)]]
    rows += [["..." if k is None else _label(dataset, k), *("" if k is None else f"{s.labels[k]}" for s in splits)] for k in shown]
    if any(s.unlabelled for s in splits):
        rows.append(["(no label)", *(f"{s.unlabelled}" for s in splits)])
    if any(s.masks is not None for s in splits):
        rows.append(["with masks", *("" if s.masks is None else f"{s.masks}" for s in splits)])
    lines += table(rows)
    if some := [s for s in splits if s.counted < s.images]:
        lines.append(f"labels counted in {', '.join(f'{s.counted} of {s.images} ({s.split})' for s in some)}")
    sizes = [size for s in splits for size in s.sizes]
    if sizes:
        heights, widths = zip(*sizes, strict=True)
        portrait = sum(h > w for h, w in sizes) / len(sizes)
        landscape = sum(h < w for h, w in sizes) / len(sizes)
        lines.append(
            f"pictures (height x width): median {statistics.median_low(heights)} x {statistics.median_low(widths)}, "
            f"{min(heights)} x {min(widths)} to {max(heights)} x {max(widths)}; {portrait:.0%} portrait, {landscape:.0%} landscape"
        )
    return lines


def _label(dataset: ExplainerDataset, k: int) -> str:
    name = dataset.class_names[k]
    short = name if len(name) <= 32 else name[:31] + "…"
    return f"{short} (no region)" if name in dataset.no_region else short


def _shown(totals: Sequence[int]) -> list[int | None]:
    """Classes of the table in their order; of very many the most and the least frequent ones, None between them."""
    if len(totals) <= _ROWS:
        return list(range(len(totals)))
    ordered = sorted(range(len(totals)), key=lambda k: -totals[k])
    return [*ordered[: _ROWS // 2], None, *ordered[-(_ROWS // 2) :]]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, numbers to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:], strict=True))]).rstrip() for row in rows]


def advice(dataset: ExplainerDataset, splits: Sequence[SplitSurvey], balanced: bool = False) -> list[str]:
    """What the counts mean for training, one sentence a line; nothing that is set already.

    Args:
        dataset: the training split.
        splits: the counts.
        balanced: whether ``data.balance`` is on.
    """
    lines: list[str] = []
    by_name: dict[str, Any] = {s.split: s for s in splits}
    train = by_name.get("train")
    if train is not None and any(train.labels):
        never = [name for name, n in zip(dataset.class_names, train.labels, strict=True) if n == 0]
        if never and train.counted == train.images:
            lines.append(f"No training image has {_names(never)}: the classifier cannot learn what it never sees.")
        seen = [n for n in train.labels if n]
        if seen and max(seen) > _IMBALANCE * min(seen) and not balanced:
            most, least = (dataset.class_names[train.labels.index(f(seen))] for f in (max, min))
            lines.append(
                f"Classes are imbalanced in training, {most!r} {max(seen)} to {least!r} {min(seen)}: data.balance: true draws all equally "
                "often."
            )
    for split in splits:
        missing = [name for name, n in zip(dataset.class_names, split.labels, strict=True) if n == 0]
        if split.split != "train" and missing and any(split.labels) and split.counted == split.images:
            lines.append(f"No {split.split} image has {_names(missing)}: nothing is measured of that.")
    sizes = [size for s in splits for size in s.sizes]
    if sizes:
        aspect = statistics.median(max(h, w) / min(h, w) for h, w in sizes)
        height, width = dataset.shape
        if aspect >= _ASPECT and dataset.geometry == "squash" and height == width:
            tall = statistics.median(h / w for h, w in sizes)
            lines.append(
                f"Half of the pictures are at least {aspect:.2f} times as long as wide, and are squashed to squares: data.options.geometry "
                f"letterbox or crop keeps proportions{_of_one_form(tall, aspect, height)}."
            )
        if statistics.median(min(h / height, w / width) for h, w in sizes) * 1.5 < 1:
            lines.append(
                f"Half of the pictures are smaller than 2/3 of size {size_text(dataset.size)}: a smaller size costs less and loses nothing."
            )
    return lines


def _of_one_form(tall: float, aspect: float, side: int) -> str:
    """Advice for pictures that are mostly portraits, or mostly landscapes (median height / width ``tall``): an image of their form."""
    if max(tall, 1 / tall) < 0.95 * aspect:
        return ""
    longer, shorter = (32 * max(1, round(side * factor / 32)) for factor in (aspect**0.5, aspect**-0.5))
    if longer == shorter:  # of a small side, both round to the square that there is
        return ""
    return f", and data.options.size [{longer}, {shorter}]" * (tall > 1) + f", and data.options.size [{shorter}, {longer}]" * (tall <= 1)


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more classes" if len(names) > 8 else "")
