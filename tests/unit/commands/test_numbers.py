"""Numbers that cannot work are refused in words, before anything is read or computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from explainer.cli import main
from explainer.commands import assembly, calibration, concepts_run, evaluation, filling
from explainer.commands.arguments import probability, side
from explainer.commands.calibrate_config import CalibrateConfig
from explainer.commands.concepts_config import ConceptsConfig
from explainer.commands.maps_config import MapsConfig
from explainer.config import OptimizerConfig, RunConfig, TrainerConfig
from explainer.errors import ConfigError
from explainer.evaluation.config import CacheConfig, EvaluateConfig, MethodConfig
from explainer.tasks.optim import configure
from explainer.tasks.trainer import build_trainer


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("limit", -3), ("threads", 0), ("bootstrap", -1), ("confidence", 95)])
@pytest.mark.parametrize(("run", "config"), [(evaluation.run, EvaluateConfig), (concepts_run.run, ConceptsConfig)])
def test_evaluations(run: Callable[[Any], int], config: type, name: str, value: int, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must .*received {value}\."):
        run(config(out=str(tmp_path / "out"), **{name: value}))


@pytest.mark.parametrize("name", ["batch_size", "limit", "threads"])
def test_maps(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be at least 1, received 0"):
        filling.run(MapsConfig(method=MethodConfig("grad_cam"), cache=CacheConfig("maps"), **{name: 0}))


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("iterations", 0), ("alpha", 10.0), ("delta", 0.0), ("predicted_from", 1.5)]
)
def test_calibration(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} must .*received {value}\."):
        calibration.run(CalibrateConfig(model="best.ckpt", **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"), [("lr", -1e-3), ("lr", float("nan")), ("lr", float("inf")), ("weight_decay", -1.0), ("warmup", 1.5)]
)
def test_optimizer(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^optimizer\.{name} must .*received {value}\."):
        configure([torch.nn.Parameter(torch.zeros(1))], OptimizerConfig(**{name: value}), lambda: 1)


@pytest.mark.parametrize("name", ["gpuu", *([] if torch.cuda.is_available() else ["cuda"])])
def test_devices(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^device '{name}' cannot be used here"):
        assembly.device_of(name)
    assert assembly.device_of("cpu") == "cpu"


def test_a_threshold_is_a_probability() -> None:
    """An exported file with a threshold above 1 could not be opened again."""
    assert probability("0.25") == 0.25
    with pytest.raises(Exception, match="expected a probability from 0 to 1, received '50'"):
        probability("50")


def test_a_side_is_bounded() -> None:
    """One image of 33333 px is 13 GB."""
    assert side("224") == 224
    with pytest.raises(Exception, match="a side of at most 4096 pixels, received '33333'"):
        side("33333")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 0),
        ("check_val_every_n_epoch", 0),
        ("save_every_n_steps", 0),
        ("patience", -1),
        ("gradient_clip_val", -1.0),
    ],
)
def test_trainer(name: str, value: Any, tmp_path: Any) -> None:
    """Lightning takes them, and divides by 0 after the data was read, or does not stop, save and clip as was asked for."""
    with pytest.raises(ConfigError, match=r"^trainer\.\w+ must be at least [01], received"):
        build_trainer(RunConfig(run_dir=str(tmp_path), trainer=TrainerConfig(accelerator="cpu", **{name: value})))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "64-true"])
def test_precisions_that_would_change_the_losses(precision: str, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=f"^trainer.precision {precision} would change .*: use 32-true, bf16-mixed"):
        build_trainer(RunConfig(run_dir=str(tmp_path), trainer=TrainerConfig(accelerator="cpu", precision=precision)))


@pytest.mark.parametrize("command", ["test", "validate", "predict"])
def test_a_mistyped_run_does_not_become_a_folder(command: str, tmp_path: Any, capsys: Any) -> None:
    assert main([command, "--run_dir", str(tmp_path / "typo")]) == 2
    assert "typo/checkpoints/best.ckpt does not exist" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
