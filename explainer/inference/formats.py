"""What every export format shares: the model that is exported, the description stored with it, and the running artefact."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explainer.errors import ConfigError, ShapeError
from explainer.inference.classifier import Given
from explainer.inference.predictor import full_size
from explainer.tensors import state_digest

Array = NDArray[np.float32]
DESCRIPTION = "explainer-export/1"
#: Side in pixels at which a model runs that does not know the side it was trained at.
DEFAULT_SIDE = 224


@dataclass
class ExportOptions:
    """How a model is written.

    Attributes:
        size: ``(height, width)`` the graph is fixed to, or traced near if ``dynamic_size``.
        dynamic_size: accept any height and width (10-25 % slower in onnxruntime). The batch size is always free.
        precision: fp32, fp16 (weights stored in half precision) or int8 (static quantisation, needs ``calibration``).
        calibration: ``[N,3,H,W]`` float32 images in [0,1], like those the model will see.
        examples: ``[N,3,H,W]`` float32 in [0,1], pictures that a page may show; for formats with a ``folder``.
        runtime: folder of the browser's runtime; for formats that need one.
    """

    size: tuple[int, int]
    dynamic_size: bool = False
    precision: str = "fp32"
    calibration: Array | None = None
    examples: Array | None = None
    runtime: Path | None = None


@dataclass
class ExportModel:
    """A module to export. ``module(images [B,3,H,W] in [0,1])`` returns one tensor or a tuple, named by ``outputs``.

    Attributes:
        stride: multiple to which the module pads inside; only used to choose an example size that is no multiple of it.
        description: plain values stored with the file (classes, fingerprint, ...).
    """

    module: nn.Module
    outputs: tuple[str, ...] = ("masks",)
    stride: int = 32
    description: dict[str, Any] = field(default_factory=dict)

    def reference(self, images: Array) -> dict[str, Array]:
        """The eager result, by output name."""
        with torch.inference_mode():
            return full_size(named(self.outputs, self.module(torch.from_numpy(images))), images.shape[2:])


class Runtime(abc.ABC):
    """A model opened for inference.

    Attributes:
        explanandum: the classifier, where the model holds it as a part that can be asked alone (a shared encoder); else None.
        description: what was stored with it; ``classes``, ``size`` (``[H,W]``, or None if any), ``precision``, ``fingerprint``, ...
    """

    description: dict[str, Any]
    explanandum: Any = None

    def run_classes(self, images: Array, classes: NDArray[np.int64]) -> Array:
        """Masks of each image's own classes, at a cost that does not grow with the number of classes.

        Args:
            images: ``[B,3,H,W]`` float32 in [0,1].
            classes: ``[B,n]`` class numbers.

        Returns:
            ``[B,n,H,W]``.
        """
        if self.top is not None:
            raise ConfigError(f"this file computes the masks of the {self.top} most probable classes: others cannot be asked for.")
        masks = self.run(images)["masks"]
        return masks[np.arange(len(masks))[:, None], classes]

    @abc.abstractmethod
    def run(self, images: Array) -> dict[str, Array]:
        """``[B,3,H,W]`` float32 in [0,1] -> arrays by name: ``masks`` ``[B,K,H,W]``; fused models also ``probabilities`` ``[B,K]``,
        ``merged`` ``[B,H,W]`` and ``areas`` ``[B,K]``; those of the ``top`` most probable classes ``classes`` ``[B,top]``, with masks and
        areas of these alone.
        """

    def area_masks(self, images: Array, area: float) -> Array:
        """``[B,3,H,W]`` -> masks ``[B,K,H,W]`` of which each covers the share ``area`` of the image.

        Raises:
            ConfigError: the file holds finished masks only.
        """
        raise ConfigError(
            "--area needs the network's logits, which this file does not hold: give the .ckpt of train.py or model.safetensors "
            f"(received a model that gives {', '.join(self.description.get('outputs', ['masks']))})."
        )

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the masks."""
        return list(self.description["classes"])

    @property
    def top(self) -> int | None:
        """Of how many classes of an image the masks are given, where these are its most probable ones; None: of all classes."""
        return self.description.get("top")

    @property
    def size(self) -> tuple[int, int] | None:
        """The only ``(height, width)`` accepted, or None if any is."""
        size = self.description.get("size")
        return (int(size[0]), int(size[1])) if size else None


