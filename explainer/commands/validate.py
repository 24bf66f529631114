"""``validate``, ``test`` and ``predict``: a trained run's losses, metrics and masks on a split."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from explainer.commands.building import build_task, data_module
from explainer.commands.terminal import show_classes, show_row
from explainer.config import RunConfig
from explainer.data.datamodule import DataModule
from explainer.errors import ConfigError
from explainer.files import write_json
from explainer.lightning_internals import quiet_lightning
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.explain import ExplainTask
from explainer.tasks.precision import settled
from explainer.tasks.predicting import PredictionWriter, file_names
from explainer.tasks.run_folder import check_run_dir, chosen_checkpoint, resolve_checkpoint
from explainer.tasks.run_identity import require_own_classes
from explainer.tasks.trainer import build_trainer, compile_networks, native_precision, one_device, to_memory_format

log = logging.getLogger(__name__)


def run(command: str, config: RunConfig, ckpt_path: str | None = None) -> int:
    """Run ``validate``, ``test`` or ``predict``; returns the exit code.

    Args:
        command: the command that asks.
        config: the run.
        ckpt_path: ``last``, ``best`` or a path; default ``best`` (``last`` of a run that was not validated).
    """
    quiet_lightning()
    folder = Path(config.run_dir)
    checkpoint = resolve_checkpoint(
        ckpt_path or str(chosen_checkpoint(folder)), folder
    )  # first: a mistyped run_dir must not become a folder
    check_run_dir(folder)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = data_module(config)
    data.setup(command)
    task = build_task(config, data, fitting=False)
    if checkpoint is not None:
        require_own_classes(checkpoint, data.class_names)
    rule = native_precision(config.trainer.accelerator)
    config = replace(config, trainer=settled(config, task, data.size, resumes=True, alone=one_device(config.trainer), by_rule=rule))
    trainer = build_trainer(config, fitting=False)
    to_memory_format(task, config.trainer)
    compile_networks(task, config.trainer)
    if command == "predict":
        return _predict(trainer, task, data, checkpoint, folder)
    measure = trainer.validate if command == "validate" else trainer.test
    results = measure(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    if not results:
        limit = "limit_val_batches" if command == "validate" else "limit_test_batches"
        raise ConfigError(f"{command} had no images: trainer.extra has {limit}: 0. Give --trainer.extra '{{}}'.")
    if trainer.is_global_zero:
        row: dict[str, Any] = {k: float(v) for k, v in results[0].items()}
        if isinstance(task, ClassifyTask) and task.per_class:
            row["ap_per_class"] = dict(zip(task.hparams["class_names"], task.per_class, strict=True))
        write_json(folder / f"{command}.json", row)
        show_row(f"{command}: {checkpoint}", row)
        if isinstance(task, ClassifyTask) and task.report is not None:
            show_classes(task.report, command)
            task.report.save(folder, command)
    return 0


def _predict(trainer: pl.Trainer, task: ClassifyTask | ExplainTask, data: DataModule, checkpoint: str | None, folder: Path) -> int:
    dataset = data.dataset(data.predict_split)
    names = file_names([dataset.sample_id(i) for i in range(len(dataset))])
    writer = PredictionWriter(folder / "predictions", names)
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    trainer.predict(task, data, ckpt_path=checkpoint, weights_only=True, return_predictions=False)
    log.warning("wrote %d files into %s", writer.written, writer.folder)
    return 0
