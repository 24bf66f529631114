"""The Lightning data module that serves any data set of ``explainer.data``."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from explainer import plugins
from explainer.data.contract import SPLITS, ExplainerDataset, Sample, Task, collate
from explainer.data.permuting import labels_of, permuted
from explainer.data.samplers import ResumableBatchSampler, UnpaddedSampler, members_by_class
from explainer.errors import ConfigError, CorruptSampleError
from explainer.geometry import Size
from explainer.lightning_internals import brings_own_sampler, resume_position
from explainer.tensors import Batch

log = logging.getLogger(__name__)


@dataclass
class _Skipped:
    """Stands in a batch's list for a sample that could not be read."""

    id: str
    reason: str


class _Guarded(Dataset["list[Sample | _Skipped]"]):
    """Gives a data set its epoch with each index, and answers bad samples by ``on_error``.

    "skip" in training puts the next readable sample in the place of a bad one, so that every rank keeps the same number of
    equally large batches; in evaluation the sample is left out, because a repeated image would change the numbers.
    """

    def __init__(self, dataset: ExplainerDataset, on_error: str, substitute: bool, targets: Sequence[Sequence[int]] | None = None) -> None:
        self.dataset, self.on_error, self.substitute, self.targets = dataset, on_error, substitute, targets

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
        sample = replace(self.dataset[index], epoch=epoch)
        if self.targets is not None:
            sample.target = torch.zeros_like(sample.target)
            sample.target[list(self.targets[index])] = 1
        return sample


def _reason(entry: Sample | _Skipped) -> str:
    return entry.reason if isinstance(entry, _Skipped) else ""


def _collate_guarded(parts: list[list[Sample | _Skipped]]) -> tuple[Batch | None, list[tuple[str, str]]]:
    flat = [entry for part in parts for entry in part]
    samples = [entry for entry in flat if isinstance(entry, Sample)]
    skipped = [(entry.id, entry.reason) for entry in flat if isinstance(entry, _Skipped)]
    return (collate(samples) if samples else None), skipped


