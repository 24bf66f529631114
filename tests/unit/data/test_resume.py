"""A run that is cut in the middle of an epoch and resumed sees exactly the batches of an uninterrupted one."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from explainer.data.contract import SPLITS
from explainer.data.datamodule import DataModule
from explainer.errors import ConfigError
from explainer.tensors import Batch
from tests.unit.data.numbers import Numbers


class Recorder(pl.LightningModule):
    """Records what it is given; ``stop_in`` raises inside the training step of that global step."""

    def __init__(self, stop_in: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, tuple[str, ...], float]] = []
        self.validated: list[str] = []
        self.stop_in = stop_in

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        if self.global_step == self.stop_in:
            raise KeyboardInterrupt
        self.seen.append((self.current_epoch, batch.ids, batch.images.sum().item()))
        return (self.weight - batch.images.mean()) ** 2

    def validation_step(self, batch: Batch, _: int) -> None:
        self.validated += batch.ids

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, model: Recorder, ckpt: str | None = None, workers: int = 0, among: Any = None, **options: Any) -> None:
    data = DataModule("voc", batch_size=3, num_workers=workers, seed=7)
    if among is not None:
        model.training_images = among  # as a task that learns from a part of the images has it
    data._datasets.update({s: Numbers(16, split=s) for s in SPLITS})
    for dataset in data._datasets.values():
        dataset.augmentation_seed = 7
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 3,
        "default_root_dir": folder,
        "callbacks": [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_exception=True)],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(**{**settings, **options})
        trainer.fit(model, datamodule=data, ckpt_path=ckpt, weights_only=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    folder, model = tmp_path_factory.mktemp("whole"), Recorder()
    fit(folder, model)
    assert len(model.seen) == 15 and len({ids for _, ids, _ in model.seen}) == 15
    assert model.validated == [f"val/{i:06d}" for i in range(16)] * 3
    return folder, model


# 1, 7: in the middle of the first and second epoch; 4, 6: before the last and after the first batch; 5, 10: after the last
@pytest.mark.parametrize(("step", "workers"), [(1, 0), (4, 0), (5, 0), (6, 0), (7, 0), (10, 0), (5, 1), (7, 1)])
def test_resuming_goes_on_with_the_next_batch(whole: tuple[Path, Recorder], tmp_path: Path, step: int, workers: int) -> None:
    folder, reference = whole
    resumed = Recorder()
    fit(tmp_path, resumed, ckpt=str(folder / f"step={step}.ckpt"), workers=workers)
    assert resumed.seen == reference.seen[step:]
    assert torch.equal(resumed.weight, reference.weight)


@pytest.mark.parametrize(("step", "workers"), [(2, 0), (7, 1)])
def test_resuming_while_batches_come_from_chosen_images(tmp_path: Path, step: int, workers: int) -> None:
    reference, resumed, progress = Recorder(), Recorder(), []

    def among(done: float) -> list[int] | None:
        progress.append(done)
        return [1, 4, 6, 9] if done < 0.5 else None

    fit(tmp_path, reference, among=among)
    assert progress == [pytest.approx(s / 15) for s in range(15)]
    early = {i for _, ids, _ in reference.seen[:8] for i in ids}
    assert early == {f"train/{i:06d}" for i in (1, 4, 6, 9)} and len({i for _, ids, _ in reference.seen[8:10] for i in ids}) == 6
    assert len({total for _, _, total in reference.seen}) == 15, "an image drawn again is augmented anew"
    fit(tmp_path / "again", resumed, ckpt=str(tmp_path / f"step={step}.ckpt"), workers=workers, among=among)
    assert resumed.seen == reference.seen[step:]


@pytest.mark.parametrize("each", [1, 2, 4])
def test_the_share_that_is_done_counts_optimiser_steps(tmp_path: Path, each: int) -> None:
    """Five batches an epoch: with 2 (4) of them a step, an epoch makes 3 (2) steps, and the last is of what is left."""
    model, asked = Recorder(), []

    class Steps(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            asked.append(trainer.global_step / trainer.estimated_stepping_batches)

    seen: list[float] = []
    fit(tmp_path, model, among=lambda done: seen.append(done), accumulate_grad_batches=each, callbacks=[Steps()])
    assert len(asked) == 15 and seen == pytest.approx(asked)


def test_an_exception_inside_a_step_repeats_that_step(whole: tuple[Path, Recorder], tmp_path: Path) -> None:
    _, reference = whole
    cut = Recorder(stop_in=8)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, cut, callbacks=[ModelCheckpoint(tmp_path, filename="last", save_on_exception=True)])
    assert len(cut.seen) == 8
    (checkpoint,) = tmp_path.glob("*.ckpt")
    resumed = Recorder()
    fit(tmp_path / "again", resumed, ckpt=str(checkpoint))
    assert cut.seen + resumed.seen == reference.seen and torch.equal(resumed.weight, reference.weight)


def test_a_limited_epoch_resumes_after_its_last_batch(tmp_path: Path) -> None:
    reference, resumed = Recorder(), Recorder()
    fit(tmp_path, reference, limit_train_batches=3)
    assert len(reference.seen) == 9
    fit(tmp_path / "again", resumed, ckpt=str(tmp_path / "step=3.ckpt"), limit_train_batches=3)
    assert resumed.seen == reference.seen[3:]


def test_reloading_the_loader_every_epoch_starts_at_its_beginning(whole: tuple[Path, Recorder], tmp_path: Path) -> None:
    model = Recorder()
    fit(tmp_path, model, reload_dataloaders_every_n_epochs=1)
    assert model.seen == whole[1].seen


def test_training_by_steps_over_epoch_ends(whole: tuple[Path, Recorder], tmp_path: Path) -> None:
    folder, reference = whole
    resumed = Recorder()
    fit(tmp_path, resumed, ckpt=str(folder / "step=7.ckpt"), max_epochs=None, max_steps=12)
    assert resumed.seen == reference.seen[7:12]


def test_lightnings_own_sampler_is_refused() -> None:
    data = DataModule("voc", batch_size=2)
    data._datasets["train"] = Numbers(8)

    class Connector:
        use_distributed_sampler = True

    class FakeTrainer:
        global_rank, world_size, _accelerator_connector = 0, 2, Connector()

    data.trainer = FakeTrainer()
    with pytest.raises(ConfigError, match=r"use_distributed_sampler=False"):
        data.train_dataloader()


def test_prediction_keeps_order_and_single_pass(tmp_path: Path) -> None:
    class Predictor(Recorder):
        def predict_step(self, batch: Batch, _: int) -> tuple[str, ...]:
            return batch.ids

    data = DataModule("voc", batch_size=3)
    data._datasets.update({s: Numbers(7, split=s) for s in SPLITS})
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, use_distributed_sampler=False, default_root_dir=tmp_path
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = trainer.predict(Predictor(), datamodule=data)
    assert sum(ids, ()) == tuple(f"test/{i:06d}" for i in range(7))
    assert isinstance(data.predict_dataloader(), DataLoader)
