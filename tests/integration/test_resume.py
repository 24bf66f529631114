"""A run that was cut and resumed ends with the same weights, bit for bit; and what a second fit does to a run that is there."""

import json

import pytest
import torch
import yaml

from explainer.cli import main as train
from tests.integration.launch import CLASSIFIER

TINY = [
    "--data.options",
    "{size: 32, length: 24, augment: symmetry}",
    "--data.batch_size",
    "4",
    "--data.eval_batch_size",
    "12",
    "--trainer.progress_bar",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--logging.wandb",
    "off",
    "--logging.images",
    "0",
    "--masking.binarize",
    "0.5",
    "--masking.subset",
    "0.5",
    "--masking.fill",
    "random",
    "--optimizer.schedule",
    "one_cycle",
    "--explainer.network",
    "deeplabv3plus",
    "--explainer.options",
    "{encoder_name: resnet18}",
    "--optimizer.lr",
    "0.001",
]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path):
    assert (
        train(
            [
                "fit",
                "--task",
                "classify",
                "--run_dir",
                f"{tmp_path}/c",
                "--classifier.options",
                "{widths: [8, 8]}",
                *TINY[:6],
                *TINY[6:10],
                "--logging.wandb",
                "off",
                "--trainer.max_epochs",
                "1",
            ]
        )
        == 0
    )
    common = ["fit", "--classifier.checkpoint", f"{tmp_path}/c/checkpoints/best.ckpt", *TINY, "--trainer.max_epochs", "2"]
    # 6 steps an epoch. The uninterrupted run leaves a checkpoint after 4 of them, from which another run goes on.
    uninterrupted = [*common, "--run_dir", f"{tmp_path}/whole", "--trainer.extra", "{limit_val_batches: 1.0}"]
    import pytorch_lightning as pl

    from explainer.commands import fit as runner

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


# ---------------------------------------------------------------------- a second fit in one folder
@pytest.fixture
def argv(tmp_path):
    """A finished run of one epoch in ``tmp_path/r``."""
    arguments = [*CLASSIFIER, "--trainer.max_epochs", "1", "--run_dir", f"{tmp_path}/r"]
    assert train(arguments) == 0
    return arguments


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_second_fit_does_not_replace_a_run(argv, tmp_path, capsys):
    before = content(tmp_path / "r")
    assert train([*argv, "--seed", "3"]) == 2
    error = capsys.readouterr().err
    assert "holds a finished run (best.ckpt, last.ckpt)" in error
    for remedy in ("--ckpt_path last", "--run_dir", "--overwrite true"):
        assert remedy in error
    assert content(tmp_path / "r") == before
    (tmp_path / "r/summary.json").unlink()
    (tmp_path / "r/checkpoints/best.ckpt").unlink()
    assert train(argv) == 2
    assert "holds a begun run (last.ckpt)" in capsys.readouterr().err


def test_overwrite_replaces_it_and_is_not_saved(argv, tmp_path):
    assert train([*argv, "--overwrite", "true", "--seed", "3"]) == 0
    saved = yaml.safe_load((tmp_path / "r/config.yaml").read_text())
    assert saved["seed"] == 3 and "overwrite" not in saved and "ckpt_path" not in saved
    assert torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


def test_a_replaced_run_is_gone_before_the_first_step(argv, tmp_path, monkeypatch):
    """Else a restart before the first checkpoint would go on from the old one."""
    assert train([*argv, "--overwrite", "true", "--optimizer.lr", "1e38", "--optimizer.name", "sgd"]) == 2
    assert not list((tmp_path / "r/checkpoints").glob("*.ckpt"))


