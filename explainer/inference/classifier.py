"""The classifier that a command is given (``--classifier``, ``--classifier_options``). Importing this module does not import torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from explainer.config import without_paths
from explainer.errors import CheckpointError, ConfigError
from explainer.geometry import Size

Given = Callable[[dict[str, Any]], Any]
"""What a decoder's file says of its classifier (``task``, ``classes``, ``classifier``) -> that classifier (an Explanandum), or None: it is
built as in training."""

_KEYS = ("arch", "options", "num_classes", "task", "class_names", "mean", "std", "input_size")
_SCORES = ("scores", "normalize", "output")  # what an ONNX file's own use in training says about its next use


def open_classifier(path: str | None, options: str | None = None, description: dict[str, Any] | None = None) -> Any:
    """The classifier in a checkpoint of this project, a plain state_dict, or an ONNX file (which gives scores only); None without path.

    Args:
        options: YAML of what the file does not say; wins over the description.
        description: description of the model it belongs to (``Runtime.description``), or None: its classes, its task, and how its
            classifier was built.

    Raises:
        ConfigError: the options are of another kind, or the classes are not the model's.
        CheckpointError: the file is unusable.
    """
    given = _mapping(options)
    if path is None:
        if given:
            raise ConfigError("--classifier_options describes a classifier: name its file with --classifier.")
        return None
    from explainer.models.checkpoints import load_explanandum

    is_onnx = str(path).endswith(".onnx")
    values = {**_known(description or {}, is_onnx, "arch" in given), **given}
    if is_onnx:
        values["arch"] = f"onnx:{path}"
    from explainer.tasks.precision import laid_out

    try:
        return laid_out(load_explanandum(None if is_onnx else path, **values), path, otherwise=None)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"--classifier_options has a value of another kind ({error}). Received: {options}.") from error


class GivenClassifier:
    """The classifier of ``--classifier`` and ``--classifier_options``, opened once: when the model has said its classes.

    A decoder on the classifier's features cannot be opened without it, and what the options leave out stands in the decoder's file.
    """

    def __init__(self, path: str | None, options: str | None) -> None:
        self.path, self.options = path, options
        self._opened: Any = None

    def __call__(self, description: dict[str, Any]) -> Any:
        """For a shared encoder: the classifier, or None where none is given or it gives scores only, which have no features."""
        if self.path is None or str(self.path).endswith(".onnx"):
            return None
        return self.beside(description)

    def beside(self, description: dict[str, Any] | None) -> Any:
        """The classifier beside a model of this description, or None where none is given; see :func:`open_classifier`."""
        if self._opened is None:
            self._opened = open_classifier(self.path, self.options, description)
        return self._opened


def classifier_size(path: str | None, options: str | None = None) -> Size | None:
    """Size in pixels of the images that a classifier was trained with; None where neither its file nor a library says it."""
    if path is None or str(path).endswith(".onnx"):
        return None
    from explainer.models.checkpoints import trained_size

    given = _mapping(options)
    return trained_size(path, str(given.get("arch") or ""), given.get("options"))[0]


def _known(description: dict[str, Any], is_onnx: bool, arch_given: bool) -> dict[str, Any]:
    """What a model says about its classifier. Its file was written by someone else, so a name that is code from elsewhere is left out."""
    from explainer.models.untrusted import classifier_options

    known: dict[str, Any] = {}
    if description.get("task") is not None:
        known["task"] = description["task"]
    if description.get("classes") is not None:
        known |= {"class_names": list(description["classes"]), "num_classes": len(description["classes"])}
    built = description.get("classifier")
    if not isinstance(built, dict):
        return known
    known |= {key: built[key] for key in ("mean", "std", "input_size") if built.get(key) is not None}
    arch, options = built.get("arch"), built.get("options")
    if is_onnx and isinstance(options, dict) and str(arch).startswith("onnx:"):
        known["options"] = {key: options[key] for key in _SCORES if key in options}
    elif not is_onnx and not arch_given:
        with contextlib.suppress(CheckpointError):  # then a state_dict needs --classifier_options, as it does where nothing is known
            known |= {"options": classifier_options("the model", arch, options), "arch": arch}
    return known


def described(values: Any) -> dict[str, Any] | None:
    """A training's ``classifier`` section, or None, without names of files and folders: they mean nothing elsewhere and may be private."""
    if not isinstance(values, dict) or not isinstance(values.get("arch"), str):
        return None
    kind, colon, rest = values["arch"].partition(":")
    arch = f"onnx:{Path(rest).name}" if kind == "onnx" and colon else values["arch"]
    options = values.get("options")
    kept = without_paths(options) if isinstance(options, dict) else {}
    return {"arch": arch, "options": kept, **{key: values.get(key) for key in ("mean", "std", "input_size")}}


def require_same_classifier(explanandum: Any, description: dict[str, Any], source: str) -> str:
    """Refuse a classifier that the model was not trained for; where it cannot be known, a notice is returned, else "".

    Raises:
        FingerprintMismatchError: it is another one.
    """
    expected = description.get("explained_classifier")
    if explanandum is None or expected is None:
        return ""
    if explanandum.differentiable:
        explanandum.require_fingerprint(expected, source)
    elif explanandum.fingerprint() != expected:
        return "Whether this classifier is the one that the model explains cannot be checked: it gives scores only."
    return ""


def prediction_threshold(given: float | None, description: dict[str, Any]) -> float:
    """From which probability a class counts as predicted: as asked, else what is baked into a fused file, else 0.5."""
    stored = description.get("threshold")
    return given if given is not None else 0.5 if stored is None else float(stored)


def _mapping(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--classifier_options is not valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict) or (unknown := [k for k in values if k not in _KEYS]):
        wrong = f"the key {unknown[0]!r}" if isinstance(values, dict) else repr(values)
        raise ConfigError(f"--classifier_options must be a mapping with keys of {', '.join(_KEYS)}; received {wrong}.")
    return values
