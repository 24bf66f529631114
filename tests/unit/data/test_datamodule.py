"""Skipping of bad samples, and the data module's loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from explainer.data.contract import ExplainerDataset
from explainer.data.datamodule import DataModule
from explainer.errors import ConfigError, CorruptSampleError, UnknownNameError
from tests.factories import NAMES, make_voc
from tests.unit.data.numbers import Numbers


def module(datasets: dict[str, ExplainerDataset], **options: object) -> DataModule:
    data = DataModule("voc", **options)
    data._datasets.update(datasets)
    return data


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_workers(workers: int) -> None:
    def epochs(num_workers: int) -> list[tuple[tuple[str, ...], torch.Tensor]]:
        loader = module({"train": Numbers(12)}, batch_size=4, num_workers=num_workers, seed=3).train_dataloader()
        out = []
        for epoch in range(2):  # persistent workers must follow the epoch too
            loader.batch_sampler.set_epoch(epoch)
            out += [(b.ids, b.images) for b in loader]
        return out

    one, many = epochs(0), epochs(workers)
    assert len(one) == 6 and [i for i, _ in one] == [i for i, _ in many]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, many, strict=True))
    first = {i: image for ids, images in one[:3] for i, image in zip(ids, images, strict=True)}
    second = {i: image for ids, images in one[3:] for i, image in zip(ids, images, strict=True)}
    assert all(not torch.equal(first[i], second[i]) for i in first)  # the augmentation changes with the epoch


def test_the_seed_changes_order_and_augmentation() -> None:
    def first(seed: int) -> tuple[tuple[str, ...], torch.Tensor]:
        data = module({}, batch_size=4, seed=seed)
        data._datasets["train"] = Numbers(12)
        data._datasets["train"].augmentation_seed = data.seed
        batch = next(iter(data.train_dataloader()))
        return batch.ids, batch.images

    assert first(0)[0] != first(1)[0] and torch.equal(first(0)[1], first(0)[1])


def test_evaluation_serves_everything_once_in_order() -> None:
    data = module({"val": Numbers(7, split="val")}, batch_size=3, eval_batch_size=2)
    assert [len(b) for b in data.val_dataloader()] == [2, 2, 2, 1]
    assert sum((b.ids for b in data.val_dataloader()), ()) == tuple(f"val/{i:06d}" for i in range(7))


@pytest.mark.parametrize("workers", [0, 1])
def test_skipping_substitutes_in_training_and_leaves_out_in_evaluation(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    sets = {"train": Numbers(8, bad=(2, 3)), "val": Numbers(8, bad=(0, 1, 5), split="val")}
    data = module(sets, batch_size=2, num_workers=workers, on_error="skip")
    train = list(data.train_dataloader())
    assert [len(b) for b in train] == [2, 2, 2, 2]
    assert sorted(i for b in train for i in b.ids) == sorted([f"train/{i:06d}" for i in (0, 1, 4, 4, 4, 5, 6, 7)])
    val = list(data.val_dataloader())
    assert [b.ids for b in val] == [("val/000002", "val/000003"), ("val/000004",), ("val/000006", "val/000007")]
    assert data.skipped["val"]["val/000005"] == "file5.jpg: broken"
    data.teardown()
    assert "2 in train (train/0000" in caplog.text and "3 in val (val/000000, val/000001, val/000005)" in caplog.text


def test_raising_names_the_file_and_nothing_readable_is_an_error() -> None:
    with pytest.raises(CorruptSampleError, match=r"file5\.jpg: broken"):
        list(module({"val": Numbers(8, bad=(5,))}, batch_size=2).val_dataloader())
    everything = module({"train": Numbers(4, bad=(0, 1, 2, 3))}, batch_size=2, on_error="skip")
    with pytest.raises(CorruptSampleError, match=r"none of the 4 samples can be read"):
        list(everything.train_dataloader())


def test_wrong_settings_are_explained() -> None:
    with pytest.raises(ConfigError, match='on_error must be "raise" or "skip", got \'ignore\''):
        DataModule("voc", on_error="ignore")
    with pytest.raises(ConfigError, match=r"batch_size must be a whole number of at least 1, got 0"):
        DataModule("voc", batch_size=0)
    with pytest.raises(ConfigError, match=r"predict_split must be one of"):
        DataModule("voc", predict_split="all")
    with pytest.raises(UnknownNameError, match=r"Did you mean 'voc'"):
        DataModule("vocs").dataset("train")
    with pytest.raises(ConfigError, match=r"voc has no option 'rot'. Did you mean 'root'"):
        DataModule("voc", options={"rot": "x"}).dataset("train")
    with pytest.raises(ConfigError, match=r"at least 2 per device"):
        module({"train": Numbers()}, batch_size=1).train_dataloader()
    with pytest.raises(ConfigError, match=r"batch_size 5 cannot be shared evenly by 2 devices"):
        DataModule("voc", batch_size=5, global_batch=True)._per_device(2)
    assert DataModule("voc", batch_size=6, global_batch=True)._per_device(2) == 3


def test_loader_options_come_from_the_configuration() -> None:
    from explainer.commands.building import data_module
    from explainer.commands.parsing import parse_run

    argv = ["fit", "--data.options", "{size: 32, length: 24}"]
    given = [*argv, "--data.num_workers", "1", "--data.prefetch_factor", "5", "--data.pin_memory", "false"]
    loader = data_module(parse_run(given)[1]).eval_dataloader("val")
    assert loader.prefetch_factor == 5 and loader.pin_memory is False
    loader = data_module(parse_run([*argv, "--data.pin_memory", "true"])[1]).eval_dataloader("val")
    assert loader.prefetch_factor is None and loader.pin_memory is True
    loader = data_module(parse_run(argv)[1]).eval_dataloader("val")
    assert loader.pin_memory is torch.cuda.is_available()
    with pytest.raises(ConfigError, match=r"prefetch_factor 4 is of worker processes, and num_workers is 0"):
        data_module(parse_run([*argv, "--data.prefetch_factor", "4"])[1])
    with pytest.raises(ConfigError, match=r"prefetch_factor must be a whole number of at least 1, got 0"):
        DataModule("shapes", num_workers=1, prefetch_factor=0)
    with pytest.raises(ConfigError, match=r"pin_memory must be true, false or null .*, got 'yes'"):
        DataModule("shapes", pin_memory="yes")  # type: ignore[arg-type]


def test_options_of_splits(tmp_path: Path) -> None:
    make_voc(tmp_path)
    options = {"root": str(tmp_path), "class_names": list(NAMES), "size": 16}
    data = DataModule("voc", options=options, train_options={"augment": "light", "masks": False}, eval_options={"size": 24}, seed=4)
    data.setup("fit")
    assert set(data._datasets) == {"train", "val"}
    train, val = data.dataset("train"), data.dataset("val")
    assert (train.augmentation.flip, val.augmentation.flip) == (0.5, 0.0) and (train.size, val.size) == (16, 24)
    assert train[0].masks is None and val[0].masks is not None and train.augmentation_seed == 4
    assert data.class_names == NAMES and data.num_classes == 3 and data.task == "multilabel"
    data.setup()
    assert len(data.predict_dataloader().dataset) == 3
