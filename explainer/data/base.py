"""What every data set yields (:class:`Sample`), how samples become a batch, and the Lightning data module that serves them."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl  # noqa: TID251 - one of the three places that may
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from explainer import plugins
from explainer.data.samplers import ResumableBatchSampler, UnpaddedSampler, sample_seed
from explainer.errors import ConfigError, CorruptSampleError, ShapeError
from explainer.tensors import Batch

__all__ = ["SPLITS", "DataModule", "ExplainerDataset", "Sample", "collate"]

log = logging.getLogger(__name__)

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
        epoch: of the augmentation; the loaders set it.
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
        class_names: K names, in the order of the targets.
        task: "multilabel" (several classes an image) or "multiclass" (exactly one).
        split: "train", "val" or "test".
        size: side of the square images in pixels.
        epoch, augmentation_seed: with the index, all that random augmentation may depend on.
    """

    name: ClassVar[str]
    class_names: tuple[str, ...]
    task: Task
    split: str
    size: int
    epoch: int = 0
    augmentation_seed: int = 0

    def __init__(self, split: str, size: int) -> None:
        if split not in SPLITS:
            raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}.")
        if not isinstance(size, int) or not 8 <= size <= 4096:
            raise ConfigError(f"size must be a whole number of pixels in [8, 4096], got {size!r}.")
        self.split, self.size = split, size

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """One sample, a function of ``index`` and of (augmentation_seed, epoch) only. Raises CorruptSampleError naming the file."""

    def sample_id(self, index: int) -> str:
        """The ``id`` of a sample, without decoding it."""
        return f"{self.split}/{index:06d}"

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
            "size": self.size,
            "classes": list(self.class_names),
            "ids": [self.sample_id(i) for i in range(len(self))],
        }

    def fingerprint(self) -> str:
        """16 hex digits that change with the name, split, size, classes, samples or labels."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class _Skipped:
    """Stands in a batch's list for a sample that could not be read."""

    id: str
    reason: str


class _Guarded(Dataset):
    """Gives a data set its epoch with each index, and answers bad samples by ``on_error``.

    "skip" in training puts the next readable sample in the place of a bad one, so that every rank keeps the same number of
    equally large batches; in evaluation the sample is left out, because a repeated image would change the numbers.
    """

    def __init__(self, dataset: ExplainerDataset, on_error: str, substitute: bool) -> None:
        self.dataset, self.on_error, self.substitute = dataset, on_error, substitute

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> list[Sample | _Skipped]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self.dataset.epoch != epoch:
            self.dataset.set_epoch(epoch)
        if self.on_error == "raise":
            return [self._sample(index, epoch)]
        skipped: list[Sample | _Skipped] = []
        for offset in range(len(self) if self.substitute else 1):
            candidate = (index + offset) % len(self)
            try:
                return [*skipped, self._sample(candidate, epoch)]
            except CorruptSampleError as error:
                skipped.append(_Skipped(self.dataset.sample_id(candidate), str(error)))
        if self.substitute:
            raise CorruptSampleError(f"none of the {len(self)} samples can be read. The first reason: {_reason(skipped[0])}")
        return skipped

    def _sample(self, index: int, epoch: int) -> Sample:
        return replace(self.dataset[index], epoch=epoch)


def _reason(entry: Sample | _Skipped) -> str:
    return entry.reason if isinstance(entry, _Skipped) else ""


def _collate_guarded(parts: list[list[Sample | _Skipped]]) -> tuple[Batch | None, list[tuple[str, str]]]:
    flat = [entry for part in parts for entry in part]
    samples = [entry for entry in flat if isinstance(entry, Sample)]
    skipped = [(entry.id, entry.reason) for entry in flat if isinstance(entry, _Skipped)]
    return (collate(samples) if samples else None), skipped


class _Loader(DataLoader):
    """Hands on the batches and records what was skipped. Evaluation batches with no readable sample are left out."""

    skipped: dict[str, str] | None = None

    def __iter__(self) -> Any:
        for batch, skipped in super().__iter__():
            for name, reason in skipped:
                if self.skipped is not None and name not in self.skipped:
                    self.skipped[name] = reason
                    log.warning("skipped sample %s: %s", name, reason)
            if batch is not None:
                yield batch


