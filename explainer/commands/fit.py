"""From a :class:`~explainer.config.RunConfig` to a finished run folder."""

from __future__ import annotations

import functools
import json
import logging
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl  # noqa: TID251 - one of the three places that may
import torch
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor  # noqa: TID251
from pytorch_lightning.plugins.environments import SLURMEnvironment  # noqa: TID251
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # noqa: TID251

import explainer
from explainer.config import DataConfig, RunConfig, TeacherConfig, TrainerConfig
from explainer.data.datamodule import DataModule
from explainer.errors import CheckpointError, ConfigError
from explainer.models.checkpoints import hyper_parameters, load_explanandum, read_weights, sub_state
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.models.networks import init_encoder

# What decides numbers is the same list for a training and an evaluation.
from explainer.provenance import hardware, versions
from explainer.tasks.callbacks import FiniteGradients, HealthAlarm, MaskPictures, StepSeed, in_torchrun
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.csv_log import AppendingCSVLogger, KeepEarlierRows
from explainer.tasks.explain import ExplainTask
from explainer.tasks.predicting import PredictionWriter, file_names
from explainer.tasks.saving import (
    AtomicCheckpointIO,
    EarlierRun,
    GracefulStop,
    SafeCheckpoint,
    bytes_of_checkpoints,
    check_optimizer,
    check_run_dir,
    check_space,
    check_unused,
    in_slurm,
    resolve_checkpoint,
)

log = logging.getLogger(__name__)


def quiet_lightning() -> None:
    """Drop Lightning's advertisements and the notes on choices that this project makes on purpose."""
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero", "pytorch_lightning.trainer.connectors"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        r".*does not have many workers.*", r".*Checkpoint directory .* exists.*", r".*number of training batches.*", r".*LeafSpec.*",
        r".*isinstance\(treespec.*", r".*Detected call of `lr_scheduler.step\(\)`.*", r".*litlogger.*", r".*Starting from v1.9.0.*",
        r".*tensorboard.*", r".*Experiment logs directory.*", r".*in eval mode at the start of training.*",
        r".*ended before the epoch ended and your dataloader is not resumable.*", r".*callbacks used to create the checkpoint need to be.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=text)


def data_module(config: RunConfig) -> DataModule:
    """The run's images."""
    d = config.data
    return DataModule(
        d.name, d.batch_size, d.eval_batch_size, d.num_workers, config.seed, d.options, d.train_options, d.eval_options, d.on_error,
        global_batch=d.global_batch, pin_memory=d.pin_memory, prefetch_factor=d.prefetch_factor,
    )  # fmt: skip


def explanandum_of(config: RunConfig, data: DataModule) -> Explanandum:
    """The frozen classifier of a run; trains it first if ``train_with`` says how and its checkpoint does not exist."""
    c = config.classifier
    if c.checkpoint is not None and c.train_with is not None and not Path(c.checkpoint).is_file():
        from explainer.cli import parse_run

        if processes() > 1:
            raise ConfigError(
                f"classifier {c.checkpoint} does not exist. Train it before a distributed run: python train.py fit --config {c.train_with}"
            )
        log.warning("classifier %s does not exist yet: training it with %s", c.checkpoint, c.train_with)
        arguments = ["fit", "--config", c.train_with]
        _, other, _ = parse_run(arguments)
        _, other, rest = parse_run([*arguments, *_same_place(config, other.data)])
        # One process: others that Lightning started would run this whole command again.
        other.trainer.devices, other.trainer.num_nodes, other.trainer.strategy = 1, 1, "auto"
        code = run("fit", other, "auto", rest.resolved)  # auto: a training that was interrupted goes on
        if code:
            raise SystemExit(code)
    return load_explanandum(
        c.checkpoint, c.arch, c.options, data.num_classes, data.task, data.class_names, c.mean, c.std, c.input_size,
    )  # fmt: skip


def _same_place(config: RunConfig, data: DataConfig) -> list[str]:
    """Arguments by which another configuration of the same data finds them where this run does."""
    same = data.name == config.data.name and "root" in config.data.options
    return ["--data.options.root", str(config.data.options["root"])] if same else []


