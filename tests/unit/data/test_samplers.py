"""The order of images: the same for every split over processes, and from any point of a run."""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import pytest

from explainer.data.datamodule import DataModule
from explainer.data.samplers import ResumableBatchSampler, UnpaddedSampler, members_by_class, sample_seed, spread, spread_over_classes
from explainer.errors import ConfigError
from tests.factories import make_image_folder


def epoch(sampler: ResumableBatchSampler, number: int) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(number)
    return list(sampler)


def test_an_epoch_is_a_permutation_cut_into_batches_and_depends_on_seed_and_epoch() -> None:
    sampler = ResumableBatchSampler(10, 3, seed=1)
    batches = epoch(sampler, 0)
    assert [len(b) for b in batches] == [3, 3, 3] and len(sampler) == 3
    seen = [i for batch in batches for _, i in batch]
    assert len(set(seen)) == 9 and set(seen) <= set(range(10))
    assert {e for batch in epoch(sampler, 4) for e, _ in batch} == {4}
    assert epoch(sampler, 0) == batches
    assert [i for b in epoch(sampler, 1) for _, i in b] != seen
    assert epoch(ResumableBatchSampler(10, 3, seed=2), 0) != batches


def test_without_shuffling_the_order_is_the_data_sets() -> None:
    assert list(ResumableBatchSampler(5, 2, shuffle=False)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_the_global_batch_of_one_process(world: int) -> None:
    one = epoch(ResumableBatchSampler(26, 2 * world, seed=3), 2)
    ranks = [epoch(ResumableBatchSampler(26, 2, seed=3, rank=r, world=world), 2) for r in range(world)]
    assert all(len(r) == len(one) for r in ranks)
    for j, batch in enumerate(one):
        assert sorted(k for r in ranks for k in r[j]) == sorted(batch)
        assert ranks[0][j] == batch[0::world]


def test_starting_in_the_middle_gives_the_rest_of_the_epoch_and_whole_ones_after() -> None:
    whole, cut = ResumableBatchSampler(20, 2, seed=5), ResumableBatchSampler(20, 2, seed=5)
    cut.start_at(3, 4)
    assert epoch(cut, 3) == epoch(whole, 3)[4:]
    assert len(cut) == 10  # the length stays that of the epoch: Lightning counts from its start
    assert epoch(cut, 4) == epoch(whole, 4)


@pytest.mark.parametrize(("steps", "batch"), [(None, 10), (6, 6)])
def test_a_checkpoint_after_the_last_batch_goes_on_with_the_next_epoch(steps: int | None, batch: int) -> None:
    sampler = ResumableBatchSampler(20, 2, seed=5, steps=steps)
    sampler.start_at(3, batch)
    assert epoch(sampler, 3) == epoch(ResumableBatchSampler(20, 2, seed=5), 4)


@pytest.mark.parametrize("world", [1, 2])
def test_some_batches_are_drawn_from_chosen_samples(world: int) -> None:
    """The first 7 global batches of 4 from five samples, in shuffled rounds that carry their number; then the epochs as ever."""
    chosen = [3, 5, 8, 13, 19]
    asked: list[tuple[int, int]] = []

    def among(epoch: int, batch: int) -> list[int] | None:
        asked.append((epoch, batch))
        return chosen if (epoch, batch) < (1, 2) else None

    def samplers(start: tuple[int, int] = (0, 0)) -> list[ResumableBatchSampler]:
        made = [ResumableBatchSampler(20, 4 // world, seed=5, rank=r, world=world, among=among) for r in range(world)]
        for s in made:
            s.start_at(*start)
        return made

    plain = ResumableBatchSampler(20, 4, seed=5)
    both = [[sorted(k for r in parts for k in r) for parts in zip(*(epoch(s, e) for s in samplers()), strict=True)] for e in range(2)]
    assert [len(e) for e in both] == [5, 5] and sorted(set(asked)) == [(e, b) for e in range(2) for b in range(5)]
    assert both[1][2:] == [sorted(b) for b in epoch(plain, 1)[2:]]
    drawn = [k for batch in both[0] + both[1][:2] for k in batch]
    assert len(drawn) == 28 and all(sorted(i for turn, i in drawn if turn == t) == chosen for t in range(5))
    assert {turn for turn, _ in drawn} == set(range(6))
    orders = [[i for s in samplers() for b in epoch(s, 0) for turn, i in b if turn == t] for t in range(4)]
    assert len({tuple(o) for o in orders}) > 1, "each round has an order of its own"
    for e, batch in ((0, 3), (1, 1)):
        assert [epoch(s, e) for s in samplers((e, batch))] == [epoch(s, e)[batch:] for s in samplers()]


def test_chosen_samples_in_epochs_that_are_cut_short() -> None:
    sampler = ResumableBatchSampler(20, 2, seed=5, steps=3, among=lambda epoch, batch: list(range(6)))
    parts = [k for e in range(2) for batch in epoch(sampler, e)[:3] for k in batch]
    assert sorted(parts) == [(turn, i) for turn in range(2) for i in range(6)], "three batches an epoch make one round each"


def test_positions_from_everywhere() -> None:
    few, more = spread(1000, 30), spread(1000, 60)
    assert len(set(few)) == 30 and few == sorted(few) and set(few) < set(more) and spread(1000, 30, seed=1) != few
    assert all(any(start <= i < start + 250 for i in few) for start in range(0, 1000, 250))
    assert spread(5, 9) == list(range(5)) and spread(5, 0) == []


def test_a_sample_is_chosen_twice_in_a_batch_if_there_are_too_few() -> None:
    (batch,) = epoch(ResumableBatchSampler(6, 6, among=lambda epoch, batch: [4, 2]), 0)
    assert sorted(batch) == [(0, 2), (0, 4), (1, 2), (1, 4), (2, 2), (2, 4)]


def test_the_position_is_fixed_when_iteration_begins() -> None:
    sampler = ResumableBatchSampler(8, 2)
    iterator = iter(sampler)
    sampler.set_epoch(7)
    assert next(iterator)[0][0] == 0


def test_lightning_finds_set_epoch() -> None:
    sampler = ResumableBatchSampler(8, 2)
    sampler.sampler.set_epoch(2)
    assert sampler.epoch == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 10, "batch_size": 1}, "batch_size must be at least 2 per device in training, got 1"),
        ({"length": 5, "batch_size": 2, "world": 3}, "has 5 samples, fewer than one batch of 2 on each of 3 device"),
        ({"length": 10, "batch_size": 2, "rank": 2, "world": 2}, "got rank 2 of world 2"),
    ],
)
def test_impossible_settings_are_explained(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ResumableBatchSampler(**arguments)


def test_evaluation_shares_without_repeating() -> None:
    parts = [list(UnpaddedSampler(17, r, 4)) for r in range(4)]
    assert parts[1] == [1, 5, 9, 13] and sorted(functools.reduce(operator.iadd, parts, [])) == list(range(17))
    assert [len(UnpaddedSampler(17, r, 4)) for r in range(4)] == [5, 4, 4, 4]
    with pytest.raises(ConfigError, match=r"rank must lie in"):
        UnpaddedSampler(3, -1, 2)


def test_seeds_of_neighbours_are_unrelated() -> None:
    seeds = {sample_seed(s, e, i) for s in range(3) for e in range(4) for i in range(50)}
    assert len(seeds) == 600 and all(0 <= s < 2**63 for s in seeds)
    assert sample_seed(1, 11) != sample_seed(11, 1)


def test_balanced_batches_draw_classes_equally_and_can_be_cut_anywhere() -> None:
    members = members_by_class([[1, 0, 0]] * 30 + [[0, 1, 0]] * 6 + [[1, 1, 0], [0, 0, 0]], 3)
    assert [len(m) for m in members] == [31, 7, 0, 1] and members[3] == [37] and members[1][-1] == 36

    def sampler(batch: int, rank: int = 0, world: int = 1, seed: int = 0) -> ResumableBatchSampler:
        return ResumableBatchSampler(38, batch, seed=seed, rank=rank, world=world, members=members)

    whole = sampler(6)
    epochs: list[list[list[tuple[int, int]]]] = []
    for epoch in range(3):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    assert [len(e) for e in epochs] == [6, 6, 6]
    drawn = [pair for e in epochs for batch in e for pair in batch]
    # 108 draws in 36 rounds of three groups: the one image without a label 36 times, each class 36 times
    assert [p for p, _ in drawn] == list(range(108)), "every draw is augmented anew"
    indices = [i for _, i in drawn]
    assert indices.count(37) == 36 and 36 <= sum(i < 31 or i == 36 for i in indices) <= 36 + 36
    rare = [i for i in indices if 30 <= i <= 36]
    assert max(rare.count(i) for i in range(30, 36)) - min(rare.count(i) for i in range(30, 36)) <= 1, "a class's images take turns"
    again = sampler(6)
    again.set_epoch(1)
    again.start_at(1, 4)
    assert list(again) == epochs[1][4:]
    pieces = [sampler(3, rank, 2) for rank in range(2)]
    for piece in pieces:
        piece.set_epoch(2)
    merged = [sorted(a + b) for a, b in zip(*pieces, strict=True)]
    assert merged == [sorted(batch) for batch in epochs[2]], "the union over the ranks does not depend on their number"
    assert list(sampler(6, seed=1)) != epochs[0]


def test_a_balanced_data_module(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "a", per_class=4)
    for path in (tmp_path / "a" / "train" / "dog").glob("[123].png"):
        path.unlink()
    options = {"root": str(tmp_path / "a"), "size": 16}
    balanced = DataModule("image_folder", 4, options=options, balance=True).train_dataloader()
    plain = DataModule("image_folder", 5, options=options).train_dataloader()
    assert [b.targets.sum(0).tolist() for b in balanced] == [[2, 2]] and [b.targets.sum(0).tolist() for b in plain] == [[4, 1]]
    with pytest.raises(ConfigError, match="balance must be true or false, got 'yes'"):
        DataModule("image_folder", balance="yes")  # type: ignore[arg-type]


def test_a_choice_is_spread_over_classes() -> None:
    members = members_by_class([[1, 0]] * 50 + [[0, 1]] * 5, 2)
    few = spread_over_classes(members, 6)
    assert sum(i >= 50 for i in few) == 3 and few == sorted(set(few)) and set(few) <= set(spread_over_classes(members, 20))
    assert sum(i >= 50 for i in spread_over_classes(members, 20)) == 5 and spread_over_classes(members, 999) == list(range(55))
    assert spread_over_classes(members, 6, seed=1) != few
