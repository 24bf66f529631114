"""Reading weights safely: nothing in a file is executed."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from explainer.config import ClassifierConfig
from explainer.errors import CheckpointError, ConfigError
from explainer.geometry import Size, as_size
from explainer.models.black_box import build_black_box, is_black_box
from explainer.models.classifiers import build_classifier
from explainer.models.explanandum import Explanandum
from explainer.models.matching import by_name, unwrapped
from explainer.models.preprocessing import differ, normalization, recorded
from explainer.models.untrusted import classifier_options

log = logging.getLogger(__name__)
_intact: set[tuple[str, int, int, int]] = set()  # (path, size, time, inode) of files whose checksums are right


# What training scripts (timm's) store beside the weights: holders of plain values, whose making runs no code of the file's choice.
_PLAIN: list[Any] = [
    argparse.Namespace,
    *(np.dtype, np.float64(0).__reduce__()[0]),
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
]


def read_weights(path: str | Path) -> dict[str, Any]:
    """The dictionary in a checkpoint (.ckpt, .pt, .pth) or the tensors of a .safetensors file.

    torch's ``weights_only=True`` unpickler is used, so a pickle payload does not run. Arguments of a script and numbers of numpy, which
    trainers store beside the weights, are plain values.

    Raises:
        CheckpointError: missing, damaged, or holding anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist. Check the path, or train it first.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(str(path)))
        with torch.serialization.safe_globals(_PLAIN):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} holds more than tensors and plain values, or is not a checkpoint: it was not loaded, because loading could "
            f"run foreign code. Save the state_dict alone (torch.save(model.state_dict(), ...)), or use safetensors. {_refused(error)}"
        ) from error
    except Exception as error:
        # torch and safetensors raise many types (RuntimeError, EOFError, KeyError, SafetensorError, ...) for damaged files.
        raise CheckpointError(
            f"checkpoint {path} is damaged or of another format ({_first_line(error)}). Copy it again, or use an older one."
        ) from error
    _check_sums(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary of tensors (a state_dict).")
    return content


def _check_sums(path: Path) -> None:
    """Compare every part of a torch file with the checksum that it was written with, once a process and file.

    torch reads a file with a flipped bit as if nothing were wrong: a weight, or a moment of the optimiser, is another number then.
    """
    status = path.stat()
    known = (str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_ino)
    if known in _intact or not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            # torch compresses nothing; what does unpacks to any size and is not read here.
            entries = archive.infolist()
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if stored and sum(entry.file_size for entry in entries) > status.st_size:
                raise ValueError("its parts are larger than the file")
            entry = archive.testzip() if stored else None
            wrong = None if entry is None else f"{entry} has not the checksum it was written with"
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        wrong = _first_line(error)
    if wrong is not None:
        beside = " Of a run that is resumed, the one before it: --ckpt_path previous." if path.name == "last.ckpt" else ""
        raise CheckpointError(
            f"checkpoint {path} is damaged: {wrong} (bits have changed on the disk or in a copy). "
            f"Copy it again, or use an older one.{beside}"
        )
    _intact.add(known)


def _refused(error: Exception) -> str:
    """The object that torch's restricted unpickler refused, where it says so."""
    found = re.search(r"unsupported (?:global: )?GLOBAL ([\w.]+)", str(error), re.IGNORECASE)
    return f"(It refers to {found.group(1)}.)" if found else ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}" if str(error).strip() else type(error).__name__


def hyper_parameters(content: dict[str, Any], kind: Literal["classifier", "explainer"], path: str | Path) -> dict[str, Any] | None:
    """The hyper-parameters this project wrote, or None for a foreign file; the other kind is an error."""
    values = content.get("hyper_parameters")
    if not isinstance(values, dict) or "kind" not in values:
        return None
    if values["kind"] != kind:
        called = {"classifier": "a classifier", "explainer": "an Explainer"}
        other = called.get(str(values["kind"]), repr(values["kind"]))
        raise CheckpointError(f"{path} is a checkpoint of {other}, expected one of {called[kind]}.")
    return values


def require_classes(trained: Sequence[str], given: Sequence[str], source: str) -> None:
    """Raise ConfigError unless weights are used for the classes that they were trained for, in the same order.

    Args:
        trained: names, in the order of the outputs.
        given: those of the data.
        source: whose weights they are, for the message.
    """
    if list(trained) != list(given):
        same = " (in another order)" if sorted(map(str, trained)) == sorted(given) else ""
        raise ConfigError(
            f"{source} was trained for the classes {', '.join(map(str, trained))}, the data has {', '.join(given)}{same}. "
            "Use the data it was trained on (same class_names, same order), or another checkpoint."
        )


def require_same_order(trained: Sequence[str], given: Sequence[str], source: str) -> None:
    """:func:`require_classes` where weights are only a start: other classes are said and not refused, the same ones in another order are
    refused, because nothing would show that the outputs have changed places.
    """
    if sorted(map(str, trained)) == sorted(given):
        require_classes(trained, given, source)
    elif len(trained) == len(given):
        log.warning(
            "%s was trained for the classes %s; its outputs are a start for %s.", source, ", ".join(map(str, trained)), ", ".join(given)
        )