def evaluation_arguments(config: RunConfig) -> list[str]:
    """Arguments of the evaluation after a fit: ``evaluate_with``, with this run's data folder, classifier and checkpoint instead of the
    ones named there.
    """
    from explainer.cli import parse_evaluate

    assert config.evaluate_with is not None
    arguments = ["--config", config.evaluate_with]
    other, _ = parse_evaluate(arguments)
    arguments += _same_place(config, other.data)
    best = str(Path(config.run_dir) / "checkpoints" / "best.ckpt")
    classifier = best if config.task == "classify" else config.classifier.checkpoint
    if classifier is not None:
        arguments += ["--classifier.checkpoint", classifier]
    if config.task == "explain" and "explainer" in other.methods:
        arguments += ["--methods.explainer.checkpoint", best]
    return arguments


def build_task(config: RunConfig, data: DataModule, fitting: bool = True) -> ClassifyTask | ExplainTask:
    """The LightningModule of a run; for a fit, with the maps that its teachers' caches lack."""
    if config.task == "classify":
        path = config.classifier.mask_augmentation.checkpoint
        masks = None if path is None else explainer.load(path)
        return ClassifyTask(config.classifier, data.num_classes, data.task, data.class_names, config.optimizer, config.seed, masks)
    explanandum = explanandum_of(config, data)
    e = config.explainer
    net = Explainer(
        e.network, data.num_classes, e.options, data.class_names, config.classifier.mean, config.classifier.std,
        data.size, e.downscale, e.stride,
    )  # fmt: skip
    if e.init_encoder:
        if not explanandum.differentiable:
            raise ConfigError("explainer.init_encoder copies the classifier's weights, which cannot be seen here: set it to false.")
        init_encoder(net.network, explanandum.classifier)
    provenance = {"classifier": asdict(config.classifier), "data": asdict(config.data), "versions": _versions()}
    # The task first: what it refuses must be refused before maps are computed.
    task = ExplainTask(
        net, explanandum, config.losses, config.masking, config.optimizer, config.seed, provenance, _untaught if config.teachers else None
    )
    if config.teachers:
        task.teachers = teachers = _teachers(config, explanandum, data, fitting)
        known = teachers.images("train") if fitting else None
        if known is not None and len(known) < len(data.dataset("train")):
            data.among = functools.partial(_among, task, known)
    return task


def _untaught(*_: Any) -> Any:
    raise AssertionError("the teachers are set before training")


def _among(task: ExplainTask, known: list[int], progress: float) -> list[int] | None:
    """The training images to draw from at this share of the training: those with maps while maps alone are copied."""
    return known if task.copies_only(progress) else None


def _teachers(config: RunConfig, explanandum: Explanandum, data: DataModule, fitting: bool) -> Any:
    """The run's teachers; the best checkpoint is chosen on the val split, so there must be something to choose it by."""
    from explainer.losses.base import build_terms
    from explainer.tasks.teachers import build_teachers, check_teachers, open_cache

    terms = build_terms(config.losses).values()
    if not any(t.needs_teacher for t in terms):
        raise ConfigError("teachers are given and no loss asks them: add losses.distillation, or leave teachers out.")
    check_teachers(config.teachers, explanandum, data)
    for_val = any(t.cache is None or len(open_cache(t, explanandum, data, "val")) for t in config.teachers)
    if fitting and not for_val and all(t.needs_teacher or t.weight_at(1.0) == 0 for t in terms):
        raise ConfigError(
            "the val split has no target maps, and no other loss has weight at the end of training, so val/loss would say nothing: "
            "fill the cache with explainer maps --split val, or give another loss some weight."
        )
    if fitting and processes() == 1:  # before Lightning starts others; where a launcher started several, the cache must have been filled
        for teacher in config.teachers:
            if teacher.images:
                fill_cache(teacher, config)
    return build_teachers(config.teachers, explanandum, data, ("train", "val") if fitting else ("val",))


def fill_cache(teacher: TeacherConfig, config: RunConfig) -> None:
    """Compute the maps of the ``teacher.images`` training images that its cache lacks."""
    from explainer.commands import maps as make_maps
    from explainer.commands.maps_config import MapsConfig
    from explainer.evaluation.config import CacheConfig, MethodConfig

    t = config.trainer
    device = f"cuda:{t.devices[0]}" if isinstance(t.devices, list) and torch.cuda.is_available() else "auto"
    wanted = MapsConfig(
        MethodConfig(teacher.name, teacher.options), config.data, "train", teacher.images, True, config.classifier,
        cache=CacheConfig(teacher.cache, teacher.dtype), seed=teacher.seed, device="cpu" if t.accelerator == "cpu" else device,
        batch_size=config.data.eval_batch_size or config.data.batch_size,
    )  # fmt: skip
    make_maps.run(wanted)


