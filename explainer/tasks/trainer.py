"""Lightning's Trainer as this project sets it up."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from explainer.config import RunConfig, TrainerConfig
from explainer.errors import ConfigError
from explainer.lightning_internals import validate_at_the_end
from explainer.tasks.callbacks import FiniteGradients, HealthAlarm, MaskPictures, StepSeed, in_torchrun, remedies
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.csv_log import KeepEarlierRows
from explainer.tasks.explain import ExplainTask
from explainer.tasks.loggers import loggers
from explainer.tasks.progress_lines import ProgressLines, in_terminal
from explainer.tasks.saving import AtomicCheckpointIO, SafeCheckpoint
from explainer.tasks.stopping import GracefulStop, in_slurm


def build_trainer(config: RunConfig, fitting: bool = True) -> pl.Trainer:
    """Lightning's Trainer with this project's loggers, callbacks and settings.

    Args:
        config: the run.
        fitting: whether it will train; else it only evaluates, without loggers and checkpoints.

    Raises:
        ConfigError: Lightning refuses the ``trainer`` section.
    """
    t = config.trainer
    devices, nodes, strategy = _devices(t)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if in_torchrun() is None and in_slurm() and SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # GracefulStop does it, between two steps
    arguments: dict[str, Any] = {
        "default_root_dir": config.run_dir,
        "max_epochs": t.max_epochs,
        "max_steps": t.max_steps,
        "max_time": t.max_time,
        "accelerator": t.accelerator,
        "devices": devices,
        "num_nodes": nodes,
        "strategy": strategy,
        "precision": native_precision(t.accelerator) if t.precision == "auto" else t.precision,
        "accumulate_grad_batches": t.accumulate_grad_batches,
        "gradient_clip_val": t.gradient_clip_val,
        "check_val_every_n_epoch": t.check_val_every_n_epoch,
        "log_every_n_steps": t.log_every_n_steps,
        "enable_progress_bar": t.progress_bar and in_terminal(),
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "sync_batchnorm": t.sync_batchnorm and t.accelerator != "cpu" and torch.cuda.is_available(),
        "callbacks": _callbacks(config, fitting),
        "plugins": plugins,
        "logger": loggers(config) if fitting else False,
    }
    _check_extra(t.extra)
    _check_values({**arguments, "patience": t.patience, "save_every_n_steps": t.save_every_n_steps, **t.extra})
    try:
        trainer = pl.Trainer(**{**arguments, **t.extra})
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"Lightning refuses the trainer section: {' '.join(str(error).split())}") from error
    if fitting:
        _check_length(trainer, t)
        validate_at_the_end(trainer)
    return trainer


# Arguments of Lightning's Trainer that other settings of a run decide.
DECIDED = {
    "callbacks": "the run's checkpoints and checks are callbacks",
    "plugins": "they write the checkpoints",
    "logger": "the logging section has it",
    "default_root_dir": "run_dir is it",
    "enable_progress_bar": "set trainer.progress_bar",
    "use_distributed_sampler": "the data section shares the images among the processes",
}


def _check_extra(extra: Mapping[str, Any]) -> None:
    """Only what nothing else of the run decides: one of two values for the same thing would be dropped without a word."""
    known = inspect.signature(pl.Trainer).parameters
    own = {field.name for field in fields(TrainerConfig)} - {"extra"}
    for key in extra:
        if key in own:
            raise ConfigError(f"trainer.extra.{key}: the trainer section has this setting itself. Write trainer.{key}.")
        if key in DECIDED:
            raise ConfigError(f"trainer.extra.{key} cannot be set there: {DECIDED[key]}. Leave it out.")
        if key not in known:
            raise ConfigError(f"trainer.extra.{key} is not an argument of pytorch_lightning.Trainer. Its arguments: {', '.join(known)}.")


def _check_values(values: Mapping[str, Any]) -> None:
    """What Lightning takes, and then divides by 0 or does something else than was asked for."""
    least = dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch", "patience", "save_every_n_steps"), 1)
    for name, limit in {**least, "log_every_n_steps": 0, "gradient_clip_val": 0}.items():
        value = values[name]
        if value is not None and not (isinstance(value, int | float) and value >= limit):
            raise ConfigError(f"trainer.{name} must be at least {limit}, received {value!r}.")
    for name in ("max_epochs", "min_epochs", "max_steps", "min_steps"):
        value = values.get(name)
        if value is not None and not (isinstance(value, int) and value >= -1):
            raise ConfigError(f"trainer.{name} must be a whole number, -1 for no limit, received {value!r}.")
    if str(values["precision"]).startswith(("16-true", "bf16-true", "64", "transformer-engine")):
        raise ConfigError(
            f"trainer.precision {values['precision']} would change the images and the losses, too, which are computed in float32: use "
            "32-true, bf16-mixed, 16-mixed or auto."
        )


def _check_length(trainer: pl.Trainer, config: TrainerConfig) -> None:
    """Raise ConfigError for a training of no step, and for early stopping without the validation that decides it."""
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ConfigError(
                f"trainer.{name} is 0: nothing would be trained. Give at least 1, or measure a run that is there with validate or test."
            )
    if config.patience is not None and trainer.limit_val_batches == 0:
        raise ConfigError(
            f"trainer.patience is {config.patience} and validation is off (trainer.extra: {{limit_val_batches: 0}}), so that nothing "
            "says when to stop: set patience to null, or validate."
        )


def _devices(config: TrainerConfig) -> tuple[Any, int, str]:
    """Devices, nodes and strategy. Under torchrun they are the launcher's: Lightning's defaults would run N independent
    trainings in one folder.
    """
    launched = in_torchrun()
    if launched is not None:
        return *launched, "ddp" if config.strategy == "auto" else config.strategy
    on_cpu = config.accelerator == "cpu" or (config.accelerator == "auto" and not torch.cuda.is_available())
    return 1 if config.devices == "auto" and on_cpu else config.devices, config.num_nodes, config.strategy


def _callbacks(config: RunConfig, fitting: bool) -> list[pl.Callback]:
    """In the order in which Lightning asks them; it puts checkpoints last by itself."""
    t, folder = config.trainer, Path(config.run_dir)
    callbacks: list[pl.Callback] = [StepSeed(config.seed), KeepEarlierRows()]
    if t.progress_bar and not in_terminal():
        callbacks.append(ProgressLines())
    if not fitting:
        return callbacks
    monitor, mode, where = "val/loss", "min", folder / "checkpoints"
    # Two checkpoint callbacks: with one, Lightning 2.6 writes last.ckpt only when the monitored value improved.
    callbacks += [
        FiniteGradients(),
        GracefulStop(),
        *([] if t.extra.get("limit_val_batches") == 0 else [SafeCheckpoint(where, filename="best", monitor=monitor, mode=mode)]),
        # After every epoch, validated or not: the end of a night without validation would be lost with it.
        SafeCheckpoint(where, filename="last", save_on_exception=True, every_steps=t.save_every_n_steps, save_on_train_epoch_end=True),
    ]
    if t.patience is not None:
        callbacks.append(EarlyStopping(monitor, min_delta=t.min_delta, patience=t.patience, mode=mode))
    if config.optimizer.schedule != "constant":
        callbacks.append(LearningRateMonitor("step"))
    if config.task == "explain":
        callbacks.append(HealthAlarm(remedies(config)))
        callbacks.append(MaskPictures(folder / "images", config.logging.images, config.logging.images_every_n_epochs))
    return callbacks


def native_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the hardware computes in bfloat16 (elsewhere it is emulated, and slower than float32), else ``32-true``."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return "bf16-mixed" if native else "32-true"


def to_memory_format(task: ClassifyTask | ExplainTask, config: TrainerConfig) -> None:
    """Lay the networks out in memory as ``channels_last`` says, in place."""
    if config.channels_last is not False:
        task.to(memory_format=torch.channels_last)


def compile_networks(task: ClassifyTask | ExplainTask, config: TrainerConfig) -> None:
    """Compile what the configuration says, in place."""
    network, classifier = (config.compile if own is None else own for own in (config.compile_explainer, config.compile_classifier))
    if isinstance(task, ClassifyTask):
        if classifier:
            task.classifier.compile()
        return
    if network:
        task.explainer.network.compile()
    if classifier and task.explanandum.differentiable:
        task.explanandum.classifier.compile()


def processes() -> int:
    """Number of processes of this job, as torchrun, Lightning or srun announce it."""
    return max(int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("SLURM_NTASKS") or 1) if in_slurm() else 1)


def unequal_message(config: RunConfig, task: ClassifyTask | ExplainTask, trainer: pl.Trainer) -> str | None:
    """What makes a training on several processes with ``data.global_batch`` another one than that of one process; None if
    nothing does.
    """
    if trainer.world_size == 1 or not config.data.global_batch:
        return None
    trained = task.explainer if isinstance(task, ExplainTask) else task.classifier
    norms = sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in trained.modules())
    fill = config.masking.fill if config.task == "explain" else config.classifier.occlusion.fill
    reasons = []
    if norms and not (config.trainer.sync_batchnorm and trainer.strategy.root_device.type == "cuda"):
        reasons.append(
            f"{norms} BatchNorm layers take their statistics from each process's own images (--trainer.sync_batchnorm true "
            "shares them on GPUs; on the CPU torch cannot)"
        )
    if fill in ("shuffle", "random"):
        reasons.append(f"fill {fill} takes another image from each process's own images")
    return f"data.global_batch is on, and yet this is not the training of one process: {'; '.join(reasons)}." if reasons else None


def one_device(config: TrainerConfig) -> bool:
    """Whether this is a training in one process on one device."""
    gpus = torch.cuda.device_count() if config.accelerator != "cpu" else 0
    devices = len(config.devices) if isinstance(config.devices, list) else config.devices
    return processes() == 1 and config.num_nodes == 1 and (devices in (1, "1") or (devices == "auto" and gpus <= 1))


def larger_batch_message(config: RunConfig, world: int) -> str | None:
    """What several processes make of ``data.batch_size`` where it is each one's own; None if it is what one process would train with."""
    if world == 1 or config.data.global_batch:
        return None
    each = config.data.batch_size
    return (
        f"{world} processes with data.batch_size {each} each train with {world * each} images per step, not the {each} of one process. "
        f"To train as one does: --data.global_batch true ({each} in all), or --trainer.devices 1."
    )
