"""The parts of a run, each made from its configuration: images, classifier, networks, teachers, task."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

import explainer
from explainer import plugins
from explainer.config import ClassifierConfig, ClassifierLossConfig, DataConfig, ExplainerConfig, RunConfig, without_paths
from explainer.data.datamodule import DataModule
from explainer.data.files import ImageFileDataset
from explainer.errors import CheckpointError, ConfigError
from explainer.geometry import as_size, height_width, size_text
from explainer.losses.base import build_terms
from explainer.models.checkpoints import (
    configured_explanandum,
    hyper_parameters,
    read_weights,
    require_same_order,
    sub_state,
    trained_size,
)
from explainer.models.encoders import AUTO, encoder_for, init_encoder
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.models.preprocessing import differ
from explainer.models.untrusted import without_files

# What decides numbers is the same list for a training and an evaluation.
from explainer.provenance import versions as general_versions
from explainer.tasks.area_bounds import settle
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.explain import ExplainTask, check_options
from explainer.tasks.predicted import use_predicted_targets
from explainer.tasks.teachers import build_teachers, check_teachers, open_cache

log = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """Versions of everything that decides a training's numbers."""
    return {**general_versions(), "lightning": pl.__version__}


def data_module(config: RunConfig) -> DataModule:
    """The run's images."""
    d = config.data
    return DataModule(
        name=d.name,
        batch_size=d.batch_size,
        eval_batch_size=d.eval_batch_size,
        num_workers=d.num_workers,
        seed=config.seed,
        options=sized_options(d, config.classifier),
        train_options=d.train_options,
        eval_options=d.eval_options,
        on_error=d.on_error,
        global_batch=d.global_batch,
        pin_memory=d.pin_memory,
        prefetch_factor=d.prefetch_factor,
        balance=d.balance,
        copies=d.copies,
        permute_labels=d.permute_labels,
    )


def sized_options(data: DataConfig, classifier: ClassifierConfig) -> dict[str, Any]:
    """``data.options``; where images come from files and no ``size`` is given, with the size that the classifier was trained with.
    Another size than the classifier's own is warned of.
    """
    trained_at, source = trained_size(classifier.checkpoint, classifier.arch, classifier.options)
    given = next((o["size"] for o in (data.options, data.train_options, data.eval_options) if "size" in o), None)
    of_files = issubclass(plugins.find("explainer.data", data.name), ImageFileDataset)
    if trained_at is None or not of_files:
        return data.options
    if given is None:
        return {**data.options, "size": trained_at}
    size = as_size(given)
    if size is not None and not all(2 / 3 <= a / b <= 3 / 2 for a, b in zip(height_width(size), height_width(trained_at), strict=True)):
        log.warning(
            "data.options.size is %s, but %s was trained with images of %s: it sees objects at another scale or in another form. "
            "Leave data.options.size out to use its own.",
            size_text(size),
            source,
            size_text(trained_at),
        )
    return data.options


@dataclass
class Networks:
    """What is known before any map is computed: the classifier and the network that will explain it."""

    explanandum: Explanandum
    explainer: Explainer


def build_networks(config: RunConfig, data: DataModule, fitting: bool = True) -> Networks:
    """The Explanandum and the Explainer of a run with task explain, checked against everything that will be asked of them.

    Args:
        config: the run.
        data: its images.
        fitting: whether it will train.

    Raises:
        ConfigError: an option does not fit, see :func:`~explainer.tasks.explain.check_options`, or a teacher does not.
        CheckpointError: the classifier's file is missing or unusable.
    """
    c, e = config.classifier, config.explainer
    explanandum = configured_explanandum(c, data.num_classes, data.task, data.class_names)
    if config.data.targets == "predicted":
        d = config.data
        use_predicted_targets(
            explanandum, data, ("train", "val") if fitting else ("val",), top=d.top, threshold=d.threshold, folder=config.run_dir
        )
    elif config.data.name == "images":
        raise ConfigError("the data set images has no labels: set data.targets: predicted.")
    net = Explainer(
        network=e.network,
        num_classes=data.num_classes,
        options=_network_options(config, explanandum),
        class_names=data.class_names,
        mean=explanandum.normalization[0],
        std=explanandum.normalization[1],
        image_size=data.size,
        downscale=e.downscale,
        stride=e.stride,
        encoder=e.encoder,
        explanandum=explanandum,
    )
    if e.init_encoder:
        if not explanandum.differentiable:
            raise ConfigError("explainer.init_encoder copies the classifier's weights, which cannot be seen here: set it to false.")
        init_encoder(net.network, explanandum.classifier)
    check_options(net, explanandum, config.losses, config.masking, optimizer=config.optimizer, taught=bool(config.teachers))
    if config.teachers:
        _check_teaching(config, explanandum, data, fitting)
    return Networks(explanandum, net)


def _network_options(config: RunConfig, explanandum: Explanandum) -> dict[str, Any]:
    """Options of the Explainer's network. The default ones name an encoder, which a shared one has none of; ``auto`` is replaced by the
    name of the classifier's own.
    """
    e = config.explainer
    if e.encoder == "shared":
        return {} if e.options == ExplainerConfig().options else e.options
    auto = e.options.get("encoder_name") == AUTO
    return {**e.options, "encoder_name": encoder_for(explanandum.arch)} if auto else e.options


