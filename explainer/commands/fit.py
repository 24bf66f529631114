"""``fit``: from a :class:`~explainer.config.RunConfig` to a finished run folder, in one order of named steps."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from explainer.commands import evaluation, verdict
from explainer.commands.building import build_networks, build_task, data_module, versions
from explainer.commands.numbers import check_seed
from explainer.commands.parsing import parse_evaluate, parse_run
from explainer.commands.terminal import show_classes, show_row
from explainer.config import DataConfig, RunConfig, TeacherConfig
from explainer.data.datamodule import DataModule
from explainer.errors import ConfigError, ExplainerError
from explainer.files import write_json, write_text
from explainer.lightning_internals import quiet_lightning
from explainer.locks import claimed, first_process
from explainer.provenance import hardware
from explainer.tasks.callbacks import MaskPictures
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.explain import ExplainTask
from explainer.tasks.precision import settled
from explainer.tasks.run_folder import (
    SUMMARY,
    EarlierRun,
    bytes_of_checkpoints,
    check_run_dir,
    check_space,
    check_unused,
    chosen_checkpoint,
    finished,
    resolve_checkpoint,
)
from explainer.tasks.run_identity import Earlier, RecordRun, facts, images_per_step, settings
from explainer.tasks.saving import BEST, LAST
from explainer.tasks.stopping import GracefulStop, restarted
from explainer.tasks.trainer import (
    build_trainer,
    compile_networks,
    larger_batch_message,
    native_precision,
    one_device,
    processes,
    to_memory_format,
    unequal_message,
)

log = logging.getLogger(__name__)


@dataclass
class FitRequest:
    """What the user asked for.

    Attributes:
        config: the run.
        ckpt_path: a checkpoint to resume: ``last``, ``best``, ``auto`` (``last`` if there is one) or a path; None begins anew.
        resolved: the resolved configuration as YAML, saved in the run folder; None saves nothing.
        overwrite: replace the run that the folder holds.
    """

    config: RunConfig
    ckpt_path: str | None = None
    resolved: str | None = None
    overwrite: bool = False

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run_dir)


def fit(request: FitRequest) -> int:
    """Train; returns the exit code: 0, 128 + signal after one that stopped the run, 130 after a second Ctrl-C.

    Raises:
        ExplainerError: something in the request cannot work; nothing has been trained then.
    """
    check_run_dir(request.folder)
    # One process of a job speaks for all of them.
    claim = claimed(request.folder, "fit", restarted()) if first_process() else contextlib.nullcontext()
    with claim:
        return _fit(request)


def _fit(request: FitRequest) -> int:
    config = request.config
    check_seed(config.seed)
    if config.evaluate_with is not None:
        parse_evaluate(["--config", config.evaluate_with])  # now: the evaluation comes after hours of training
    quiet_lightning()
    earlier = _run_to_resume(request)
    checkpoint = None if earlier is None else earlier.path
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = data_module(config)
    data.setup("fit")
    _train_missing_classifier(config, data)
    networks = build_networks(config, data) if config.task == "explain" else None
    _fill_caches(config)
    task = build_task(config, data, networks=networks)
    if checkpoint is None and isinstance(task, ClassifyTask):
        task.start()
    values, given = facts(config, task, data), settings(config)
    if earlier is not None:
        earlier.require_same(values)
    rule = native_precision(config.trainer.accelerator)
    config = replace(
        config, trainer=settled(config, task, data.size, resumes=checkpoint is not None, alone=one_device(config.trainer), by_rule=rule)
    )
    request = replace(request, config=config)
    trainer = _ready_trainer(request, task, checkpoint)
    values |= images_per_step(config, trainer.world_size)
    if earlier is not None and trainer.is_global_zero:
        earlier.require_same(images_per_step(config, trainer.world_size))
    kept = {} if earlier is None else earlier.values
    trainer.callbacks.append(RecordRun({**kept, **given, **values}))  # type: ignore[attr-defined]
    if trainer.is_global_zero:
        _describe_data(data)
        _record(request, task, data, trainer)
    to_memory_format(task, config.trainer)
    compile_networks(task, config.trainer)
    code = _train(trainer, task, data, checkpoint)
    if code or trainer.interrupted:
        return code
    if not trainer.callback_metrics and not finished(request.folder) and trainer.limit_val_batches:
        # All steps were done before, and the run was cut between its last checkpoint and its summary. The curves are complete.
        trainer.loggers = []
        trainer.validate(task, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    return _finish(request, task, trainer)


def _run_to_resume(request: FitRequest) -> Earlier | None:
    """The run that training goes on with, once the folder may be used and the configuration is that run's."""
    if request.ckpt_path is None and not request.overwrite:
        check_unused(request.folder)
    checkpoint = resolve_checkpoint(request.ckpt_path, request.folder, fitting=True)
    if checkpoint is None:
        return None
    earlier, trainer = Earlier.read(checkpoint), request.config.trainer
    earlier.require_same(settings(request.config))
    earlier.require_length(trainer.max_epochs, trainer.max_steps)
    return earlier


