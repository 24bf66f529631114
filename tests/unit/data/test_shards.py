"""Shards give the samples of their source, in an order that can be cut anywhere, whatever the number of processes and workers."""

from __future__ import annotations

import json
import pickle
import tarfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from explainer import plugins
from explainer.cli import main
from explainer.data.contract import ExplainerDataset
from explainer.data.datamodule import DataModule
from explainer.data.files import ImageFileDataset
from explainer.data.shard_index import INDEX, ShardOrder
from explainer.data.shards import Shards
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.tensors import Batch
from tests.factories import dataset_options, make_shards

SIZE = 32
SOURCES = ["shapes", *(n for n in plugins.discover("explainer.data") if n not in ("shapes", "shards"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards("coco", tmp_path_factory.mktemp("coco"))


def source_of(folder: Path, split: str = "train") -> ExplainerDataset:
    return plugins.build("explainer.data", "coco", split=split, size=SIZE, root=str(folder.parent / "source"))


def same(a: Any, b: Any) -> bool:
    return a is None and b is None if a is None or b is None else torch.equal(a.float(), b.float())


@pytest.mark.parametrize("name", SOURCES)
def test_the_samples_are_those_of_the_source(name: str, tmp_path: Path) -> None:
    options = dataset_options(name, tmp_path / "data")
    options |= {"length": 5} if name == "shapes" else {}
    source = plugins.build("explainer.data", name, split="train", size=SIZE, **options)
    from explainer.data.shard_writing import write_index, write_split

    (tmp_path / "shards").mkdir()
    write_index(source, tmp_path / "shards", {"train": write_split(source, tmp_path / "shards", 3, range(len(source)))})
    shards = Shards("train", SIZE, root=str(tmp_path / "shards"))
    assert len(shards) == len(source) and shards.class_names == tuple(source.class_names) and shards.task == source.task
    assert shards.no_region == source.no_region and same(shards.class_counts()[0], source.class_counts()[0])
    for i in range(len(source)):
        a, b = shards[i], source[i]
        assert a.id == b.id and torch.equal(a.target, b.target) and same(a.masks, b.masks)
        assert (a.image - b.image).abs().max() <= (1 / 255 if name == "shapes" else 0)
        assert same(a.void, b.void) or (b.void is None and a.void is not None and not a.void.any())
        if isinstance(source, ImageFileDataset):
            own, theirs = shards.original_masks(i), source.original_masks(i)
            assert (own is None) == (theirs is None) and all(same(x, y) for x, y in zip(own or (), theirs or (), strict=True))


def test_the_layout_is_webdatasets(folder: Path) -> None:
    """Files of a sample lie side by side and share the name up to the first dot."""
    with tarfile.open(folder / "train-000000.tar") as tar:
        names = tar.getnames()
    assert names[:3] == ["000000000.jpg", "000000000.layers.png", "000000000.json"] and len(names) >= 8
    index = json.loads((folder / INDEX).read_text())["splits"]["train"]
    assert [s["samples"] for s in index["shards"]] == [4] * (len(index["shards"]) - 1) + [index["shards"][-1]["samples"]]
    assert sum(s["samples"] for s in index["shards"]) == len(source_of(folder))


def test_webdatasets_own_loader_reads_them(folder: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    files = sorted(str(p) for p in folder.glob("train-*.tar"))
    read = list(webdataset.WebDataset(files, shardshuffle=False))
    shards = Shards("train", SIZE, root=str(folder))
    assert [json.loads(sample["json"])["id"] for sample in read] == [shards.sample_id(i) for i in range(len(shards))]
    assert [sample["jpg"] for sample in read] == [shards.records[i].image.data for i in range(len(shards))]  # type: ignore[union-attr]


@pytest.mark.parametrize("lengths", [[5, 5, 5, 5, 5, 5], [7, 1, 3, 3, 9], [4], [1000, 1, 1000]])
@pytest.mark.parametrize("mixed", [1, 2, 16])
def test_an_order_has_every_sample_once(lengths: list[int], mixed: int) -> None:
    order = ShardOrder(lengths, 3, 0, mixed)
    listed = order[0 : len(order)]
    assert sorted(listed) == list(range(sum(lengths))) and [order[i] for i in range(len(order))] == listed
    assert ShardOrder(lengths, 3, 0, mixed)[:] == listed, "a function of seed and epoch"
    if len(order) > 10:
        assert ShardOrder(lengths, 3, 1, mixed)[:] != listed and ShardOrder(lengths, 4, 0, mixed)[:] != listed


def test_a_rank_reads_its_own_shards() -> None:
    order = ShardOrder([10] * 32, 0, 0, 16)
    for first in (0, 160):  # one group after the other
        own = [{i // 10 for i in order[first : first + 160][rank::4]} for rank in range(4)]
        assert [len(s) for s in own] == [4] * 4 and len(set.union(*own)) == 16


def test_memory_does_not_grow_with_the_samples() -> None:
    """A hundred million samples: the place of the last one is known at once, from one group."""
    order = ShardOrder([10_000] * 10_000, 0, 0, 4)
    assert len(order) == 10**8 and 0 <= order[10**8 - 1] < 10**8
    assert len(order._listed[1]) == 40_000 and len(order.ends) == 2_500


def batches(folder: Path, rank: int = 0, world: int = 1, start: tuple[int, int] = (0, 0), **options: Any) -> list[Batch]:
    """An epoch of training batches as one rank sees them, from a batch of it."""
    given: dict[str, Any] = {"batch_size": 2, "seed": 5, "options": {"root": str(folder), "size": SIZE, "mixed": 2, "augment": "standard"}}
    data = DataModule("shards", **(given | options))
    type(data)._rank_world = property(lambda _: (rank, world))  # type: ignore[assignment,method-assign]
    try:
        loader: DataLoader = data.train_dataloader()
        loader.batch_sampler.set_epoch(start[0])  # type: ignore[union-attr]
        loader.batch_sampler.start_at(*start)  # type: ignore[union-attr]
        return list(loader)
    finally:
        type(data)._rank_world = _RANK_WORLD  # type: ignore[assignment,method-assign]


_RANK_WORLD = DataModule._rank_world


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_bit_by_bit_where_it_stopped(folder: Path, workers: int) -> None:
    whole = batches(folder)
    assert len(whole) == len(Shards("train", SIZE, root=str(folder))) // 2 > 4
    for cut in (1, len(whole) - 1):
        rest = batches(folder, start=(0, cut), num_workers=workers)
        assert [b.ids for b in rest] == [b.ids for b in whole[cut:]]
        for a, b in zip(rest, whole[cut:], strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and same(a.masks, b.masks)
    later = batches(folder, start=(1, 0), num_workers=workers)
    assert [b.ids for b in later] != [b.ids for b in whole] and sorted(i for b in later for i in b.ids) != []


def test_ranks_share_an_epoch_without_a_sample_twice(folder: Path) -> None:
    alone = [set(b.ids) for b in batches(folder, batch_size=4)]
    parts = [batches(folder, rank=r, world=2) for r in range(2)]
    assert [set(a.ids) | set(b.ids) for a, b in zip(*parts, strict=True)] == alone
    seen = Counter(i for part in parts for b in part for i in b.ids)
    assert set(seen.values()) == {1} and len(seen) == len(source_of(folder)) // 4 * 4


def test_a_part_of_the_samples_keeps_its_order(folder: Path) -> None:
    shards = Shards("train", SIZE, root=str(folder))
    ids = [shards.sample_id(i) for i in range(len(shards))]
    whole = shards.fingerprint()
    shards.keep([5, 1, 8])
    assert [shards.sample_id(i) for i in range(3)] == [ids[5], ids[1], ids[8]] and len(shards) == 3
    assert shards.order(0, 0) is None and shards.fingerprint() != whole
    shards.keep([2, 0])
    assert [shards[i].id for i in range(2)] == [ids[8], ids[5]]
    assert same(shards.class_counts()[0], sum(source_of(folder).target(i) for i in (5, 8)))


def test_copies_and_threads_read_the_same(folder: Path) -> None:
    shards = Shards("train", SIZE, root=str(folder))
    shards.reader.keep_open = 1  # so that shards close while others read
    first = [shards[i].image for i in range(len(shards))]
    copy = pickle.loads(pickle.dumps(shards))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(torch.equal(a.image, b) for a, b in zip(pool.map(copy.__getitem__, range(len(copy))), first, strict=True))
    assert threading.active_count() < 20


def test_shards_from_elsewhere_are_fetched_once(folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/shards", recursive=True)
    with pytest.raises(ConfigError, match=r"is not on this machine: say where its shards are kept"):
        Shards("val", SIZE, root="memory://bucket/shards")
    there = Shards("val", SIZE, root="memory://bucket/shards", shard_cache=str(tmp_path / "cache"))
    here = Shards("val", SIZE, root=str(folder))
    assert there.fingerprint() == here.fingerprint(), "the same data, wherever it lies"
    assert not (tmp_path / "cache").exists(), "nothing is fetched before it is asked for"
    assert all(torch.equal(there[i].image, here[i].image) for i in range(len(here)))
    kept = sorted(p.name for p in (tmp_path / "cache").iterdir())
    assert len(kept) == len(here.reader.shards)
    for shard in here.reader.shards:
        memory.pipe(f"/bucket/shards/{shard.file}", b"x" * shard.bytes)
    elsewhere = Shards("val", SIZE, root="memory://bucket/shards", shard_cache=str(tmp_path / "other"))
    with pytest.raises(CorruptSampleError, match=r"the content is not what index\.json says"):
        elsewhere[0]
    assert list((tmp_path / "other").iterdir()) == []
    for shard in here.reader.shards:
        memory.rm(f"/bucket/shards/{shard.file}")
    again = Shards("val", SIZE, root="memory://bucket/shards", shard_cache=str(tmp_path / "cache"))
    assert torch.equal(again[0].image, here[0].image)
    (tmp_path / "cache" / kept[0]).unlink()
    with pytest.raises(CorruptSampleError, match="cannot be fetched"):
        [Shards("val", SIZE, root="memory://bucket/shards", shard_cache=str(tmp_path / "cache"))[i] for i in range(len(here))]


def one_shard(**shard: Any) -> dict[str, Any]:
    return {"splits": {"train": {"shards": [shard], "class_counts": []}}}


def test_what_does_not_fit_is_said(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    shards = Shards("train", SIZE, root=str(copy))
    shard, data = copy / "train-000000.tar", (copy / "train-000000.tar").read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(CorruptSampleError, match=r"train-000000\.tar: the shard has \d+ bytes, index\.json says"):
        shards[0]
    shard.write_bytes(b"x" * len(data))
    with pytest.raises(CorruptSampleError, match="not a readable tar file"):
        shards[0]
    shard.unlink()
    with pytest.raises(CorruptSampleError, match="the shard is missing"):
        shards[0]
    told = json.loads((copy / INDEX).read_text())
    for change, message in (
        ({"format": "other"}, "its format is 'other'"),
        ({"class_names": ["one"]}, "it counts other classes than its 1"),
        (
            {"splits": {"train": {"shards": [{"file": "../x.tar", "samples": 1, "bytes": 1, "digest": ""}], "class_counts": []}}},
            "plain path",
        ),
        (one_shard(file="../x.tar", samples=1, bytes=1, digest=""), "plain path"),
        (one_shard(file="x.tar"), "not an index of shards"),
        (one_shard(file="x.tar", samples=1, bytes=1, digest="../../" + 26 * "0"), "lacks its samples, bytes or digest"),
    ):
        (copy / INDEX).write_text(json.dumps(told | change))
        with pytest.raises(CorruptSampleError, match=message):
            Shards("train", SIZE, root=str(copy))
    (copy / INDEX).write_text("{")
    with pytest.raises(CorruptSampleError, match="not valid JSON"):
        Shards("train", SIZE, root=str(copy))
    (copy / INDEX).unlink()
    with pytest.raises(DatasetNotFoundError, match=r"index\.json does not exist\. Make shards"):
        Shards("train", SIZE, root=str(copy))
    with pytest.raises(ConfigError, match="mixed must be a whole number"):
        Shards("train", SIZE, root=str(folder), mixed=0)


def test_the_command_makes_shards_that_train(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "data.yaml"
    config.write_text(json.dumps({"data": {"name": "coco", "options": {"root": str(folder.parent / "source"), "size": SIZE}}}))
    command = ["data", "shards", str(config), "--out", str(tmp_path / "out"), "--samples", "5", "--splits", "train,val", "--quiet"]
    assert main(command) == 0
    assert "data: {name: shards, options: {root:" in capsys.readouterr().out
    made, source = Shards("train", SIZE, root=str(tmp_path / "out")), source_of(folder)
    assert sorted(made.sample_id(i) for i in range(len(made))) == sorted(source.sample_id(i) for i in range(len(source)))
    assert [made.sample_id(i) for i in range(len(made))] != [source.sample_id(i) for i in range(len(source))], "not in the source's order"
    with pytest.raises(DatasetNotFoundError, match="has no test split, only train, val"):
        Shards("test", SIZE, root=str(tmp_path / "out"))


def test_a_split_made_later_joins_those_that_are_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"root": str(folder.parent / "source"), "size": SIZE}
    (tmp_path / "data.yaml").write_text(json.dumps({"data": {"name": "coco", "options": options}}))
    command = ["data", "shards", str(tmp_path / "data.yaml"), "--out", str(tmp_path / "out"), "--quiet", "--splits"]
    assert main([*command, "train"]) == 0 and f"size: {SIZE}" in capsys.readouterr().out
    assert main([*command, "val"]) == 0
    assert len(Shards("train", SIZE, root=str(tmp_path / "out"))) > 0 and len(Shards("val", SIZE, root=str(tmp_path / "out"))) > 0
    (tmp_path / "data.yaml").write_text(json.dumps({"data": {"name": "shapes", "options": {"size": SIZE, "length": 4}}}))
    assert main([*command, "val"]) == 2
    assert "has shards with class_names" in capsys.readouterr().err