class _Loader(DataLoader["list[Sample | _Skipped]"]):
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
        seed: random seed of the order and the augmentation.
        options: keywords of the data set, for all splits.
        train_options: keywords that replace or add to ``options`` for the training split (augmentation).
        eval_options: the same for the val and test splits.
        on_error: "raise" stops at an unreadable sample; "skip" goes on, logs it and gives the count at the end.
        predict_split: the split that :meth:`predict_dataloader` serves.
        global_batch: True means ``batch_size`` is the sum over all devices (same training on 1, 2 or 8).
        pin_memory: page-locked batches; default where CUDA is available.
        balance: draw every class equally often in training (images without a label count as one more class); an epoch keeps its length.
        prefetch_factor: batches each worker prepares ahead (default: torch's 2); needs ``num_workers``.
        copies: how often a training batch holds each of its images, each copy augmented by itself.
        permute_labels: seed of a permutation of the training labels (see :mod:`explainer.data.permuting`); None leaves them.
    """

    def __init__(
        self,
        name: str = "shapes",
        batch_size: int = 16,
        *,
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
        balance: bool = False,
        copies: int = 1,
        permute_labels: int | None = None,
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
            ("copies", copies, 1),
            ("permute_labels", 0 if permute_labels is None else permute_labels, 0),
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
        if not isinstance(balance, bool):
            raise ConfigError(f"balance must be true or false, got {balance!r}.")
        self.balance, self.copies, self.permute_labels = balance, copies, permute_labels
        self.global_batch, self.pin, self.prefetch_factor = global_batch, pin_memory, prefetch_factor
        self.skipped: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        self._datasets: dict[str, ExplainerDataset] = {}
        self._targets: dict[str, list[tuple[int, ...]]] = {}

    # ------------------------------------------------------------------ data sets
    def dataset(self, split: str) -> ExplainerDataset:
        """The data set of a split, built once."""
        if split not in self._datasets:
            extra = self.train_options if split == "train" else self.eval_options
            built = plugins.build("explainer.data", str(self.name), split=split, **{**self.options, **extra})
            built.augmentation_seed = self.seed
            self._datasets[split] = built
            if split == "train" and self.permute_labels is not None:
                self.set_targets(split, permuted(labels_of(built), self.permute_labels))
        return self._datasets[split]

    def set_targets(self, split: str, classes: Sequence[Sequence[int]]) -> None:
        """From here on the images of a split have these classes as their targets, instead of their labels.

        Args:
            split: train, val or test.
            classes: class indices of each image, in the data set's order.
        """
        number = len(self.dataset(split))
        if len(classes) != number:
            raise ConfigError(f"targets for {len(classes)} images were given, the {split} split has {number}.")
        self._targets[split] = [tuple(row) for row in classes]

    def unaugmented(self) -> DataModule:
        """The same images and batches as they are without augmentation."""

        def plain(options: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in options.items() if key != "augment"}

        return DataModule(
            name=str(self.name),
            batch_size=self.batch_size,
            eval_batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            seed=self.seed,
            options=plain(self.options),
            train_options=plain(self.train_options),
            eval_options=plain(self.eval_options),
            on_error=self.on_error,
            prefetch_factor=self.prefetch_factor,
        )

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each split that was built so far, by name."""
        return {split: dataset.fingerprint() for split, dataset in self._datasets.items()}

    def _any_dataset(self) -> ExplainerDataset:
        return next(iter(self._datasets.values())) if self._datasets else self.dataset(self.predict_split)

    def members(self, split: str) -> list[list[int]]:
        """Positions of the images of each class that has some, and of those without a label."""
        dataset = self.dataset(split)
        found = members_by_class((dataset.target(i).tolist() for i in range(len(dataset))), dataset.num_classes)
        return [own for own in found if own]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the K classes, in the order of the targets."""
        return tuple(self._any_dataset().class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @property
    def task(self) -> Task:
        """Whether an image has several classes ("multilabel") or exactly one ("multiclass")."""
        return self._any_dataset().task

    @property
    def no_region(self) -> tuple[str, ...]:
        """Names of the classes that no pixel belongs to."""
        return self._any_dataset().no_region

    @property
    def size(self) -> Size:
        """Of the images in pixels: the side of squares, or (height, width)."""
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

    def _loader(self, split: str, substitute: bool = False, **kwargs: Any) -> _Loader:
        guarded = _Guarded(self.dataset(split), self.on_error, substitute, self._targets.get(split))
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

    def train_dataloader(self) -> _Loader:
        """Shuffled batches, from the batch where the checkpoint being resumed was written."""
        rank, world = self._rank_world
        if world > 1 and brings_own_sampler(self.trainer):
            raise ConfigError("this data module brings its own samplers: build the Trainer with use_distributed_sampler=False.")
        dataset = self.dataset("train")
        order = functools.partial(dataset.order, self.seed)
        sampler = ResumableBatchSampler(len(dataset), self._per_device(world), seed=self.seed, rank=rank, world=world, arrange=order)
        sampler.copies = self.copies
        sampler.members = self.members("train") if self.balance else None
        if self.trainer is not None:
            sampler.steps = _limited(len(sampler), self.trainer.limit_train_batches)
            sampler.start_at(*resume_position(self.trainer))
            choose = getattr(self.trainer.lightning_module, "training_images", None)  # a task may learn from a part only
            sampler.among = None if choose is None else functools.partial(self._drawn_from, choose, sampler.per_epoch)
        return self._loader("train", substitute=True, batch_sampler=sampler)

    def _drawn_from(self, choose: Callable[[float], Sequence[int] | None], per_epoch: int, epoch: int, batch: int) -> Sequence[int] | None:
        """The images that a training batch is drawn from; None: all.

        Args:
            choose: gives them for a share of the training that is done.
            per_epoch: training batches of an epoch.
            epoch, batch: the global batch.
        """
        assert self.trainer is not None
        total = self.trainer.estimated_stepping_batches  # asked while training runs: before, Lightning would build the loaders for it
        each = self.trainer.accumulate_grad_batches
        step = epoch * math.ceil(per_epoch / each) + batch // each  # the last batch of an epoch makes a step, too
        return choose(step / total if 0 < total < float("inf") else 0.0)

    def eval_dataloader(self, split: str) -> _Loader:
        """Every sample of a split once over all ranks, in order; also without a Trainer."""
        rank, world = self._rank_world
        number = len(self.dataset(split))
        if number < world:
            # Lightning leaves out a process without batches, and the others would wait for it.
            raise ConfigError(f"the {split} split has {number} image(s) for {world} processes. Use fewer processes, or add images.")
        return self._loader(split, sampler=UnpaddedSampler(number, rank, world), batch_size=self.eval_batch_size)

    def batches(self, split: str, indices: Sequence[Sequence[int]]) -> _Loader:
        """Exactly these batches of a split, in this order and unshuffled: the same whatever the number of processes."""
        return self._loader(split, batch_sampler=[list(part) for part in indices])

    def val_dataloader(self) -> _Loader:
        """The validation split."""
        return self.eval_dataloader("val")

    def test_dataloader(self) -> _Loader:
        """The test split."""
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> _Loader:
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


def _limited(length: int, limit: int | float | None) -> int:
    if limit is None:
        return length
    return min(length, limit) if isinstance(limit, int) else int(length * limit)
