"""Samples, collation and the identity of data sets."""

from __future__ import annotations

import pytest
import torch

from explainer.data.contract import ExplainerDataset, Sample, collate
from explainer.errors import ConfigError, ShapeError
from tests.unit.data.numbers import Numbers


def sample(i: int = 0, masks: bool = True, void: bool = False, size: int = 4) -> Sample:
    m = torch.zeros(2, size, size, dtype=torch.bool)
    m[0, i % size] = True
    v = torch.eye(size, dtype=torch.bool)
    return Sample(torch.full((3, size, size), i / 10.0), torch.tensor([1.0, 0.0]), f"s{i}", m if masks else None, v if void else None)


def test_collate_stacks_and_turns_masks_into_floats() -> None:
    batch = collate([sample(0), sample(1)])
    assert batch.images.shape == (2, 3, 4, 4) and batch.ids == ("s0", "s1") and batch.images[1].unique().item() == pytest.approx(0.1)
    assert batch.masks is not None and batch.masks.dtype == torch.float32 and batch.masks[1, 0].sum(1).tolist() == [0, 4, 0, 0]
    assert batch.void is None and batch.cues is None
    assert collate([sample(0, masks=False)]).masks is None


def test_samples_without_masks_beside_others_become_all_void() -> None:
    batch = collate([sample(0), sample(1, masks=False), sample(2, void=True)])
    assert batch.masks is not None and batch.void is not None
    assert batch.masks[1].sum() == 0
    assert batch.void[0].sum() == 0 and batch.void[1].all() and torch.equal(batch.void[2], torch.eye(4, dtype=torch.bool))


def test_missing_cues_are_empty() -> None:
    with_cue = sample(0)
    with_cue.cues = torch.ones(2, 4, 4)
    batch = collate([sample(1), with_cue])
    assert batch.cues is not None and batch.cues.sum((1, 2, 3)).tolist() == [0, 32]


def test_samples_of_different_sizes_are_named() -> None:
    with pytest.raises(ShapeError, match=r"'s0' has image \(3, 4, 4\).*'s1' has \(3, 5, 5\)"):
        collate([sample(0), sample(1, size=5)])
    odd = sample(1)
    odd.masks = torch.zeros(3, 4, 4)
    with pytest.raises(ShapeError, match=r"masks of 's1' is \(3, 4, 4\), expected \(K,H,W\) = \(2, 4, 4\)"):
        collate([sample(0), odd])


def test_split_and_size_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"split must be one of train, val, test, got 'training'"):
        Numbers(split="training")
    with pytest.raises(ConfigError, match=r"size must be a whole number of pixels"):
        ExplainerDataset.__init__(Numbers(), "train", 4)


def test_fingerprints_tell_data_sets_apart() -> None:
    assert Numbers().fingerprint() == Numbers().fingerprint()
    assert len({Numbers().fingerprint(), Numbers(9).fingerprint(), Numbers(split="val").fingerprint()}) == 3
