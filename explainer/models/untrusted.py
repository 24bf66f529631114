"""What a file may name: architectures of this project and its libraries, never code of elsewhere nor weights from elsewhere.

A checkpoint says which network its weights belong to. Whoever wrote the file chose these words, so that an import path among them would
let a file run code, and an option such as timm's ``checkpoint_path`` would let it fetch another file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from explainer.config import ClassifierConfig
from explainer.errors import CheckpointError
from explainer.models.classifiers import BUILDERS

_NAME = re.compile(r"[\w.\-]+")
#: Options by which torchvision, timm and segmentation-models-pytorch are told to start from trained weights. A checkpoint's own weights
#: replace them anyway: they are dropped without a word.
_REPLACED = {"weights": None, "pretrained": False, "encoder_weights": None, "weights_backbone": None}
#: Options by which these libraries read files or addresses.
_SOURCES = frozenset(
    {
        "cache_dir",
        "checkpoint_path",
        "custom_load",
        "file",
        "hf_hub_filename",
        "hf_hub_id",
        "model_dir",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "repo",
        "repo_or_dir",
        "source",
        "state_dict",
        "url",
    }
)


def without_weights(options: dict[str, Any]) -> dict[str, Any]:
    """The options with every trained start switched off: the weights are about to be replaced."""
    return {key: _REPLACED.get(key, value) for key, value in options.items()}


def _of_a_library(arch: str) -> bool:
    return arch in BUILDERS or arch.partition(":")[0] in ("torchvision", "timm")


def without_start(arch: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with a library's trained start switched off; code from elsewhere keeps all of its options."""
    return without_weights(options) if _of_a_library(arch) else dict(options)


def portable(arch: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are still needed to build a library's classifier once its weights are in a checkpoint: without trained starts and
    without the files that a library was told to read. Code from elsewhere keeps all of its options.
    """
    return self_contained(options) if _of_a_library(arch) else dict(options)


def self_contained(options: dict[str, Any]) -> dict[str, Any]:
    """The options without trained starts and, at any depth, without files or addresses that a library was told to read."""

    def kept(value: Any) -> Any:
        return {k: kept(v) for k, v in value.items() if k not in _SOURCES} if isinstance(value, dict) else value

    return without_weights(kept(options))


def without_files(config: ClassifierConfig, shared: bool = False) -> dict[str, Any]:
    """The ``classifier`` section as a checkpoint keeps it: without the files and the options that only a training's beginning needs.

    Args:
        config: the section.
        shared: the checkpoint is of a decoder on this classifier's features, which is found again by its file, or by the stock weights
            that its options name.
    """
    options = dict(config.options) if shared and config.checkpoint is None else portable(config.arch, config.options)
    section = {**asdict(config), "options": options, "checkpoint": config.checkpoint if shared else None}
    section["mask_augmentation"]["checkpoint"] = section["init_from"] = section["train_with"] = None
    return section


def classifier_options(
    path: Any, arch: Any, options: Any, chosen_arch: str | None = None, chosen_options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The options to build the classifier with that a file names.

    Args:
        path: the file, for messages.
        arch, options: what it says.
        chosen_arch, chosen_options: what the user's own configuration or call says: the same arch there is the user's choice.

    Raises:
        CheckpointError: code, files or addresses that the user has not named as well.
    """
    if not isinstance(arch, str) or not isinstance(options, dict) or not all(isinstance(k, str) for k in options):
        raise CheckpointError(f"{path} does not say which classifier it holds (arch {arch!r}). Use another checkpoint of the run.")
    mine = dict(chosen_options or {}) if arch == chosen_arch else None
    if arch in BUILDERS or _in_a_library(arch, mine is not None):
        _refuse_sources(path, options, mine or {})
        return without_weights(options)
    if mine is None:
        raise CheckpointError(
            f"{path} names the classifier {arch!r}, which is code from outside this project: it was not imported, because a file must not "
            f"choose what runs. If this is your classifier, say so: --classifier.arch {arch} (arch: in a configuration or call), "
            "with the same classifier.options."
        )
    if {**mine, "weights": None} != {**options, "weights": None}:
        raise CheckpointError(
            f"{path} was saved with other classifier.options ({options}) than are given ({mine}). What your own code ({arch}) is called "
            "with is not taken from a file: give the same classifier.options."
        )
    return {key: None if key == "weights" else value for key, value in mine.items()}


def _in_a_library(arch: str, named_by_user: bool) -> bool:
    """Whether it is a classifier of torchvision or timm by its name there (timm takes addresses and folders for names, too)."""
    prefix, _, rest = arch.partition(":")
    if not _NAME.fullmatch(rest) and not named_by_user:
        return False
    if prefix == "torchvision" and not named_by_user:
        from torchvision import models

        return rest in models.list_models(module=models)  # detection models fetch a trained backbone by default
    return prefix in ("torchvision", "timm")


def network_options(options: Any, source: str = "this file") -> dict[str, Any]:
    """The options of an Explainer network that a file names.

    Raises:
        CheckpointError: they name files, addresses or encoders of elsewhere.
    """
    if not isinstance(options, dict) or not all(isinstance(k, str) for k in options):
        raise CheckpointError(f"{source} does not say how its Explainer is built (options {options!r}). Use another file of the run.")
    encoder = options.get("encoder_name", "resnet50")
    if not isinstance(encoder, str) or not _NAME.fullmatch(encoder):
        raise CheckpointError(
            f"{source} names the encoder {encoder!r}, which lies outside the installed libraries: it was not fetched. Use a file whose "
            "encoder is one of segmentation-models-pytorch or timm by name."
        )
    _refuse_sources(source, options, {})
    return without_weights(options)


def _refuse_sources(path: Any, options: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Raise for options that name sources; those that the user has named alike, with all below them, are the user's own."""
    foreign = {key: value for key, value in options.items() if not (key in chosen and chosen[key] == value)}
    for key, value in _entries(foreign):
        if key in _SOURCES and value is not None:
            raise CheckpointError(
                f"{path} has the option {key}: {str(value)[:100]!r}, which makes a library read another file or address: it was not built. "
                f"The file's own weights need no such option: save it without {key}, or, for a classifier, name the same arch and options "
                "in your own configuration."
            )


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """All keys with their values, at any depth."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield from part.items()
            waiting.extend(part.values())
        elif isinstance(part, list | tuple):
            waiting.extend(part)