def _check_teaching(config: RunConfig, explanandum: Explanandum, data: DataModule, fitting: bool) -> None:
    """The best checkpoint is chosen on the val split, so there must be something to choose it by."""
    terms = build_terms(config.losses).values()
    subjects = {t.teaches for t in config.teachers}
    for subject, loss, asked in (
        ("masks", "distillation", any(t.needs_teacher for t in terms)),
        ("order", "order", any(t.needs_order for t in terms)),
    ):
        if subject in subjects and not asked:
            raise ConfigError(f"teachers of {subject} are given and no loss asks them: add losses.{loss}, or leave those teachers out.")
        if asked and subject not in subjects:
            raise ConfigError(f"losses.{loss} learns from teachers of {subject}, and there are none: add one with teaches: {subject}.")
    check_teachers(config.teachers, explanandum, data)
    for_val = any(t.cache is None or len(open_cache(t, explanandum, data, "val")) for t in config.teachers)
    if fitting and not for_val and all(t.needs_teacher or t.needs_order or t.weight_at(1.0) == 0 for t in terms):
        raise ConfigError(
            "the val split has no target maps, and no other loss has weight at the end of training, so val/loss would "
            "say nothing: fill the cache with explainer maps --split val, or give another loss some weight."
        )


def build_task(config: RunConfig, data: DataModule, fitting: bool = True, networks: Networks | None = None) -> ClassifyTask | ExplainTask:
    """The LightningModule of a run, complete.

    Args:
        config: the run.
        data: its images.
        fitting: whether it will train; else the teachers' caches of the training split are left alone.
        networks: the run's networks (:func:`build_networks`); built here by default. The teachers' caches must be filled by now.
    """
    if config.task == "classify":
        return _classify_task(config, data, fitting)
    parts = networks or build_networks(config, data, fitting)
    teachers = build_teachers(config.teachers, parts.explanandum, data, ("train", "val") if fitting else ("val",))
    taught = None if teachers is None or not fitting else teachers.images("train")
    if taught is not None and len(taught) == len(data.dataset("train")):
        taught = None  # all of them: the epoch's own order, as without teachers
    mean, std = parts.explanandum.normalization
    provenance = {
        "classifier": without_files(replace(config.classifier, mean=mean, std=std), shared=config.explainer.encoder == "shared"),
        "data": {key: without_paths(value) if isinstance(value, dict) else value for key, value in asdict(config.data).items()},
        "versions": versions(),
    }
    task = ExplainTask(
        parts.explainer,
        parts.explanandum,
        config.losses,
        config.masking,
        optimizer=config.optimizer,
        seed=config.seed,
        provenance=provenance,
        teachers=teachers,
        taught=taught,
        no_region=data.no_region,
    )
    settle(task.terms.values(), parts.explanandum, data, config.run_dir, seed=config.seed, fill=config.masking.fill)
    _start_weights(task, config.init_from)
    return task


def _classify_task(config: RunConfig, data: DataModule, fitting: bool) -> ClassifyTask:
    c = config.classifier
    path = c.mask_augmentation.checkpoint
    masks = None if path is None else explainer.load(path)
    if config.init_from is not None and (c.checkpoint or c.init_from):
        raise ConfigError(
            f"init_from ({config.init_from}) and classifier.{'checkpoint' if c.checkpoint else 'init_from'} "
            f"({c.checkpoint or c.init_from}) both say what training starts from: give one."
        )
    counts = data.dataset("train").class_counts() if fitting and c.loss.class_weights == "balanced" else None
    if not fitting:  # the weights of the loss belong to the training images
        c = replace(c, loss=ClassifierLossConfig())
    task = ClassifyTask(
        c,
        data.num_classes,
        data.task,
        data.class_names,
        optimizer=config.optimizer,
        seed=config.seed,
        mask_explainer=masks,
        class_counts=counts,
        image_size=data.size,
    )
    _start_weights(task, config.init_from)
    return task


def _check_start(task: ClassifyTask | ExplainTask, saved: dict[str, Any], path: str) -> None:
    """What the weights meant in the run that they come from, against this one; the classifier's normalisation is taken over."""
    if isinstance(task, ClassifyTask):
        require_same_order(saved.get("class_names", ()), task.hparams["class_names"], f"init_from {path}")
        task.adopt_normalization(saved.get("classifier"), path)
        return
    network = saved.get("explainer")
    if not isinstance(network, dict):
        return
    require_same_order(network.get("class_names", ()), task.explainer.class_names, f"init_from {path}")
    for name in ("mean", "std"):
        now, before = task.explainer.config[name], network.get(name)
        if isinstance(before, list) and differ(now, before):
            log.warning("init_from %s was trained with the normalisation %s %s; this run's is %s.", path, name, before, now)


def _start_weights(task: ClassifyTask | ExplainTask, path: str | Path | None) -> None:
    """Load the network that is trained from another run's checkpoint (``init_from``); nothing else of it is used."""
    if path is None:
        return
    explains = isinstance(task, ExplainTask)
    module = task.explainer if isinstance(task, ExplainTask) else task.classifier
    kind = "explainer" if explains else "classifier"
    content = read_weights(path)
    saved = hyper_parameters(content, kind, path)  # type: ignore[arg-type]
    if saved is not None:
        _check_start(task, saved, str(path))
    try:
        module.load_state_dict(sub_state(content.get("state_dict", {}), f"{kind}."))
    except RuntimeError as error:
        raise CheckpointError(
            f"init_from {path} does not fit the configured {kind}: {str(error).splitlines()[-1].strip()[:200]}"
        ) from error