class DataModule(pl.LightningDataModule):
    """Any data set of ``explainer.data`` as Lightning loaders.

    Training batches come from :class:`ResumableBatchSampler` (a function of seed and epoch, resumed at the batch where a checkpoint
    was written), evaluation batches from :class:`UnpaddedSampler`. Use it with ``Trainer(use_distributed_sampler=False)``.

    Args:
        name: a data set, e.g. "shapes", "voc", "image_folder".
        batch_size: samples per batch and device (at least 2 in training).
        eval_batch_size: the same for validation, test and prediction; default ``batch_size``.
        num_workers: worker processes per loader; the samples do not depend on it.
        seed: of the order and the augmentation.
        options: keywords of the data set, for all splits.
        train_options: keywords that replace or add to ``options`` for the training split (augmentation).
        eval_options: the same for the val and test splits.
        on_error: "raise" stops at an unreadable sample; "skip" goes on, logs it and gives the count at the end.
        predict_split: the split that :meth:`predict_dataloader` serves.
        global_batch: True means ``batch_size`` is the sum over all devices (same training on 1, 2 or 8).
        pin_memory: page-locked batches; default where CUDA is available.
        prefetch_factor: batches each worker prepares ahead (default: torch's 2); needs ``num_workers``.
    """

    def __init__(
        self,
        name: str = "shapes",
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        options: dict[str, Any] | None = None,
        train_options: dict[str, Any] | None = None,
        eval_options: dict[str, Any] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        predict_split: Literal["train", "val", "test"] = "test",
        global_batch: bool = False,
        pin_memory: bool | None = None,
        prefetch_factor: int | None = None,
    ) -> None:
        super().__init__()
        if on_error not in ("raise", "skip"):
            raise ConfigError(f'on_error must be "raise" or "skip", got {on_error!r}.')
        if predict_split not in SPLITS:
            raise ConfigError(f"predict_split must be one of {', '.join(SPLITS)}, got {predict_split!r}.")
        for key, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size or 1, 1),
            ("num_workers", num_workers, 0),
            ("prefetch_factor", 1 if prefetch_factor is None else prefetch_factor, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{key} must be a whole number of at least {least}, got {value!r}.")
        if prefetch_factor is not None and num_workers == 0:
            raise ConfigError(
                f"prefetch_factor {prefetch_factor} is of worker processes, and num_workers is 0: raise data.num_workers, or leave it out."
            )
        if not isinstance(pin_memory, bool | None):
            raise ConfigError(f"pin_memory must be true, false or null (where CUDA is available), got {pin_memory!r}.")
        self.name, self.batch_size, self.eval_batch_size = name, batch_size, eval_batch_size or batch_size
        self.num_workers, self.seed, self.on_error, self.predict_split = num_workers, seed, on_error, predict_split
        self.options = dict(options or {})
        self.train_options, self.eval_options = dict(train_options or {}), dict(eval_options or {})
        self.global_batch, self.pin, self.prefetch_factor = global_batch, pin_memory, prefetch_factor
        # Which images a training batch is drawn from, by the share of the training that is done; None: from all. The task sets it.
        self.among: Callable[[float], Sequence[int] | None] | None = None
        self.skipped: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        self._datasets: dict[str, ExplainerDataset] = {}

    # ------------------------------------------------------------------ data sets
    def dataset(self, split: str) -> ExplainerDataset:
        """The data set of a split, built once."""
        if split not in self._datasets:
            extra = self.train_options if split == "train" else self.eval_options
            built = plugins.build("explainer.data", str(self.name), split=split, **{**self.options, **extra})
            built.augmentation_seed = self.seed
            self._datasets[split] = built
        return self._datasets[split]

    def _any_dataset(self) -> ExplainerDataset:
        return next(iter(self._datasets.values())) if self._datasets else self.dataset(self.predict_split)

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names, in the order of the targets."""
        return tuple(self._any_dataset().class_names)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.class_names)

    @property
    def task(self) -> Task:
        """Whether an image has several classes ("multilabel") or exactly one ("multiclass")."""
        return self._any_dataset().task

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return self._any_dataset().size

    def setup(self, stage: str | None = None) -> None:
        """Build the splits of a stage (all for None), so that a wrong path stops a run before anything else starts."""
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": (self.predict_split,), None: SPLITS}
        for split in needed[stage]:
            self.dataset(split)

    # ------------------------------------------------------------------ loaders
    @property
    def _rank_world(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _per_device(self, world: int) -> int:
        if not self.global_batch:
            return self.batch_size
        if self.batch_size % world:
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be shared evenly by {world} devices (global_batch is on). "
                f"Choose a multiple of {world}, or set global_batch to false."
            )
        return self.batch_size // world

    def _loader(self, split: str, substitute: bool = False, **kwargs: Any) -> DataLoader:
        guarded = _Guarded(self.dataset(split), self.on_error, substitute)
        loader = _Loader(
            guarded,
            collate_fn=_collate_guarded,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            pin_memory=torch.cuda.is_available() if self.pin is None else self.pin,
            **kwargs,
        )
        loader.skipped = self.skipped[split]
        return loader

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches, from the batch where the checkpoint being resumed was written."""
        rank, world = self._rank_world
        if world > 1 and getattr(getattr(self.trainer, "_accelerator_connector", None), "use_distributed_sampler", False):
            raise ConfigError("this data module brings its own samplers: build the Trainer with use_distributed_sampler=False.")
        sampler = ResumableBatchSampler(len(self.dataset("train")), self._per_device(world), self.seed, rank, world)
        if self.trainer is not None:
            sampler.steps = _limited(len(sampler), self.trainer.limit_train_batches)
            sampler.start_at(*resume_position(self.trainer))
            sampler.among = None if self.among is None else functools.partial(self._drawn_from, sampler.per_epoch)
        return self._loader("train", substitute=True, batch_sampler=sampler)

    def _drawn_from(self, per_epoch: int, epoch: int, batch: int) -> Sequence[int] | None:
        """The images that a training batch is drawn from."""
        assert self.trainer is not None and self.among is not None
        total = self.trainer.estimated_stepping_batches  # asked while training runs: before, Lightning would build the loaders for it
        each = self.trainer.accumulate_grad_batches
        step = epoch * math.ceil(per_epoch / each) + batch // each  # the last batch of an epoch makes a step, too
        return self.among(step / total if 0 < total < float("inf") else 0.0)

    def eval_dataloader(self, split: str) -> DataLoader:
        """Every sample of a split once over all ranks, in order; also without a Trainer."""
        rank, world = self._rank_world
        number = len(self.dataset(split))
        if number < world:
            # Lightning leaves out a process without batches, and the others would wait for it.
            raise ConfigError(f"the {split} split has {number} image(s) for {world} processes. Use fewer processes, or add images.")
        return self._loader(split, sampler=UnpaddedSampler(number, rank, world), batch_size=self.eval_batch_size)

    def batches(self, split: str, indices: Sequence[Sequence[int]]) -> DataLoader:
        """Exactly these batches of a split, in this order and unshuffled: the same whatever the number of processes."""
        return self._loader(split, batch_sampler=[list(part) for part in indices])

    def val_dataloader(self) -> DataLoader:
        """The validation split."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader:
        """The test split."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader:
        """The ``predict_split``."""
        return self.eval_dataloader(self.predict_split)

    def skipped_summary(self) -> str:
        """How many samples were skipped in which split, and which; "" if none."""
        parts = [
            f"{len(found)} in {split} ({', '.join(list(found)[:5])}{', ...' if len(found) > 5 else ''})"
            for split, found in self.skipped.items()
            if found
        ]
        return "skipped unreadable samples: " + "; ".join(parts) if parts else ""

    def teardown(self, stage: str | None = None) -> None:
        """Report the skipped samples."""
        if summary := self.skipped_summary():
            log.warning(summary)


def resume_position(trainer: Any) -> tuple[int, int]:
    """``(epoch, batch)`` where training goes on; (epoch, 0) unless a checkpoint from the middle of an epoch was loaded.

    ``processed`` counts the batches whose optimiser step is in the checkpoint, also where it was written inside
    ``on_train_batch_end`` (one more than ``completed``) or after an exception in the middle of a batch (one less than ``ready``).
    """
    epochs = trainer.fit_loop.epoch_progress.current
    if epochs.ready == epochs.processed:
        return epochs.processed, 0
    return epochs.processed, trainer.fit_loop.epoch_loop.batch_progress.current.processed


def _limited(length: int, limit: int | float | None) -> int:
    if limit is None:
        return length
    return min(length, limit) if isinstance(limit, int) else int(length * limit)
