"""A run that was cut and resumed ends with the same weights, bit for bit."""

import torch

from explainer.cli import train

TINY = [
    "--data.options", "{size: 32, length: 24, augment: symmetry}", "--data.batch_size", "4", "--data.eval_batch_size", "12",
    "--trainer.progress_bar", "false", "--trainer.accelerator", "cpu", "--logging.wandb", "off", "--logging.images", "0",
    "--masking.binarize", "0.5", "--masking.subset", "0.5", "--masking.fill", "random", "--optimizer.schedule", "one_cycle",
    "--explainer.network", "deeplabv3plus", "--explainer.options", "{encoder_name: resnet18}", "--optimizer.lr", "0.001",
]  # fmt: skip


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path):
    assert train([
        "fit", "--task", "classify", "--run_dir", f"{tmp_path}/c", "--classifier.options", "{widths: [8, 8]}",
        *TINY[:6], *TINY[6:10], "--logging.wandb", "off", "--trainer.max_epochs", "1",
    ]) == 0  # fmt: skip
    common = ["fit", "--classifier.checkpoint", f"{tmp_path}/c/checkpoints/best.ckpt", *TINY, "--trainer.max_epochs", "2"]
    # 6 steps an epoch. The uninterrupted run leaves a checkpoint after 4 of them, from which another run goes on.
    uninterrupted = [*common, "--run_dir", f"{tmp_path}/whole", "--trainer.extra", "{limit_val_batches: 1.0}"]
    import pytorch_lightning as pl

    from explainer.tasks import run as runner

    class SaveInTheMiddle(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    original = runner.build_trainer

    def with_saving(config, fitting=True):
        trainer = original(config, fitting)
        trainer.callbacks.append(SaveInTheMiddle())
        return trainer

    runner.build_trainer = with_saving
    try:
        assert train(uninterrupted) == 0
    finally:
        runner.build_trainer = original
    assert train([*uninterrupted, "--run_dir", f"{tmp_path}/resumed", "--ckpt_path", f"{tmp_path}/middle.ckpt"]) == 0
    whole, resumed = weights(f"{tmp_path}/whole/checkpoints/last.ckpt"), weights(f"{tmp_path}/resumed/checkpoints/last.ckpt")
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key
