"""What makes a resumed training the one that its checkpoint was cut from, configuration key by configuration key.

Every checkpoint of a run holds, under ``run``, the values of all keys whose rule is not ``free``. On resume they are compared with the
values that are given.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl

from explainer.config import RunConfig, without_paths
from explainer.errors import ConfigError
from explainer.models.checkpoints import read_weights, require_classes
from explainer.models.untrusted import portable, self_contained

log = logging.getLogger(__name__)

Rule = Literal["refuse", "say", "free"]
KEY = "run"  #: of a checkpoint, below which the values are
#: A difference is refused where the run would become another one in the middle (what is learned, from what, in which order), said where
#: someone may want it and the numbers before and after differ in meaning, and free where it changes how the work is done and not what.
RULES: dict[str, Rule] = {
    "task": "refuse",
    "run_dir": "free",
    "seed": "refuse",
    "data.name": "refuse",
    "data.batch_size": "refuse",
    "data.eval_batch_size": "free",
    "data.num_workers": "free",
    "data.options": "refuse",
    "data.train_options": "refuse",
    "data.eval_options": "say",
    "data.targets": "refuse",
    "data.top": "refuse",
    "data.threshold": "refuse",
    "data.on_error": "say",
    "data.global_batch": "refuse",
    "data.prefetch_factor": "free",
    "data.pin_memory": "free",
    "data.balance": "refuse",
    "data.copies": "refuse",
    "data.permute_labels": "refuse",
    "classifier.arch": "refuse",
    "classifier.options": "refuse",
    # Of the classifier to be explained the fingerprint is compared, whatever file it is read from.
    "classifier.checkpoint": "free",
    "classifier.train_with": "free",
    "classifier.mean": "refuse",
    "classifier.std": "refuse",
    "classifier.input_size": "refuse",
    "classifier.init_from": "free",
    "classifier.freeze": "refuse",
    "classifier.batch_norm": "refuse",
    "classifier.loss.gamma": "refuse",
    "classifier.loss.class_weights": "refuse",
    "classifier.loss.label_smoothing": "refuse",
    "classifier.occlusion.probability": "refuse",
    "classifier.occlusion.kind": "refuse",
    "classifier.occlusion.max_share": "refuse",
    "classifier.occlusion.squares": "refuse",
    "classifier.occlusion.side": "refuse",
    "classifier.occlusion.grid": "refuse",
    "classifier.occlusion.keep": "refuse",
    "classifier.occlusion.layer": "refuse",
    "classifier.occlusion.jitter": "refuse",
    "classifier.occlusion.joint": "refuse",
    "classifier.occlusion.fill": "refuse",
    "classifier.occlusion.blank": "refuse",
    "classifier.mask_augmentation.checkpoint": "say",
    "classifier.mask_augmentation.probability": "refuse",
    "classifier.mask_augmentation.mode": "refuse",
    "classifier.mask_augmentation.classes": "refuse",
    "classifier.mask_augmentation.fill": "refuse",
    "explainer.encoder": "refuse",
    "explainer.network": "refuse",
    "explainer.options": "refuse",
    "explainer.downscale": "refuse",
    "explainer.stride": "refuse",
    "explainer.init_encoder": "refuse",
    "losses": "say",
    "teachers.name": "refuse",
    "teachers.options": "refuse",
    "teachers.weight": "say",
    "teachers.cache": "free",
    "teachers.dtype": "refuse",
    "teachers.seed": "refuse",
    "teachers.scale": "refuse",
    "teachers.images": "refuse",
    "teachers.threshold": "refuse",
    "teachers.teaches": "refuse",
    "teachers.memory_mib": "free",
    "masking.fill": "refuse",
    "masking.binarize": "refuse",
    "masking.subset": "refuse",
    "masking.area_conditioned": "refuse",
    "masking.areas": "refuse",
    "masking.area_temperature": "refuse",
    "masking.absent_classes": "refuse",
    "optimizer.name": "refuse",
    "optimizer.lr": "refuse",
    "optimizer.encoder_lr": "refuse",
    "optimizer.weight_decay": "refuse",
    "optimizer.schedule": "refuse",
    "optimizer.warmup": "refuse",
    "trainer.max_epochs": "free",
    "trainer.max_steps": "free",
    "trainer.max_time": "free",
    "trainer.accelerator": "free",
    "trainer.devices": "free",
    "trainer.num_nodes": "free",
    "trainer.strategy": "free",
    "trainer.precision": "say",
    "trainer.accumulate_grad_batches": "refuse",
    "trainer.gradient_clip_val": "say",
    "trainer.sync_batchnorm": "say",
    "trainer.channels_last": "free",
    "trainer.compile": "free",
    "trainer.compile_explainer": "free",
    "trainer.compile_classifier": "free",
    "trainer.patience": "free",
    "trainer.min_delta": "free",
    "trainer.check_val_every_n_epoch": "free",
    "trainer.save_every_n_steps": "free",
    "trainer.log_every_n_steps": "free",
    "trainer.progress_bar": "free",
    "trainer.extra": "say",
    "logging.wandb": "free",
    "logging.project": "free",
    "logging.tensorboard": "free",
    "logging.images": "free",
    "logging.images_every_n_epochs": "free",
    "evaluate_with": "free",
    "init_from": "free",
}
#: What is known only once the parts of a run are built, beside the keys.
FACTS: dict[str, Rule] = {
    "classes": "refuse",
    "labels": "refuse",  # multilabel or multiclass
    "image_size": "refuse",
    "images": "refuse",  # fingerprints by split
    "images_per_step": "say",
}
#: Sections that a task does not read.
UNUSED = {
    "classify": ("explainer.", "losses", "teachers.", "masking."),
    "explain": ("classifier.freeze", "classifier.batch_norm", "classifier.loss.", "classifier.occlusion.", "classifier.mask_augmentation."),
}
#: Keys whose configured value may leave open what was used (null, auto); they are compared as :func:`facts` gives them.
RESOLVED = ("classifier.mean", "classifier.std", "classifier.options", "explainer.options")


def settings(config: RunConfig) -> dict[str, Any]:
    """The values by which a run is recognised: of every key that is not free and needs no built part to be known.

    Paths are left out, as what they lead to is compared, and so are options that only say which weights training starts from.
    """
    values = {key: value for key, value in flat(asdict(config)) if RULES[key] != "free" and key not in RESOLVED}
    values["teachers.options"] = [without_paths(t.options) for t in config.teachers]
    for key in ("data.options", "data.train_options", "data.eval_options"):
        values[key] = without_paths(values[key])
    kind, colon, rest = config.classifier.arch.partition(":")
    values["classifier.arch"] = f"onnx:{Path(rest).name}" if kind == "onnx" and colon else config.classifier.arch
    return _plain({key: value for key, value in values.items() if not key.startswith(UNUSED[config.task])})


def facts(config: RunConfig, task: Any, data: Any) -> dict[str, Any]:
    """What only the built parts know.

    Args:
        config: the run.
        task: a :class:`~explainer.tasks.explain.ExplainTask` or :class:`~explainer.tasks.classify.ClassifyTask`.
        data: its :class:`~explainer.data.datamodule.DataModule`.
    """
    network, c = getattr(task, "explainer", None), config.classifier
    values = {
        "classes": list(data.class_names),
        "labels": data.task,
        "image_size": data.size,
        "images": data.fingerprints(),
        "classifier.options": without_paths(portable(c.arch, c.options)),
    }
    # A resumed classifier takes over its checkpoint's where none is configured.
    mean, std = (c.mean, c.std) if network is None else task.explanandum.normalization
    for name, numbers in (("classifier.mean", mean), ("classifier.std", std)):
        if numbers is not None:
            values[name] = [round(float(v), 7) for v in numbers]
    if network is not None:
        values["explainer.options"] = without_paths(self_contained(network.config["options"]))
    return _plain(values)


def images_per_step(config: RunConfig, world: int) -> dict[str, Any]:
    """The fact that depends on the number of processes."""
    each = config.data.batch_size * (1 if config.data.global_batch else world)
    return {"images_per_step": each * config.trainer.accumulate_grad_batches}


@dataclass(frozen=True)
class Earlier:
    """What a checkpoint says about the run that it was cut from.

    Attributes:
        path: path of the checkpoint.
        values: values by which the run is recognised; of older versions the optimiser and the classes.
        epochs, steps: done; None where it is no checkpoint of a training.
    """

    path: str
    values: dict[str, Any]
    epochs: int | None = None
    steps: int | None = None

    @classmethod
    def read(cls, path: str) -> Earlier:
        """Raises CheckpointError: missing, damaged or unsafe."""
        content = read_weights(path)
        saved = content.get(KEY)
        values = dict(saved) if isinstance(saved, dict) else _of_an_older_version(content)
        try:
            epochs = int(content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
            return cls(path, values, epochs, int(content["global_step"]))
        except (LookupError, TypeError, ValueError):  # Lightning says what it lacks
            return cls(path, values)

    def require_length(self, max_epochs: int, max_steps: int) -> None:
        """Raise ConfigError where a run is asked for less than is done; -1 stands for no limit."""
        for unit, key, done, most in (("epochs", "max_epochs", self.epochs, max_epochs), ("steps", "max_steps", self.steps, max_steps)):
            if done is not None and 0 <= most < done:
                raise ConfigError(
                    f"{self.path} has done {done} {unit} and trainer.{key} is {most}, so there is nothing left to train. To train longer, "
                    f"give more than {done} (the number counts from the beginning of the run); for what the run has learned use the "
                    "checkpoint as it is (explainer validate, test, explain); to train for fewer, begin anew in another --run_dir without "
                    "--ckpt_path."
                )

    def require_same(self, given: Mapping[str, Any]) -> None:
        """Compare with what a resumed run is given; a key that one side lacks is not compared.

        Args:
            given: what :func:`settings` or :func:`facts` returned.

        Raises:
            ConfigError: a key with the rule ``refuse`` differs.
        """
        if isinstance(self.values.get("classes"), list) and "classes" in given:
            require_classes(self.values["classes"], given["classes"], f"checkpoint {self.path}")
        differing: dict[str, list[str]] = {"refuse": [], "say": [], "free": []}
        for key, was in self.values.items():
            rule = RULES.get(key) or FACTS.get(key, "free")
            changed = _different(key, given[key], was) if key in given else ()
            differing[rule] += [f"{name} is {_short(now)} and was {_short(before)}" for name, now, before in changed]
        if differing["refuse"]:
            raise ConfigError(
                f"{'; '.join(differing['refuse'])} when {self.path} was written. A resumed run goes on as it began: leave these options "
                f"as they were. To train otherwise begin a run with these weights instead: --init_from {self.path} --run_dir ANOTHER, "
                "without --ckpt_path."
            )
        if differing["say"]:
            log.warning("resuming with other options: %s when %s was written.", "; ".join(differing["say"]), self.path)


def require_own_classes(path: str, class_names: Sequence[str]) -> None:
    """Raise ConfigError where a checkpoint is to be measured on data with other classes, or with its own in another order."""
    names = _of_an_older_version(read_weights(path)).get("classes")
    if names is not None:
        require_classes(names, class_names, f"checkpoint {path}")


def _of_an_older_version(content: Mapping[str, Any]) -> dict[str, Any]:
    """What every checkpoint says: the optimiser, or at least its rate, and the classes."""
    known = content.get("hyper_parameters")
    known = known if isinstance(known, dict) else {}
    optimizer = known.get("optimizer")
    if not isinstance(optimizer, dict):
        try:
            group = content["optimizer_states"][0]["param_groups"][0]
            optimizer = {"lr": group.get("initial_lr", group["lr"])}
        except (LookupError, TypeError, AttributeError):
            optimizer = {}
    if optimizer:
        optimizer = {"encoder_lr": 1.0, **optimizer}  # an older version had one rate
    network = known.get("explainer")
    names = network.get("class_names") if isinstance(network, dict) else known.get("class_names")
    return {**{f"optimizer.{key}": value for key, value in optimizer.items()}, **({"classes": names} if isinstance(names, list) else {})}


class RecordRun(pl.Callback):
    """Writes into every checkpoint by what its run is recognised.

    Args:
        values: what :func:`settings` and :func:`facts` returned.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add them."""
        checkpoint[KEY] = self.values


def keys(config: Any, prefix: str = "") -> Iterator[str]:
    """The keys of a configuration class, those of sections and of lists of sections with a dot."""
    import typing

    hints = typing.get_type_hints(config)
    for field in fields(config):
        kinds = [k for k in (hints[field.name], *typing.get_args(hints[field.name])) if is_dataclass(k)]
        if kinds:
            yield from keys(kinds[0], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by key, as far as there are rules: of a list of sections, a list for each of their keys."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        below = [rule.rpartition(".")[2] for rule in RULES if rule.rpartition(".")[0] == key]
        if key in RULES:
            yield key, value
        elif isinstance(value, list):
            yield from ((f"{key}.{part}", [section[part] for section in value]) for part in below)
        else:
            yield from flat(value, f"{key}.")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint gives them back."""
    return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]


def _different(key: str, now: Any, before: Any) -> Iterator[tuple[str, Any, Any]]:
    """``(key, now, before)`` of what differs; of dictionaries, each entry for itself."""
    if isinstance(now, dict) and isinstance(before, dict):
        for name in [*before, *(n for n in now if n not in before)]:
            yield from _different(f"{key}.{name}", now.get(name), before.get(name))
    elif now != before:
        yield key, now, before


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
