"""What the project relies on inside Lightning, on a real Trainer of two epochs of three batches."""

import logging
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from explainer import lightning_internals as internals


class Line(pl.LightningModule):
    """One weight; remembers what is asked of it."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Spy(pl.loggers.logger.Logger):
    """Keeps the steps of the training rows."""

    name, version = "spy", ""

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.steps.append(step)


def fit(folder, callback, logger=False, ckpt=None, epochs=2):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=logger,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(6, 1)), batch_size=2), ckpt_path=ckpt)
    return trainer


def test_a_stop_takes_effect_after_the_step_in_progress(tmp_path):
    seen = []

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append((trainer.global_step, internals.is_last_batch(trainer)))
            if trainer.global_step == 2:
                internals.stop_after_this_step(trainer)

    with pytest.raises(SystemExit):
        fit(tmp_path, Stop())
    assert seen == [(1, False), (2, False)], "Lightning no longer looks at received_sigterm after a batch"


def test_the_last_batch_is_known(tmp_path):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(internals.is_last_batch(trainer))

    fit(tmp_path, Look())
    assert seen == [False, False, True] * 2


def test_logged_steps_can_be_counted_from_elsewhere(tmp_path):
    logger, told = Spy(), []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            internals.count_logged_steps_from(trainer, 10 + trainer.global_step)
            told.append(internals.logged_step(trainer))

    fit(tmp_path, Count(), logger)
    assert logger.steps == told == [10, 11, 12, 13, 14, 15]


def test_a_row_can_be_logged_before_its_batch_ends(tmp_path):
    logger = Spy()

    class Early(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 1:
                internals.log_step_again(trainer)

    fit(tmp_path, Early(), logger, epochs=1)
    assert logger.steps == [0, 0, 1, 2]


def test_a_checkpoints_content_is_made_without_writing_it(tmp_path):
    found = []

    class Dump(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            found.append(internals.checkpoint_content(trainer))

    trainer = fit(tmp_path, Dump(), epochs=1)
    assert [c["global_step"] for c in found] == [1, 2, 3]
    assert {"state_dict", "optimizer_states", "loops", "epoch"} <= found[-1].keys()
    assert torch.equal(found[-1]["state_dict"]["net.weight"], trainer.lightning_module.net.weight)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(("step", "position"), [(2, (0, 2)), (3, (1, 0)), (4, (1, 1))])
def test_the_position_that_a_checkpoint_goes_on_from(tmp_path, step, position):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    seen = []

    class Look(pl.Callback):
        def on_train_start(self, trainer, *_):
            seen.append(internals.resume_position(trainer))

    fit(tmp_path, Save())
    fit(tmp_path, Look(), ckpt=tmp_path / "middle.ckpt")
    assert seen == [position]


@pytest.mark.parametrize("own", [True, False])
def test_whether_lightning_brings_its_sampler(own):
    trainer = pl.Trainer(accelerator="cpu", logger=False, use_distributed_sampler=own, enable_checkpointing=False)
    assert internals.brings_own_sampler(trainer) is own


def test_the_loggers_that_are_quietened_exist():
    for name in internals._CHATTY[:1]:
        assert name in logging.root.manager.loggerDict, name