def processes() -> int:
    """Number of processes of this job, as torchrun, Lightning or srun announce it."""
    return max(int(os.environ.get("WORLD_SIZE") or 1), int(os.environ.get("SLURM_NTASKS") or 1) if in_slurm() else 1)


def larger_batch_message(config: RunConfig, world: int) -> str | None:
    """What several processes make of ``data.batch_size`` where it is each one's own; None if it is what one process would train with."""
    if world == 1 or config.data.global_batch:
        return None
    each = config.data.batch_size
    return (
        f"{world} processes with data.batch_size {each} each train with {world * each} images per step, not the {each} of one process. "
        f"To train as one does: --data.global_batch true ({each} in all), or --trainer.devices 1."
    )


def build_trainer(config: RunConfig, fitting: bool = True) -> pl.Trainer:
    """Lightning's Trainer with this project's loggers, callbacks and settings."""
    t, folder = config.trainer, Path(config.run_dir)
    devices, nodes, strategy = t.devices, t.num_nodes, t.strategy
    launched = in_torchrun()
    if launched is not None:
        # Lightning's defaults would run N independent trainings in one folder.
        devices, nodes = launched
        strategy = "ddp" if strategy == "auto" else strategy
    elif devices == "auto" and (t.accelerator == "cpu" or (t.accelerator == "auto" and not torch.cuda.is_available())):
        devices = 1
    plugins: list[Any] = [AtomicCheckpointIO()]
    if launched is None and in_slurm() and SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # GracefulStop does it, between two steps
    callbacks: list[pl.Callback] = [StepSeed(config.seed), KeepEarlierRows()]
    if fitting:
        monitor, mode = ("val/loss", "min")
        where = folder / "checkpoints"
        # Two callbacks: with one, Lightning 2.6 writes last.ckpt only when the monitored value improved.
        callbacks += [
            FiniteGradients(),
            GracefulStop(),
            SafeCheckpoint(where, filename="best", monitor=monitor, mode=mode),
            SafeCheckpoint(where, filename="last", save_on_exception=True, every_steps=t.save_every_n_steps),
        ]
        if t.patience is not None:
            callbacks.append(EarlyStopping(monitor, min_delta=t.min_delta, patience=t.patience, mode=mode))
        if config.optimizer.schedule != "constant":
            callbacks.append(LearningRateMonitor("step"))
        if config.task == "explain":
            callbacks += [HealthAlarm(), MaskPictures(folder / "images", config.logging.images, config.logging.images_every_n_epochs)]
    arguments: dict[str, Any] = {
        "default_root_dir": str(folder), "max_epochs": t.max_epochs, "max_steps": t.max_steps, "max_time": t.max_time,
        "accelerator": t.accelerator, "devices": devices, "num_nodes": nodes, "strategy": strategy,
        "precision": native_precision(t.accelerator) if t.precision == "auto" else t.precision,
        "accumulate_grad_batches": t.accumulate_grad_batches, "gradient_clip_val": t.gradient_clip_val,
        "check_val_every_n_epoch": t.check_val_every_n_epoch, "log_every_n_steps": t.log_every_n_steps,
        "enable_progress_bar": t.progress_bar, "enable_model_summary": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0,
        "sync_batchnorm": t.sync_batchnorm and t.accelerator != "cpu" and torch.cuda.is_available(), "callbacks": callbacks,
        "plugins": plugins,
        "logger": loggers(config) if fitting else False,
    }  # fmt: skip
    import inspect

    known = inspect.signature(pl.Trainer).parameters
    for key in t.extra:
        if key not in known:
            raise ConfigError(f"trainer.extra.{key} is not an argument of pytorch_lightning.Trainer. Its arguments: {', '.join(known)}.")
    try:
        return pl.Trainer(**{**arguments, **t.extra})
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"Lightning refuses the trainer section: {' '.join(str(error).split())}") from error


