"""What every data set must keep: found through the plug-ins, so a new one is tested the day it appears."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest
import torch

from explainer import plugins
from explainer.data.contract import SPLITS, ExplainerDataset, collate
from explainer.data.files import ImageFileDataset
from explainer.errors import ConfigError, DatasetNotFoundError
from tests.factories import dataset_options

NAMES = list(plugins.discover("explainer.data"))
SIZE = 32


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    return {name: dataset_options(name, tmp_path_factory.mktemp(name) / "data") for name in NAMES}


def build(name: str, options: dict[str, dict[str, object]], split: str = "train") -> ExplainerDataset:
    return plugins.build("explainer.data", name, split=split, size=SIZE, **options[name])


def test_the_known_data_sets_are_found() -> None:
    assert {"voc", "coco", "cub", "image_folder", "csv"} <= set(NAMES)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", NAMES)
def test_samples_keep_the_contract(name: str, split: str, options: dict[str, dict[str, object]]) -> None:
    data = build(name, options, split)
    K = data.num_classes
    assert isinstance(data, ExplainerDataset) and len(data) > 0 and K == len(data.class_names) == len(set(data.class_names))
    assert data.task in ("multilabel", "multiclass") and data.split == split and data.size == SIZE
    indices = range(min(len(data), 6))
    samples = [data[i] for i in indices]
    assert len({s.id for s in samples}) == len(samples) and [data.sample_id(i) for i in indices] == [s.id for s in samples]
    for s in samples:
        assert s.image.shape == (3, SIZE, SIZE) and s.image.dtype == torch.float32 and 0 <= s.image.min() < s.image.max() <= 1
        assert s.target.shape == (K,) and set(s.target.tolist()) <= {0.0, 1.0}
        assert data.task == "multilabel" or s.target.sum() == 1
        if s.masks is not None:
            assert s.masks.shape == (K, SIZE, SIZE) and set(s.masks.unique().tolist()) <= {0, 1}
            assert not s.masks[s.target == 0].any(), "pixels of a class that is not labelled"
            void = torch.zeros(SIZE, SIZE, dtype=torch.bool) if s.void is None else s.void
            assert void.dtype == torch.bool and not (s.masks.bool() & void).any()
    batch = collate(samples)
    assert batch.images.shape == (len(samples), 3, SIZE, SIZE) and batch.targets.shape == (len(samples), K)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_a_function_of_its_index(name: str, options: dict[str, dict[str, object]]) -> None:
    one, two = build(name, options), pickle.loads(pickle.dumps(build(name, options)))
    last = min(len(one), 5) - 1
    forward = [one[i].image for i in range(last + 1)]
    torch.manual_seed(0)
    assert all(torch.equal(two[i].image, forward[i]) for i in reversed(range(last + 1)))
    state = torch.random.get_rng_state()
    one[0]
    assert torch.equal(torch.random.get_rng_state(), state), "a sample drew from the global generator"


@pytest.mark.parametrize("name", NAMES)
def test_fingerprints_are_stable_and_differ_by_split_and_size(name: str, options: dict[str, dict[str, object]]) -> None:
    train = build(name, options)
    assert train.fingerprint() == build(name, options).fingerprint()
    other = plugins.build("explainer.data", name, split="train", size=2 * SIZE, **options[name])
    assert len({train.fingerprint(), build(name, options, "val").fingerprint(), other.fingerprint()}) == 3


@pytest.mark.parametrize("name", NAMES)
def test_the_constructor_takes_split_and_size_and_checks_them(name: str, options: dict[str, dict[str, object]]) -> None:
    assert {"split", "size"} <= set(inspect.signature(plugins.find("explainer.data", name)).parameters)
    with pytest.raises(ConfigError, match=r"split must be one of train, val, test"):
        plugins.build("explainer.data", name, split="training", **options[name])
    with pytest.raises(ConfigError, match=r"size"):
        plugins.build("explainer.data", name, split="train", size=0, **options[name])


@pytest.mark.parametrize("name", [n for n in NAMES if "root" in inspect.signature(plugins.find("explainer.data", n)).parameters])
def test_a_missing_folder_says_where_to_put_the_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"the folder .*nowhere.* does not exist\. ."):
        plugins.build("explainer.data", name, split="train", root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("shapes", "images", "shards")])
def test_corrected_masks_and_data_without_masks_are_other_data(name: str, tmp_path: Path) -> None:
    given = {name: dataset_options(name, tmp_path / "data")}
    data = build(name, given)
    assert isinstance(data, ImageFileDataset)
    without = plugins.build("explainer.data", name, split="train", size=SIZE, masks=False, **given[name])
    assert without.fingerprint() != data.fingerprint(), "rows of one are not rows of the other"
    mask = data.source if name == "coco" else next(r.mask for r in data.records if r.mask is not None)
    before = data.fingerprint()
    mask.write_bytes(mask.read_bytes() + b" ")
    assert build(name, given).fingerprint() != before, "a mask file was changed"
