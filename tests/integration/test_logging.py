"""Loggers never stand in the way: wandb where it is asked for, its folder inside the run folder, CSV beside it."""

import importlib.util

import pytest

from explainer.cli import main as train
from explainer.config import RunConfig
from explainer.errors import ConfigError
from explainer.tasks import loggers

FIT = [
    "fit",
    "--task",
    "classify",
    "--classifier.options",
    "{widths: [8, 8]}",
    "--data.options",
    "{size: 32, length: 8}",
    "--data.batch_size",
    "4",
    "--trainer.max_epochs",
    "1",
    "--trainer.progress_bar",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--trainer.log_every_n_steps",
    "1",
]


@pytest.fixture(autouse=True)
def no_account(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_curves_stay_here_unless_asked_for(tmp_path, capfd):
    assert train([*FIT, "--run_dir", f"{tmp_path}/run"]) == 0
    assert not (tmp_path / "run/wandb").exists()
    assert "train/loss" in (tmp_path / "run/metrics.csv").read_text()
    assert train([*FIT, "--run_dir", f"{tmp_path}/asked", "--logging.wandb", "offline"]) == 0
    assert list((tmp_path / "asked/wandb").glob("offline-run-*"))
    text = "".join(capfd.readouterr()).lower()
    # Our own WARNING lines may say that eight images make no classifier.
    assert not [words for words in ("wandb:", "userwarning", "futurewarning", "deprecat", "future version") if words in text]


@pytest.mark.parametrize(
    ("mode", "environment", "started"),
    [
        ("auto", {}, None),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_MODE": "offline"}, "offline"),
        ("online", {}, "online"),
        ("online", {"WANDB_MODE": "disabled"}, None),
        ("off", {"WANDB_API_KEY": "k"}, None),
    ],
)
def test_when_wandb_is_started(tmp_path, monkeypatch, mode, environment, started):
    seen = []
    monkeypatch.setattr(loggers, "_wandb", lambda config, folder, offline: seen.append("offline" if offline else "online"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = RunConfig(run_dir=str(tmp_path))
    config.logging.wandb = mode
    assert len(loggers.loggers(config)) == 1
    assert seen == [started] * (started is not None)


def test_tensorboard_is_offered(tmp_path, monkeypatch):
    config = RunConfig(run_dir=str(tmp_path))
    config.logging.tensorboard = True
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ConfigError, match=r"pip install 'explainer-net\[tensorboard\]'"):
            loggers.loggers(config)
        return
    assert train([*FIT, "--run_dir", f"{tmp_path}/run", "--logging.tensorboard", "true"]) == 0
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