def sub_state(state: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The entries below ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def _described(saved: dict[str, Any], path: str | Path | None) -> dict[str, Any]:
    """The ``classifier`` section of hyper-parameters, once they hold all that is read of them."""
    section = saved.get("classifier")
    missing = [key for key in ("num_classes", "task", "class_names") if key not in saved]
    missing += [key for key in ("arch", "options", "mean", "std", "input_size") if not isinstance(section, dict) or key not in section]
    if missing or not isinstance(section, dict):
        raise CheckpointError(f"classifier {path} does not say {', '.join(missing)}. Use another checkpoint of the run.")
    return section


def trained_size(checkpoint: str | Path | None, arch: str, options: dict[str, Any] | None = None) -> tuple[Size | None, str]:
    """Size in pixels of the images that a classifier was trained with, and who says so; None where nothing does.

    Args:
        checkpoint: its file; a checkpoint of this project says it.
        arch, options: else what the library records about them.
    """
    if checkpoint is not None and Path(checkpoint).is_file():
        saved = hyper_parameters(read_weights(checkpoint), "classifier", checkpoint) or {}
        if saved:
            return as_size(saved.get("image_size")), str(checkpoint)
    found = recorded(arch, options)
    return (None, "") if found is None else (found.size, found.source)


def configured_explanandum(
    config: ClassifierConfig, num_classes: int, task: Literal["multilabel", "multiclass"], class_names: Sequence[str] | None
) -> Explanandum:
    """:func:`load_explanandum` of a ``classifier`` section.

    Raises:
        ConfigError: the section only says how a training of the classifier would begin.
    """
    c = config
    if c.init_from is not None and c.checkpoint is None:
        raise ConfigError(
            f"classifier.init_from ({c.init_from}) begins the training of a classifier (task classify). The classifier to be explained is "
            "classifier.checkpoint: name the file of the trained one."
        )
    return load_explanandum(
        c.checkpoint, c.arch, c.options, num_classes, task=task, class_names=class_names, mean=c.mean, std=c.std, input_size=c.input_size
    )


def load_explanandum(
    checkpoint: str | Path | None,
    arch: str = "small_vgg",
    options: dict[str, Any] | None = None,
    num_classes: int | None = None,
    *,
    task: Literal["multilabel", "multiclass"] = "multilabel",
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
) -> Explanandum:
    """A frozen classifier.

    ``mean`` and ``std`` are, where not given, the model's own (timm, torchvision) or ImageNet's.

    A checkpoint of this project knows its architecture, classes and normalisation, which then win over the arguments; code from outside
    this project runs only where ``arch`` names the same (:mod:`explainer.models.untrusted`). A plain state_dict is loaded into ``arch``.
    Without checkpoint the builder's own weights are used (``options: {weights: ...}``, or random).

    Raises:
        CheckpointError: the file is unusable, names foreign code, or does not fit the architecture.
        ConfigError: its classes are not the data's.
    """
    if is_black_box(arch):
        if checkpoint is not None or num_classes is None:
            raise ConfigError(
                f"classifier {arch} gives scores only: it needs num_classes and takes no checkpoint, received {checkpoint!r}."
            )
        mean, std = normalization("", None, mean, std)
        return build_black_box(arch, num_classes, options, task=task, mean=mean, std=std, class_names=class_names, input_size=input_size)
    content = read_weights(checkpoint) if checkpoint is not None else {}
    saved = hyper_parameters(content, "classifier", checkpoint) if checkpoint is not None else None
    if saved is not None:
        c = _described(saved, checkpoint)
        options = classifier_options(checkpoint, c["arch"], c["options"], arch, options)
        for label, given in (("mean", mean), ("std", std)):
            if isinstance(c[label], list) and differ(given, c[label]):
                log.warning("classifier.%s is given as %s; %s was trained with %s, which is used.", label, given, checkpoint, c[label])
        arch, mean, std, input_size = c["arch"], c["mean"], c["std"], c["input_size"]
        if class_names is not None:
            require_classes(saved["class_names"], class_names, f"classifier {checkpoint}")
        num_classes, task, class_names = saved["num_classes"], saved["task"], saved["class_names"]
        weights = content.get("state_dict")
        if not isinstance(weights, dict):
            raise CheckpointError(f"classifier {checkpoint} holds no weights. Use another checkpoint of the run.")
        state = sub_state(weights, "classifier.")
    else:
        state = {} if checkpoint is None else unwrapped(content, checkpoint)
    mean, std = normalization(arch, options, mean, std)
    if num_classes is None:
        raise ConfigError("num_classes is needed for a classifier that was not trained with this project.")
    try:
        result = Explanandum(
            build_classifier(arch, num_classes, **(options or {})),
            num_classes,
            task,
            mean=mean,
            std=std,
            class_names=class_names,
            input_size=input_size,
        )
    except (RuntimeError, TypeError, ValueError, OverflowError, LookupError, AttributeError, AssertionError) as error:
        if saved is None:
            raise
        raise CheckpointError(f"classifier {checkpoint} describes itself wrongly ({' '.join(str(error).split())[:300]}).") from error
    result.classifier.eval().requires_grad_(False)  # made here, so nobody trains it
    if checkpoint is not None:
        if saved is None:
            names = {theirs: mine for mine, theirs in by_name(state, result.classifier.state_dict(), checkpoint).items()}
            state = {names.get(theirs, theirs): value for theirs, value in state.items()}
        try:
            result.classifier.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            lines = str(error).strip().splitlines()
            raise CheckpointError(
                f"classifier {checkpoint} does not fit {arch} with {num_classes} classes: {' '.join(lines[1:3]).strip()[:300]} "
                "Set classifier.arch and classifier.options to what it was trained with."
            ) from error
    result.arch = arch
    return result