def test_going_back_to_best_sets_the_later_weights_aside(argv, tmp_path, monkeypatch):
    import pytorch_lightning as pl

    from explainer.commands import fit as runner

    folder, seen = tmp_path / "r/checkpoints", []

    class Look(pl.Callback):
        def on_train_start(self, *_):
            seen.append(sorted(p.name for p in folder.glob("*.ckpt")))

    original = runner.build_trainer

    def with_look(config, fitting=True):
        trainer = original(config, fitting)
        trainer.callbacks.append(Look())
        return trainer

    monkeypatch.setattr(runner, "build_trainer", with_look)
    assert train([*argv, "--ckpt_path", "best", "--trainer.max_epochs", "2"]) == 0
    assert seen == [["best.ckpt", "replaced-last.ckpt"]]
    assert train([*argv, "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert {"best.ckpt", "last.ckpt"} < set(seen[1]), "nothing is moved where last itself goes on"


def test_a_finished_run_that_is_resumed_keeps_its_summary(argv, tmp_path):
    before = json.loads((tmp_path / "r/summary.json").read_text())
    assert before
    assert train([*argv, "--ckpt_path", "auto"]) == 0
    assert json.loads((tmp_path / "r/summary.json").read_text()) == before


def test_another_optimiser_is_refused_on_resume(argv, tmp_path, capsys):
    before = content(tmp_path / "r")
    more = [*argv, "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert train([*more, "--optimizer.lr", "0.5", "--optimizer.weight_decay", "0.25"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr is 0.5 and was 0.0001; optimizer.weight_decay is 0.25 and was 0.0 when" in error and "--init_from" in error
    assert content(tmp_path / "r") == before, "config.yaml still says what was done"
    assert train([*more, "--optimizer.encoder_lr", "0.5"]) == 2
    assert "optimizer.encoder_lr is 0.5 and was 1.0 when" in capsys.readouterr().err
    assert train(more) == 0
    # The remedy.
    new = [*CLASSIFIER, "--trainer.max_epochs", "1", "--run_dir", f"{tmp_path}/new", "--init_from", f"{tmp_path}/r/checkpoints/last.ckpt"]
    assert train([*new, "--optimizer.lr", "0.5"]) == 0


def test_a_checkpoint_without_optimiser_section_is_asked_for_its_rate(argv, tmp_path, capsys):
    path = tmp_path / "r/checkpoints/last.ckpt"
    old = torch.load(path, weights_only=True)
    del old["hyper_parameters"]["optimizer"], old["run"]
    torch.save(old, path)
    more = [*argv, "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert train([*more, "--optimizer.lr", "0.5"]) == 2
    assert "optimizer.lr is 0.5 and was 0.0001" in capsys.readouterr().err
    assert train(more) == 0


def test_another_run_is_refused_key_by_key(argv, tmp_path, capsys, caplog):
    """The rules themselves: tests/unit/tasks/test_run_identity.py."""
    before = content(tmp_path / "r")
    more = [*argv, "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    changed = [
        "--data.batch_size",
        "6",
        "--seed",
        "1",
        "--data.options",
        "{size: 32, length: 24, seed: 2}",
        "--classifier.occlusion.blank",
        "0.5",
    ]
    assert train([*more, *changed]) == 2
    error = " ".join(capsys.readouterr().err.split())
    for words in (
        "seed is 1 and was 0",
        "data.batch_size is 6 and was 4",
        "data.options.seed is 2 and was null",
        "classifier.occlusion.blank is 0.5 and was 0.0",
    ):
        assert words in error
    assert train([*more, "--classifier.options", "{widths: [8, 4]}"]) == 2
    assert "classifier.options.widths is [8, 4] and was [8, 8]" in capsys.readouterr().err
    assert content(tmp_path / "r") == before
    assert train([*more, "--data.eval_batch_size", "5", "--trainer.gradient_clip_val", "9.0"]) == 0
    assert "trainer.gradient_clip_val is 9.0 and was null" in caplog.text and "eval_batch_size" not in caplog.text


def test_classes_in_another_order_are_refused(argv, tmp_path, capsys):
    path = f"{tmp_path}/r/checkpoints/last.ckpt"
    names = ["checks", "stripes", "dots", "rings", "grid", "wedges"]
    swapped = ["--data.options", f"{{size: 32, length: 24, class_names: [{', '.join(names)}]}}"]
    for arguments in (
        ["--init_from", path],
        ["--classifier.init_from", path],
        ["--classifier.checkpoint", path],
        ["--ckpt_path", path],
    ):
        assert train([*argv, *swapped, *arguments, "--run_dir", f"{tmp_path}/new"]) == 2, arguments
        error = " ".join(capsys.readouterr().err.split())
        assert "in another order" in error or "data.options.class_names is ['checks'" in error
    for command in ("validate", "test", "predict"):
        assert train([command, *argv[1:], *swapped]) == 2
        assert "in another order" in capsys.readouterr().err
    other = ["--data.options", "{size: 32, length: 24, class_names: [dots, rings]}"]
    assert train(["validate", *argv[1:], *other]) == 2
    assert "was trained for the classes stripes" in capsys.readouterr().err
