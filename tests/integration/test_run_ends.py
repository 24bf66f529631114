"""How a training ends: with last.ckpt, a validation, a summary and a picture that belong together, and with words where it cannot."""

import json
import re

import pytest
import torch

from explainer import lightning_internals as internals
from explainer.cli import main as train
from explainer.tasks.csv_log import read_rows
from explainer.tasks.saving import SafeCheckpoint
from tests.integration.launch import CLASSIFIER, EXPLAINER

SMALL = ["--data.options", "{size: 32, length: 8}", "--classifier.options", "{widths: [4]}"]
CLASSIFY = [*CLASSIFIER, *SMALL]  # 2 steps an epoch


def state(run, name="last"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("arguments", "steps", "validated"),
    [
        (["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "5"], 4, [3]),
        (["--trainer.max_epochs", "3", "--trainer.check_val_every_n_epoch", "2"], 6, [3, 5]),
        (["--trainer.max_steps", "3", "--trainer.patience", "3"], 3, [1, 2]),
        (["--trainer.max_epochs", "1", "--trainer.extra", "{limit_val_batches: 0}"], 2, []),
        (["--trainer.extra", "{fast_dev_run: true}", "--trainer.patience", "1"], 1, None),
        (["--trainer.patience", "1", "--trainer.min_delta", "10"], 4, [1, 3]),
    ],
)
def test_every_end_leaves_its_files(tmp_path, capsys, arguments, steps, validated):
    run = tmp_path / "r"
    assert train([*CLASSIFY, *arguments, "--run_dir", str(run)]) == 0
    assert state(run)["global_step"] == steps
    announced = re.findall(r"\S+\.ckpt", capsys.readouterr().out.replace("\n", ""))
    assert announced and sorted(announced) == sorted(map(str, {*run.glob("checkpoints/best.ckpt"), run / "checkpoints/last.ckpt"}))
    assert (run / "checkpoints/best.ckpt").is_file() == bool(validated)
    summary = json.loads((run / "summary.json").read_text())
    assert ("val/loss" in summary) == (validated != [])
    if validated is not None:
        rows = [(int(r["step"]), r["val/loss"]) for r in read_rows(run / "metrics.csv") if "val/loss" in r]
        assert [step for step, _ in rows] == validated
        assert not rows or rows[-1][1] == pytest.approx(summary["val/loss"])


def test_a_run_without_validation_is_validated_when_that_is_asked_for(tmp_path, capsys):
    run = f"{tmp_path}/r"
    assert train([*CLASSIFY, "--trainer.max_epochs", "1", "--trainer.extra", "{limit_val_batches: 0}", "--run_dir", run]) == 0
    assert train(["validate", "--config", f"{run}/config.yaml"]) == 2
    assert "limit_val_batches: 0. Give --trainer.extra '{}'" in capsys.readouterr().err
    assert train(["validate", "--config", f"{run}/config.yaml", "--trainer.extra", "{}"]) == 0


def test_the_last_picture_shows_the_last_weights(tmp_path, capsys):
    classifier, run = tmp_path / "c", tmp_path / "r"
    assert train([*CLASSIFY, "--trainer.max_epochs", "1", "--run_dir", str(classifier)]) == 0
    argv = [*EXPLAINER, *SMALL, "--classifier.checkpoint", f"{classifier}/checkpoints/best.ckpt", "--run_dir", str(run)]
    argv += ["--logging.images", "1", "--logging.images_every_n_epochs", "1"]
    assert train([*argv, "--trainer.max_steps", "3"]) == 0
    assert f"contact sheet {run}/images/epoch_001.png" in capsys.readouterr().out.replace("\n", "")
    assert sorted(p.name for p in (run / "images").iterdir()) == ["epoch_000.png", "epoch_001.png"]
    assert train([*argv, "--trainer.max_steps", "1", "--overwrite", "true"]) == 0
    assert [p.name for p in (run / "images").iterdir()] == ["epoch_000.png"], "those of the replaced run are gone"


def test_epochs_without_validation_are_resumed_exactly(tmp_path, capsys):
    argv = [*CLASSIFY, "--trainer.check_val_every_n_epoch", "3", "--trainer.max_epochs", "4"]
    assert train([*argv, "--run_dir", f"{tmp_path}/whole"]) == 0
    assert train([*argv[:-1], "2", "--run_dir", f"{tmp_path}/cut"]) == 0
    assert train([*argv, "--run_dir", f"{tmp_path}/cut", "--ckpt_path", "last"]) == 0
    one, two = (state(tmp_path / name) for name in ("whole", "cut"))
    assert one["global_step"] == two["global_step"] == 8
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())
    capsys.readouterr()
    # Fewer than are done.
    before = {p: p.read_bytes() for p in (tmp_path / "cut").rglob("*") if p.is_file()}
    for option, done in (("max_epochs", "4 epochs"), ("max_steps", "8 steps")):
        assert train([*argv, f"--trainer.{option}", "3", "--run_dir", f"{tmp_path}/cut", "--ckpt_path", "last"]) == 2
        error = capsys.readouterr().err
        assert f"has done {done} and trainer.{option} is 3" in error and "give more than" in error
    assert {p: p.read_bytes() for p in (tmp_path / "cut").rglob("*") if p.is_file()} == before


def test_a_run_cut_before_its_summary_gets_one_and_one_that_trains_on_has_none(tmp_path, monkeypatch):
    argv = [*CLASSIFY, "--run_dir", f"{tmp_path}/r", "--trainer.max_epochs"]
    assert train([*argv, "1"]) == 0
    summary = tmp_path / "r/summary.json"
    measured = json.loads(summary.read_text())
    summary.unlink()
    assert train([*argv, "1", "--ckpt_path", "auto"]) == 0
    again = json.loads(summary.read_text())
    assert again["val/loss"] == pytest.approx(measured["val/loss"])
    seen = []
    monkeypatch.setattr(SafeCheckpoint, "on_train_batch_start", lambda *_: seen.append(summary.exists()))
    assert train([*argv, "2", "--ckpt_path", "auto"]) == 0
    assert seen and not any(seen) and summary.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_epochs", "0"], "trainer.max_epochs is 0: nothing would be trained"),
        (["--trainer.extra", "{limit_train_batches: 0}"], "trainer.limit_train_batches is 0"),
        (["--trainer.patience", "2", "--trainer.extra", "{limit_val_batches: 0}"], "validation is off"),
        (["--trainer.extra", "{limit_val_batches: 0.01}"], "limit_val_batches"),
        (["--trainer.extra", "{val_check_interval: 100}"], "val_check_interval"),
    ],
)
def test_a_training_that_cannot_be_is_refused(tmp_path, capsys, arguments, message):
    assert train([*CLASSIFY, *arguments, "--run_dir", f"{tmp_path}/r"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_classifier_whose_training_was_cut_is_trained_to_its_end(tmp_path, caplog):
    data = "data: {batch_size: 4, options: {size: 32, length: 8}}\n"
    trainer = "trainer: {max_epochs: 2, progress_bar: false, accelerator: cpu}\nlogging: {wandb: 'off'}\n"
    (tmp_path / "c.yaml").write_text(f"task: classify\nrun_dir: {tmp_path}/c\n{data}{trainer}classifier: {{options: {{widths: [4]}}}}\n")
    assert train(["fit", "--config", f"{tmp_path}/c.yaml", "--trainer.max_epochs", "1"]) == 0
    (tmp_path / "c/summary.json").unlink()  # as if killed in the second epoch
    argv = [*EXPLAINER, *SMALL, "--trainer.max_epochs", "1", "--run_dir", f"{tmp_path}/r"]
    argv += ["--classifier.checkpoint", f"{tmp_path}/c/checkpoints/best.ckpt", "--classifier.train_with", f"{tmp_path}/c.yaml"]
    assert train(argv) == 0
    assert "is of a training that was interrupted: training it" in caplog.text
    assert state(tmp_path / "c")["global_step"] == 4


def test_lines_without_a_terminal(tmp_path, capsys, monkeypatch):
    from explainer.tasks import progress_lines

    argv = [*CLASSIFY, "--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2"]
    assert train([*argv, "--trainer.progress_bar", "true", "--run_dir", f"{tmp_path}/r"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("epoch")]
    number = r"\d+\.\d+"
    assert len(lines) == 2
    assert re.fullmatch(rf"epoch 1 of 2, step 2 of 4, train/loss {number}, {number} images/s, \d+ s left", lines[0])
    assert re.fullmatch(rf"epoch 2 of 2, step 4 of 4, train/loss {number}, val/loss {number}, {number} images/s, 0 s left", lines[1])
    monkeypatch.setattr(progress_lines, "_SECONDS_BETWEEN_LINES", 0.0)  # always time for one
    assert train([*argv, "--trainer.progress_bar", "true", "--run_dir", f"{tmp_path}/s"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [" ".join(line.split()[:8]) for line in lines if "train/loss" in line][:2] == [f"epoch 1 of 2, step {n} of 4," for n in (1, 2)]
    assert "validation: batch 1 of 1" in lines
    assert train([*argv, "--run_dir", f"{tmp_path}/t"]) == 0
    assert "epoch" not in capsys.readouterr().err, "progress_bar: false"


@pytest.mark.parametrize(("seconds", "words"), [(-1, "0 s"), (41.4, "41 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")])
def test_durations(seconds, words):
    from explainer.tasks.progress_lines import duration

    assert duration(seconds) == words


def test_lightning_validates_where_it_is_told(tmp_path):
    """Holds what ``validate_at_the_end`` relies on."""
    import pytorch_lightning as pl

    trainer = pl.Trainer(accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    assert not internals.training_ends(trainer)
    trainer.should_stop = True
    assert internals.training_ends(trainer)
    assert callable(trainer.fit_loop.epoch_loop._should_check_val_fx)