def loggers(config: RunConfig) -> list[Any]:
    """CSV always; wandb online only for a user who is logged in, else offline, never in the way of training."""
    folder = Path(config.run_dir)
    found: list[Any] = [AppendingCSVLogger(folder)]
    mode = config.logging.wandb
    if mode != "off" and os.environ.get("WANDB_MODE") != "disabled":
        online = mode == "online" or (mode == "auto" and _wandb_key())
        logger = _wandb(config, folder, offline=not online)
        if logger is not None:
            found.append(logger)
    return found


def _wandb_key() -> bool:
    """Whether the user is logged in. Asking wandb itself would fix its mode for the process."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _wandb(config: RunConfig, folder: Path, offline: bool) -> Any:
    from pytorch_lightning.loggers import WandbLogger  # noqa: TID251

    try:
        import wandb

        logger = WandbLogger(
            name=folder.name, project=config.logging.project, save_dir=str(folder), offline=offline,
            settings=wandb.Settings(init_timeout=15, silent=True),
        )  # fmt: skip
        _ = logger.experiment
        return logger
    except Exception as error:
        if offline:
            log.warning("wandb could not be started (%s): curves are in metrics.csv only.", error)
            return None
        log.warning("wandb is not reachable (%s): logging offline; upload later with `wandb sync`.", type(error).__name__)
        return _wandb(config, folder, offline=True)


def run(command: str, config: RunConfig, ckpt_path: str | None = None, resolved: str | None = None, overwrite: bool = False) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``; returns the process's exit code.

    Args:
        command: what to do.
        config: the run.
        ckpt_path: a checkpoint to resume (fit) or to use (others): ``last``, ``best``, ``auto`` or a path.
        resolved: the resolved configuration as YAML, saved beside the results.
        overwrite: fit replaces the run that the folder holds.
    """
    quiet_lightning()
    folder = Path(config.run_dir)
    if command == "fit" and ckpt_path is None and not overwrite:
        check_unused(folder)
    check_run_dir(folder)
    if command != "fit" and ckpt_path is None:
        ckpt_path = "best"
    checkpoint = resolve_checkpoint(ckpt_path, folder, command == "fit")
    if command == "fit" and checkpoint is not None:
        check_optimizer(checkpoint, asdict(config.optimizer))
    pl.seed_everything(config.seed, workers=True, verbose=False)
    data = data_module(config)
    data.setup("fit" if command == "fit" else {"validate": "validate", "test": "test", "predict": "predict"}[command])
    task = build_task(config, data, fitting=command == "fit")
    if config.init_from is not None:
        _init_from(task, config.init_from)
    if command == "fit":
        check_space(folder, bytes_of_checkpoints(task.explainer if isinstance(task, ExplainTask) else task.classifier))
    trainer = build_trainer(config, fitting=command == "fit")
    message = larger_batch_message(config, trainer.world_size) if command == "fit" else None
    if message is not None and trainer.is_global_zero:
        log.warning(message)
    if command == "fit" and (overwrite or checkpoint is not None):
        trainer.callbacks.append(EarlierRun(folder / "checkpoints", checkpoint))  # type: ignore[attr-defined]
    if trainer.is_global_zero and command == "fit":
        if resolved is not None:
            (folder / "config.yaml").write_text(resolved)
        _write_provenance(folder, task, data, trainer)
    if config.trainer.channels_last:
        task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _compile(task, config.trainer)
    if command == "fit":
        code = _fit(trainer, task, data, checkpoint)
        if code == 0 and not trainer.interrupted:
            # A run that was finished before has measured nothing now: its summary stays.
            if trainer.is_global_zero and trainer.callback_metrics:
                _summary(task, trainer, folder)
            if config.evaluate_with is not None:
                from explainer.cli import evaluate

                code = evaluate(evaluation_arguments(config))  # on every process: they share the images
            if trainer.is_global_zero:
                pictures = sorted((folder / "images").glob("*.png"))
                shown = f", contact sheet {pictures[-1]}" if pictures else ""
                print(f"checkpoint {folder / 'checkpoints' / 'best.ckpt'}{shown}")
        return code
    if command == "predict":
        return _predict(trainer, task, data, checkpoint, folder)
    results = {"validate": trainer.validate, "test": trainer.test}[command](
        task, data, ckpt_path=checkpoint, weights_only=True, verbose=False
    )
    if trainer.is_global_zero:
        row = {k: float(v) for k, v in results[0].items()}
        if isinstance(task, ClassifyTask) and task.per_class:
            row["ap_per_class"] = dict(zip(task.hparams["class_names"], task.per_class, strict=True))  # type: ignore[assignment]
        (folder / f"{command}.json").write_text(json.dumps(row, indent=1))
        _table(f"{command}: {checkpoint}", row)
    return 0