def _train_missing_classifier(config: RunConfig, data: DataModule) -> None:
    """Train the classifier first if ``train_with`` says how and its checkpoint does not exist, or its training was cut."""
    c = config.classifier
    if config.task != "explain" or c.checkpoint is None or c.train_with is None:
        return
    arguments = ["fit", "--config", c.train_with]
    _, other, _ = parse_run(arguments)
    there = Path(c.checkpoint).is_file()
    if there and not _cut(Path(other.run_dir), Path(c.checkpoint)):
        return
    state = "is of a training that was interrupted" if there else "does not exist yet"
    if processes() > 1:
        raise ConfigError(
            f"classifier {c.checkpoint} {state}. Train it before a distributed run: "
            f"python train.py fit --config {c.train_with} --ckpt_path auto"
        )
    log.warning("classifier %s %s: training it with %s", c.checkpoint, state, c.train_with)
    _, other, rest = parse_run([*arguments, *_same_place(config, other.data)])
    # One process: others that Lightning started would run this whole command again.
    other.trainer.devices, other.trainer.num_nodes, other.trainer.strategy = 1, 1, "auto"
    code = fit(FitRequest(other, "auto", rest.resolved))  # auto: a training that was interrupted goes on
    if code:
        raise SystemExit(code)
    pl.seed_everything(config.seed, workers=True, verbose=False)


def _cut(folder: Path, checkpoint: Path) -> bool:
    """Whether the checkpoint was written in this run folder by a training that has not come to its end."""
    checkpoints = folder / "checkpoints"
    return checkpoint.absolute().parent == checkpoints.absolute() and (checkpoints / LAST).is_file() and not finished(folder)


def _same_place(config: RunConfig, data: DataConfig) -> list[str]:
    """Arguments by which another configuration of the same data finds them where this run does."""
    same = data.name == config.data.name and "root" in config.data.options
    return ["--data.options.root", str(config.data.options["root"])] if same else []


def _fill_caches(config: RunConfig) -> None:
    """Compute the maps that the teachers' caches lack. Before Lightning starts other processes; where a launcher started
    several, the caches must have been filled.
    """
    if config.task == "explain" and processes() == 1:
        for teacher in config.teachers:
            if teacher.images:
                fill_cache(teacher, config)


def fill_cache(teacher: TeacherConfig, config: RunConfig) -> None:
    """Compute the maps of the ``teacher.images`` training images that its cache lacks."""
    from explainer.commands import filling
    from explainer.commands.maps_config import MapsConfig
    from explainer.evaluation.config import CacheConfig, MethodConfig

    t = config.trainer
    device = f"cuda:{t.devices[0]}" if isinstance(t.devices, list) and torch.cuda.is_available() else "auto"
    wanted = MapsConfig(
        method=MethodConfig(teacher.name, teacher.options),
        data=config.data,
        split="train",
        limit=teacher.images,
        spread=True,
        classifier=config.classifier,
        cache=CacheConfig(teacher.cache, teacher.dtype),
        seed=teacher.seed,
        device="cpu" if t.accelerator == "cpu" else device,
        batch_size=config.data.eval_batch_size or config.data.batch_size,
    )
    filling.run(wanted)


def _ready_trainer(request: FitRequest, task: ClassifyTask | ExplainTask, checkpoint: str | None) -> pl.Trainer:
    """The Trainer, once the disk has room for the checkpoints."""
    trained = task.explainer if isinstance(task, ExplainTask) else task.classifier
    check_space(request.folder, bytes_of_checkpoints(trained))
    trainer = build_trainer(request.config)
    for message in (larger_batch_message(request.config, trainer.world_size), unequal_message(request.config, task, trainer)):
        if message is not None and trainer.is_global_zero:
            log.warning(message)
    trainer.callbacks.append(EarlierRun(request.folder, checkpoint))  # type: ignore[attr-defined]
    return trainer


def _record(request: FitRequest, task: ClassifyTask | ExplainTask, data: DataModule, trainer: pl.Trainer) -> None:
    """Write ``config.yaml`` and ``provenance.json``."""
    if request.resolved is not None:
        write_text(request.folder / "config.yaml", request.resolved)
    record: dict[str, Any] = {
        "versions": versions(),
        "data": data.fingerprints(),
        "hardware": {**hardware(str(trainer.strategy.root_device)), "processes": trainer.world_size},
        "precision": trainer.precision,
    }
    if isinstance(task, ExplainTask):
        record["explanandum"] = task.fingerprint
        record["parameters"] = sum(p.numel() for p in task.explainer.parameters())
    write_text(request.folder / "provenance.json", json.dumps(record, indent=1) + "\n")


