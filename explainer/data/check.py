"""Read every sample once and say what is wrong: broken files, labels without pixels, the same picture in two splits."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from explainer.data.content import MISSING
from explainer.data.contract import ExplainerDataset
from explainer.data.decoding import image_facts
from explainer.data.files import ImageFileDataset
from explainer.errors import ExplainerError

__all__ = ["SampleFacts", "SplitCheck", "check_split", "duplicates", "leakage"]


@dataclass
class SampleFacts:
    """What one sample turned out to be.

    Attributes:
        id: identifier of the sample.
        error: why it cannot be read, or None.
        size: (height, width) of the picture, None for generated ones.
        mode: colour mode and format of the file, e.g. "RGB JPEG".
        without_pixels: classes that are labelled and have no pixel in the masks.
        vanished: classes that have pixels in the file and none at the size of training.
        unlabelled: classes that have pixels and no label.
        truth: whether the sample has masks.
    """

    id: str
    error: str | None = None
    size: tuple[int, int] | None = None
    mode: str = ""
    without_pixels: tuple[int, ...] = ()
    vanished: tuple[int, ...] = ()
    unlabelled: tuple[int, ...] = ()
    truth: bool = False


@dataclass
class SplitCheck:
    """All that was found in a split.

    Attributes:
        dataset: data set of the split.
        samples: what was found in each image, in the data set's order.
        digests: hashes of the images' content, in its order; empty for generated data.
    """

    dataset: ExplainerDataset
    samples: list[SampleFacts] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    @property
    def broken(self) -> list[SampleFacts]:
        """Those that cannot be read."""
        return [s for s in self.samples if s.error is not None]

    def count(self, attribute: str) -> Counter[str]:
        """Number of samples by class, for ``without_pixels``, ``vanished`` or ``unlabelled``."""
        return Counter(self.dataset.class_names[k] for s in self.samples for k in getattr(s, attribute))


def check_split(dataset: ExplainerDataset, workers: int = 2, progress: Callable[[int], None] = lambda done: None) -> SplitCheck:
    """Read every sample of a split.

    Args:
        dataset: without augmentation, which could move an object out of its picture.
        workers: threads that decode.
        progress: called with the number of samples that were read since the last call.
    """
    found = SplitCheck(dataset)
    with ThreadPoolExecutor(workers, thread_name_prefix="check") as pool:
        for facts in _in_turn(pool, dataset, 4 * workers):
            found.samples.append(facts)
            progress(1)
    if isinstance(dataset, ImageFileDataset):
        found.digests = dataset.image_digests()
    return found


def _in_turn(pool: ThreadPoolExecutor, dataset: ExplainerDataset, ahead: int) -> Iterator[SampleFacts]:
    """Samples in order, a few decoded ahead: mapping over all would keep all futures."""
    waiting = []
    for index in range(len(dataset)):
        waiting.append(pool.submit(_facts, dataset, index))
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _facts(dataset: ExplainerDataset, index: int) -> SampleFacts:
    facts = SampleFacts(dataset.sample_id(index))
    try:
        if isinstance(dataset, ImageFileDataset):
            height, width, mode, form = image_facts(dataset.records[index].image)
            facts.size, facts.mode = (height, width), f"{mode} {form}"
        sample = dataset[index]
        if sample.masks is None:
            return facts
        facts.truth = True
        pixels = sample.masks.flatten(1).any(1)
        labelled = {k for k in sample.target.nonzero().flatten().tolist() if dataset.class_names[k] not in dataset.no_region}
        facts.unlabelled = tuple(k for k in pixels.nonzero().flatten().tolist() if not sample.target[k])
        empty = [k for k in sorted(labelled) if not pixels[k]]
        if empty and isinstance(dataset, ImageFileDataset):
            original = dataset.original_masks(index)
            there = [] if original is None else [k for k in empty if bool(original[0][k].any())]
            facts.vanished = tuple(there)
            empty = [k for k in empty if k not in there]
        facts.without_pixels = tuple(empty)
    except ExplainerError as error:
        facts.error = str(error)
    return facts


def duplicates(split: SplitCheck) -> list[list[str]]:
    """Ids of the samples that are the same file content, in groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    for sample, digest in zip(split.samples, split.digests, strict=False):
        if digest != MISSING:
            groups[digest].append(sample.id)
    return [ids for ids in groups.values() if len(ids) > 1]


def leakage(splits: Mapping[str, SplitCheck]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """Pairs of samples with the same content in two splits: ``{("train", "test"): [(id, id), ...]}``."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    names = list(splits)
    for i, first in enumerate(names):
        known: dict[str, Any] = {d: s.id for s, d in zip(splits[first].samples, splits[first].digests, strict=False) if d != MISSING}
        for second in names[i + 1 :]:
            other = zip(splits[second].samples, splits[second].digests, strict=False)
            if pairs := [(known[d], s.id) for s, d in other if d in known]:
                found[first, second] = pairs
    return found