def _fit(trainer: pl.Trainer, task: ClassifyTask | ExplainTask, data: DataModule, checkpoint: str | None) -> int:
    """Train; the exit code is 0, 128 + signal after one that stopped the run, or 130 after a second Ctrl-C."""
    stop = next(c for c in trainer.callbacks if isinstance(c, GracefulStop))  # type: ignore[attr-defined]
    try:
        with stop.listening(trainer):
            trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        # Lightning ends a stopped run with SystemExit(0), which schedulers would take for a finished one.
        return stop.exit_code(trainer.is_global_zero) if stop.agreed else 130
    return stop.exit_code(trainer.is_global_zero)


def _init_from(task: ClassifyTask | ExplainTask, path: str) -> None:
    kind, module = ("explainer", task.explainer) if isinstance(task, ExplainTask) else ("classifier", task.classifier)
    content = read_weights(path)
    hyper_parameters(content, kind, path)  # type: ignore[arg-type]
    try:
        module.load_state_dict(sub_state(content.get("state_dict", {}), f"{kind}."))
    except RuntimeError as error:
        raise CheckpointError(
            f"init_from {path} does not fit the configured {kind}: {str(error).splitlines()[-1].strip()[:200]}"
        ) from error


def native_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the hardware computes in bfloat16 (elsewhere it is emulated, and slower than float32), else ``32-true``."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
    return "bf16-mixed" if native else "32-true"


def _compile(task: ClassifyTask | ExplainTask, config: TrainerConfig) -> None:
    network, classifier = (config.compile if own is None else own for own in (config.compile_explainer, config.compile_classifier))
    if isinstance(task, ClassifyTask):
        if classifier:
            task.classifier.compile()
        return
    if network:
        task.explainer.network.compile()
    if classifier and task.explanandum.differentiable:
        task.explanandum.classifier.compile()


def _versions() -> dict[str, str]:
    return {**versions(), "lightning": pl.__version__}


def _write_provenance(folder: Path, task: ClassifyTask | ExplainTask, data: DataModule, trainer: pl.Trainer) -> None:
    record: dict[str, Any] = {
        "versions": _versions(),
        "data": {split: d.fingerprint() for split, d in data._datasets.items()},
        "hardware": {**hardware(str(trainer.strategy.root_device)), "processes": trainer.world_size},
        "precision": trainer.precision,
    }
    if isinstance(task, ExplainTask):
        record["explanandum"] = task.fingerprint
        record["parameters"] = sum(p.numel() for p in task.explainer.parameters())
    (folder / "provenance.json").write_text(json.dumps(record, indent=1))


def _summary(task: ClassifyTask | ExplainTask, trainer: pl.Trainer, folder: Path) -> None:
    row = {k: float(v) for k, v in trainer.callback_metrics.items()}
    if isinstance(task, ClassifyTask) and task.per_class:
        for name, value in zip(task.hparams["class_names"], task.per_class, strict=True):
            row[f"val/ap/{name}"] = value
    _table(f"{folder}: {trainer.global_step} steps, {trainer.current_epoch} epochs", row)
    (folder / "summary.json").write_text(json.dumps(row, indent=1))


def _table(title: str, row: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for key, value in sorted(row.items()):
        if isinstance(value, dict):
            for name, part in value.items():
                table.add_row(f"{key}/{name}", f"{part:.4f}")
        else:
            table.add_row(key, f"{value:.4f}")
    Console().print(table)


def _predict(trainer: pl.Trainer, task: ClassifyTask | ExplainTask, data: DataModule, checkpoint: str | None, folder: Path) -> int:
    dataset = data.dataset(data.predict_split)
    names = file_names([dataset.sample_id(i) for i in range(len(dataset))])
    writer = PredictionWriter(folder / "predictions", names)
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    trainer.predict(task, data, ckpt_path=checkpoint, weights_only=True, return_predictions=False)
    log.warning("wrote %d files into %s", writer.written, writer.folder)
    return 0