def _describe_data(data: DataModule) -> None:
    """Say what is trained on: classes by split, imbalance, sizes and geometry, and what is worth a word about them."""
    from explainer.data.survey import advice, describe, survey

    train = data.dataset("train")
    splits = [survey(train), survey(data.dataset("val"))]
    print("\n".join([*describe(train, splits), *advice(train, splits, data.balance)]), flush=True)


def _train(trainer: pl.Trainer, task: ClassifyTask | ExplainTask, data: DataModule, checkpoint: str | None) -> int:
    """Train; returns the exit code."""
    stop = next(c for c in trainer.callbacks if isinstance(c, GracefulStop))  # type: ignore[attr-defined]
    try:
        with stop.listening(trainer):
            trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    except (MisconfigurationException, ValueError) as error:
        if isinstance(error, ExplainerError) or not (isinstance(error, MisconfigurationException) or "val_check_interval" in str(error)):
            raise
        raise ConfigError(f"Lightning refuses the trainer section: {' '.join(str(error).split())}") from error
    except SystemExit:
        # Lightning ends a stopped run with SystemExit(0), which schedulers would take for a finished one.
        return stop.exit_code(trainer.is_global_zero) if stop.agreed else 130
    return stop.exit_code(trainer.is_global_zero)


def _finish(request: FitRequest, task: ClassifyTask | ExplainTask, trainer: pl.Trainer) -> int:
    """Summary, evaluation, and what there is now; returns the exit code."""
    # A run that was finished before has measured nothing now: its summary stays.
    if trainer.is_global_zero and trainer.callback_metrics:
        _summarize(request, task, trainer)
    trainer.strategy.barrier("checkpoints")  # the first process writes them, all of them evaluate them
    code = 0
    if request.config.evaluate_with is not None:
        code = evaluation.run(*parse_evaluate(evaluation_arguments(request.config)))  # on every process: they share the images
    if trainer.is_global_zero:
        print(_announcement(request.folder, trainer))
    return code


def _announcement(folder: Path, trainer: pl.Trainer) -> str:
    """The files that this run has left, those alone that are there."""
    files = [str(path) for name in (BEST, LAST) if (path := folder / "checkpoints" / name).is_file()]
    pictures = [c.latest for c in trainer.callbacks if isinstance(c, MaskPictures) and c.latest is not None]  # type: ignore[attr-defined]
    return f"checkpoint {' and '.join(files)}" + "".join(f", contact sheet {path}" for path in pictures)


def _summarize(request: FitRequest, task: ClassifyTask | ExplainTask, trainer: pl.Trainer) -> None:
    folder = request.folder
    row: dict[str, Any] = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if isinstance(task, ClassifyTask) and task.per_class:
        for name, value in zip(task.hparams["class_names"], task.per_class, strict=True):
            row[f"val/ap/{name}"] = value
    epochs = trainer.current_epoch
    show_row(f"{folder}: {trainer.global_step} steps, {epochs} epoch{'' if epochs == 1 else 's'}", row)
    if isinstance(task, ClassifyTask) and task.report is not None:
        show_classes(task.report, "val after the last epoch")
        task.report.save(folder, "val")
    row["verdict"] = _verdict(request.config, task, trainer)
    for sentence in row["verdict"]["sentences"]:
        print(sentence)
    write_json(folder / SUMMARY, row)


def _verdict(config: RunConfig, task: ClassifyTask | ExplainTask, trainer: pl.Trainer) -> dict[str, Any]:
    """See :mod:`explainer.commands.verdict`. A training is not lost over it: what fails is said."""
    if isinstance(task, ClassifyTask):
        return {"sentences": verdict.of_classifier(task.report)}
    try:
        return verdict.of_masks(config, task, trainer.datamodule)  # type: ignore[attr-defined]
    except (ExplainerError, RuntimeError, OSError) as error:
        log.warning("no verdict on the masks: %s", error)
        return {"sentences": []}


def evaluation_arguments(config: RunConfig) -> list[str]:
    """Arguments of the evaluation after a fit: ``evaluate_with``, with this run's data folder, classifier and checkpoint
    instead of the ones named there.
    """
    assert config.evaluate_with is not None
    arguments = ["--config", config.evaluate_with]
    other, _ = parse_evaluate(arguments)
    arguments += _same_place(config, other.data)
    best = str(chosen_checkpoint(Path(config.run_dir)))
    classifier = best if config.task == "classify" else config.classifier.checkpoint
    if classifier is not None:
        arguments += ["--classifier.checkpoint", classifier]
    if config.task == "explain" and "explainer" in other.methods:
        arguments += ["--methods.explainer.checkpoint", best]
    return arguments
