"""Which images a process sees, and in which order: pure functions of (seed, epoch, rank), so that a run can be cut anywhere.

Lightning's own samplers restart an interrupted epoch at its first batch and pad the last evaluation batch with repeated images.
These do neither; use them with ``Trainer(use_distributed_sampler=False)``.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from explainer.errors import ConfigError

__all__ = ["ResumableBatchSampler", "UnpaddedSampler", "members_by_class", "sample_seed", "spread", "spread_over_classes"]


def sample_seed(*key: int | str) -> int:
    """A 63-bit seed from values such as (seed, epoch, index). Neighbouring keys give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def spread(length: int, number: int, seed: int = 0) -> list[int]:
    """``number`` of ``length`` positions, in order, drawn from everywhere (files are often sorted by class). A larger number adds some."""
    generator = torch.Generator().manual_seed(sample_seed(seed, length))
    return sorted(torch.randperm(length, generator=generator)[:number].tolist())


class ResumableBatchSampler(Sampler[list[tuple[int, int]]]):
    """Shuffled training batches of ``(epoch, index)`` pairs, equal in number and size on every rank.

    Global batch ``j`` of an epoch is the slice ``[j * batch_size * world, (j + 1) * batch_size * world)`` of that epoch's
    permutation and rank ``r`` takes every ``world``-th element of it from ``r``: the union over the ranks is what one process with
    ``batch_size * world`` sees. What is left over at the end is dropped (a last batch of one image breaks BatchNorm).
    The epoch travels with the index, so that worker processes that live longer than an epoch augment with the right one.

    Args:
        length: number of samples of the data set.
        batch_size: samples per batch and rank, at least 2.
        seed: random seed of the permutations.
        rank: rank of this process.
        world: number of processes.
        shuffle: False keeps the data set's order in every epoch.
        steps: batches an epoch is cut to (``Trainer(limit_train_batches=...)``), None for all: for :meth:`start_at` and ``among``.
        among: gives, for an epoch and a global batch of it, the samples it is drawn from (always the same ones), or None for the
            epoch's permutation. The drawn ones go round in a shuffled order of their own, and the round takes the epoch's place in the
            pairs: an image drawn again is augmented anew.
        copies: how often a batch holds each of its images; each copy has an epoch of its own in its pair, so that it is augmented by
            itself.
        members: images of each class, for balanced training: every class is drawn once in each round of classes, and its images in shuffled
            rounds of their own. An epoch keeps its number of batches. None draws every image once an epoch. ``among`` comes first.
        arrange: gives an epoch's order of all samples in place of a permutation of all, or None where it has none.

    Raises:
        ConfigError: for a batch below 2, or fewer samples than one global batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
        steps: int | None = None,
        among: Callable[[int, int], Sequence[int] | None] | None = None,
        members: Sequence[Sequence[int]] | None = None,
        copies: int = 1,
        arrange: Callable[[int], Sequence[int] | None] | None = None,
    ) -> None:
        if copies < 1:
            raise ConfigError(f"copies must be at least 1, got {copies}.")
        self.copies = copies
        if batch_size < 2:
            raise ConfigError(
                f"batch_size must be at least 2 per device in training, got {batch_size}: BatchNorm over one image of 1x1 features "
                "is undefined. Raise data.batch_size, or use fewer devices."
            )
        if not 0 <= rank < world:
            raise ConfigError(f"rank must lie in [0, world), got rank {rank} of world {world}.")
        if length < batch_size * world:
            raise ConfigError(
                f"the training split has {length} samples, fewer than one batch of {batch_size} on each of {world} device(s). "
                "Lower data.batch_size, use fewer devices, or add data."
            )
        self.length, self.batch_size, self.seed, self.rank, self.world, self.shuffle = length, batch_size, seed, rank, world, shuffle
        self.steps, self.among, self.arrange = steps, among, arrange
        self.members = None if members is None else [list(m) for m in members if len(m)]
        self._rounds: dict[int, list[int]] = {}
        self._class_rounds: dict[int, tuple[int, list[int]]] = {}
        self.epoch = 0
        self._start = (0, 0)

    @property
    def sampler(self) -> ResumableBatchSampler:
        """Lightning announces the epoch to ``dataloader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next ``iter()`` yields."""
        self.epoch = epoch

    def start_at(self, epoch: int, batch: int) -> None:
        """Let ``epoch``, when it is iterated, begin at ``batch``. At or beyond its end the next epoch begins instead (a checkpoint
        written after the last batch of an epoch, before Lightning has counted the epoch).
        """
        self._start = (epoch, batch)

    def __len__(self) -> int:
        """Batches of a whole epoch, also where the coming one starts in the middle: Lightning counts from the start."""
        return self.length // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Not a generator itself: the position must be fixed when the loader's workers start, before Lightning moves the epoch on.
        epoch, first = self.epoch, 0
        if epoch == self._start[0]:
            first = self._start[1]
        if first and first >= self.per_epoch:
            epoch, first = epoch + 1, 0
        return self._batches(epoch, first)

    @property
    def per_epoch(self) -> int:
        """Batches that are trained of an epoch."""
        return len(self) if self.steps is None else min(self.steps, len(self))

    def order(self, epoch: int) -> Sequence[int]:
        """The epoch's order, the same on every rank: a permutation of all samples, or the data's own."""
        arranged = self.arrange(epoch) if self.arrange is not None and self.shuffle else None
        return self._permutation(self.length, epoch) if arranged is None else arranged

    def _permutation(self, length: int, *key: int) -> list[int]:
        if not self.shuffle:
            return list(range(length))
        generator = torch.Generator().manual_seed(sample_seed(self.seed, *key))
        return torch.randperm(length, generator=generator).tolist()

    def _batches(self, epoch: int, first: int) -> Iterator[list[tuple[int, int]]]:
        stride = self.batch_size * self.world
        order = self.order(epoch) if self.members is None else []
        for batch in range(first, len(self)):
            among = self.among(epoch, batch) if self.among is not None else None
            start = (epoch * self.per_epoch + batch) * stride
            if among is not None:
                part = self._drawn(among, start, stride)
            elif self.members is not None:
                part = [self._balanced(position) for position in range(start, start + stride)]
            else:
                part = [(epoch, index) for index in order[batch * stride : (batch + 1) * stride]]
            own = part[self.rank :: self.world]
            yield [(turn * self.copies + copy, index) for turn, index in own for copy in range(self.copies)]

    def _drawn(self, among: Sequence[int], start: int, count: int) -> list[tuple[int, int]]:
        """``count`` of the endless row of shuffled rounds through ``among``, from position ``start``."""
        turns = range(start // len(among), (start + count - 1) // len(among) + 1)
        # The second number in the key keeps a round from being an epoch's permutation.
        self._rounds = {t: self._rounds.get(t) or self._permutation(len(among), t, 1) for t in turns}
        places = (divmod(position, len(among)) for position in range(start, start + count))
        return [(turn, among[self._rounds[turn][place]]) for turn, place in places]

    def _balanced(self, position: int) -> tuple[int, int]:
        """One draw of the endless row of rounds through the classes. The position takes the epoch's place: no two draws augment alike."""
        assert self.members is not None
        turn, place = divmod(position, len(self.members))
        label = self._round(-1, turn, len(self.members))[place]
        own = self.members[label]
        again, at = divmod(turn, len(own))
        return position, own[self._round(label, again, len(own))[at]]

    def _round(self, label: int, number: int, length: int) -> list[int]:
        """The shuffled order of a round of a class's images, or (label -1) of the classes. The last one of each is kept."""
        known = self._class_rounds.get(label)
        if known is None or known[0] != number:
            known = self._class_rounds[label] = (number, self._permutation(length, number, 2, label + 1))
        return known[1]