class ExportFormat(abc.ABC):
    """One file format. A concrete class has a ``name`` and costs one file.

    Class attributes:
        suffix: of the file; also how a file is recognised when it is opened.
        extra: of this package that installs what the format needs, or None.
        precisions: those it can write.
        fusable: a fused classifier + Explainer can be written.
        fused_only: nothing else can; ``--fused`` goes without saying.
        folder: inside ``--out``, which the format fills with a model of another format and all that goes with it; None: the format is a
            file in ``--out`` itself.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str | None] = None
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    fusable: ClassVar[bool] = True
    fused_only: ClassVar[bool] = False
    folder: ClassVar[str | None] = None

    def file_name(self, stem: str) -> str:
        """Path of the model file inside the format's folder; ``stem`` says what it holds (``model``, ``fused-int8``)."""
        return stem + self.suffix

    def use(self, name: str) -> list[str]:
        """Lines of Markdown for the model card: how to run the folder whose model file is ``name``. Empty: the card knows the file."""
        return []

    def front(self, description: dict[str, Any]) -> dict[str, Any] | None:
        """The card's metadata, where it is not that of a model on the Hub but a Space's; ``description`` is the model's."""
        return None

    @abc.abstractmethod
    def write(self, model: ExportModel, path: Path, options: ExportOptions) -> None:
        """Write ``model`` to ``path`` (and files beside it with the same stem)."""

    @abc.abstractmethod
    def open(self, path: Path, threads: int | None = None, given: Given | None = None) -> Runtime:
        """Open a file this format wrote.

        Args:
            path: the file.
            threads: number of threads in one call, where the runtime can be told.
            given: see :func:`explainer.load`; only a format that stores a decoder without its classifier asks.

        Raises:
            CheckpointError: missing, damaged or foreign.
        """

    def check(self, options: ExportOptions) -> None:
        """Raise :class:`ConfigError` for a precision this format cannot write, or a quantisation without images."""
        if options.precision not in self.precisions:
            raise ConfigError(
                f"format {self.name} cannot be written with precision {options.precision!r}; it offers {', '.join(self.precisions)}."
            )
        if options.precision == "int8" and (options.calibration is None or len(options.calibration) == 0):
            raise ConfigError(
                "precision int8 needs calibration images: --calibration FOLDER with some 30 or more images like those the model will see."
            )


def require(module: str, extra: str) -> Any:
    """Import an optional package, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{module} is not installed ({error}). Install the extra that has it: pip install 'explainer-net[{extra}]'."
        ) from error


def named(names: Sequence[str], values: Any) -> dict[str, Array]:
    """One tensor or a tuple of them -> numpy arrays by name."""
    tensors = [values] if isinstance(values, Tensor) else list(values)
    plain = [value.detach().cpu() for value in tensors]
    return {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in zip(names, plain, strict=True)}


def check_batch(images: Array, size: tuple[int, int] | None) -> None:
    """Raise :class:`ShapeError` unless ``images`` is float32 ``[B,3,H,W]`` of the size that the file is fixed to."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.float32:
        raise ShapeError(f"images must be float32 [B,3,H,W] in [0,1], received {images.dtype} {images.shape}.")
    if size is not None and tuple(images.shape[2:]) != size:
        raise ShapeError(
            f"this model was exported for images of {size[0]} x {size[1]}, received {images.shape[2]} x {images.shape[3]}. "
            "Resize them, or export again with --dynamic_size."
        )


def fingerprint(module: nn.Module) -> str:
    """SHA-256 (first 16 hex digits) over the names and values of a module's state."""
    return state_digest(module.state_dict())