def members_by_class(targets: Iterable[Sequence[float]], classes: int) -> list[list[int]]:
    """Positions of the images of each class, and last of those without any label.

    Args:
        targets: multi-hot labels, one row an image.
        classes: number of classes.
    """
    members: list[list[int]] = [[] for _ in range(classes + 1)]
    for index, row in enumerate(targets):
        present = [k for k, value in enumerate(row) if value]
        for k in present or [classes]:
            members[k].append(index)
    return members


def class_by_class(members: Sequence[Sequence[int]], seed: int = 0) -> list[int]:
    """All positions once, in an order whose every beginning is spread over the classes: each class in turn gives its next one.

    Args:
        members: what :func:`members_by_class` returns.
        seed: random seed of the order within each class.
    """
    queues = [deque(own[i] for i in shuffled(len(own), seed, label)) for label, own in enumerate(members) if len(own)]
    chosen: dict[int, None] = {}
    while queues:
        for queue in queues:
            while queue and queue[0] in chosen:
                queue.popleft()
            if queue:
                chosen[queue.popleft()] = None
        queues = [queue for queue in queues if queue]
    return list(chosen)


def spread_over_classes(members: Sequence[Sequence[int]], number: int, seed: int = 0) -> list[int]:
    """``number`` positions, in the data's order, drawn from all classes in turn, so that none is forgotten. A larger number adds some.

    Args:
        members: what :func:`members_by_class` returns.
        number: how many, at most all.
        seed: random seed of the choice within each class.
    """
    return sorted(class_by_class(members, seed)[:number])


def shuffled(length: int, *key: int) -> list[int]:
    """All positions below ``length`` in an order that depends on the key alone."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(sample_seed(*key, length))).tolist()


class UnpaddedSampler(Sampler[int]):
    """Every ``world``-th sample from ``rank``, in order, none repeated: for evaluation, where a repeated image changes the numbers."""

    def __init__(self, length: int, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"rank must lie in [0, world), got rank {rank} of world {world}.")
        self.indices = range(rank, length, world)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
