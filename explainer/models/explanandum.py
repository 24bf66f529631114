"""The Explanandum: the trained classifier that is to be explained, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from explainer.attribution.rest import Turn, at_rest
from explainer.errors import ConfigError, FingerprintMismatchError, ShapeError
from explainer.models.scores import logits_of
from explainer.tensors import state_digest

Task = Literal["multilabel", "multiclass"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


_OF_UNIT_IMAGES = 10.0  # far above what mean and standard deviation of images in [0,1] can be, far below those of images in 0..255


def check_normalization(mean: Tensor, std: Tensor) -> None:
    """Raise :class:`ConfigError` unless mean and standard deviation can be those of images in [0,1]."""
    if not bool((std > 0).all()):
        raise ConfigError(f"std must be positive, received {std.flatten().tolist()}.")
    if not max(float(mean.abs().max()), float(std.max())) <= _OF_UNIT_IMAGES:
        given = f"mean {mean.flatten().tolist()} and std {std.flatten().tolist()}"
        raise ConfigError(f"mean and std count in images in [0,1]: divide those of images in 0..255 by 255. Received {given}.")


def check_input_size(size: int | None) -> None:
    """Raise :class:`ConfigError` unless images can be resized to this side."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ConfigError(f"input_size must be a whole number of pixels, at least 1, or None, received {size!r}.")


def answer_of(classifier: nn.Module, normalized: Tensor) -> Any:
    """What the classifier returns for normalised images ``[B,C,H,W]``.

    Raises:
        ShapeError: it cannot take images of this number of channels or of this size.
    """
    if torch.compiler.is_compiling():
        return classifier(normalized)
    try:
        return classifier(normalized)
    except (AssertionError, RuntimeError) as error:  # timm asserts the size of a transformer's images
        said = str(error).lower()
        if "channels" in said:
            C = normalized.shape[1]
            raise ShapeError(f"the classifier cannot take images of {C} channel(s), {tuple(normalized.shape)}: {error}") from error
        if isinstance(error, AssertionError) or "output size" in said or "kernel size" in said:
            size = "x".join(map(str, normalized.shape[-2:]))
            raise ShapeError(
                f"the classifier cannot take images of {size} pixels ({error}): give images of the size that it was trained at, or let "
                "them be resized (input_size of the Explanandum, classifier.input_size)."
            ) from error
        raise


class Explanandum(nn.Module):
    """A frozen classifier: images in [0,1] -> logits ``[B,K]``.

    Every call runs in eval mode and gives no gradients to parameters (they flow *through* it to the image), whatever state the user's
    own module is in; that state (modes, ``requires_grad``, buffers) is left as it was. Calls of several threads wait for each other. The
    input is normalised with the classifier's own mean and standard deviation and cast to its parameters' dtype; logits have the images'.

    Args:
        classifier: any module that maps normalised images ``[B,C,H,W]`` to logits ``[B,K]``, or to a tuple, dict or named output that
            holds them (:func:`~explainer.models.scores.logits_of`).
        num_classes: number of classes K; 1 for a binary classifier with one logit, then ``multilabel``.
        task: ``multilabel`` (sigmoid per class) or ``multiclass`` (softmax).
        mean, std: per-channel or one number, in units of [0,1] images. 0 and 1 switch normalisation off.
        class_names: names of the K classes, or None for "0".."K-1".
        input_size: side in pixels to which images are resized (bilinear) before the classifier; None leaves them as they are.

    Attributes:
        arch: name that :func:`~explainer.models.classifiers.build_classifier` built it by; None for a module of elsewhere.

    Class attributes:
        differentiable: gradients flow through it to the image (:class:`~explainer.models.black_box.BlackBox`: they do not).
    """

    differentiable: ClassVar[bool] = True
    arch: str | None = None

    def __init__(
        self,
        classifier: nn.Module,
        num_classes: int,
        task: Task = "multilabel",
        *,
        mean: float | Sequence[float] = IMAGENET_MEAN,
        std: float | Sequence[float] = IMAGENET_STD,
        class_names: Sequence[str] | None = None,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        if task not in ("multilabel", "multiclass"):
            raise ConfigError(f"task must be 'multilabel' or 'multiclass', received {task!r}.")
        if num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, received {num_classes}.")
        if num_classes == 1 and task == "multiclass":
            raise ConfigError("one class with task='multiclass' has probability 1 whatever the image shows: use task='multilabel'.")
        if class_names is not None and len(class_names) != num_classes:
            raise ConfigError(f"class_names has {len(class_names)} entries for num_classes={num_classes}; give one name per class.")
        if class_names is not None and len(set(class_names)) < num_classes:
            raise ConfigError(f"class_names must be different names, received {', '.join(map(str, class_names))}.")
        if not isinstance(classifier, nn.Module):
            raise ConfigError(
                f"classifier must be a torch.nn.Module, received {type(classifier).__name__}: a function that gives scores is an "
                "explainer.BlackBox."
            )
        self.classifier = classifier
        self.num_classes = num_classes
        self.task: Task = task
        self.class_names = tuple(class_names) if class_names is not None else tuple(str(k) for k in range(num_classes))
        self.input_size = input_size
        example = next((p for p in classifier.parameters() if p.is_floating_point()), torch.empty(0))
        for label, value in (("mean", mean), ("std", std)):
            try:
                tensor = torch.as_tensor(value, dtype=example.dtype, device=example.device).reshape(-1)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"{label} must be a number or one number per channel, received {value!r} ({error}).") from error
            self.register_buffer(label, tensor, persistent=False)
        check_normalization(self.mean, self.std)
        check_input_size(input_size)
        self.turn = Turn()
        self.training = False

    mean: Tensor
    std: Tensor

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation as plain numbers (to seven digits: those that were given)."""
        return [round(float(v), 7) for v in self.mean], [round(float(v), 7) for v in self.std]

    def train(self, mode: bool = True) -> Explanandum:
        """Eval mode, whatever ``mode`` is: dropout and drifting BatchNorm statistics would change what is explained."""
        return super().train(False)

    def normalize(self, images: Tensor) -> Tensor:
        """``(images - mean) / std`` per channel, in the dtype of the classifier's parameters: what the classifier itself is given.

        Raises:
            ShapeError: mean or std has another number of channels than the images.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, images.shape[1]):
                raise ShapeError(
                    f"images have {images.shape[1]} channel(s) and {name} has {len(values)} values: give {name}= one number, or one per "
                    f"channel of the classifier's input (images {tuple(images.shape)})."
                )
        normalized = (images - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)
        weight = next((p for p in self.classifier.parameters() if p.is_floating_point()), None)
        return normalized if weight is None or weight.dtype == normalized.dtype else normalized.to(weight.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B,C,H,W]`` in [0,1] -> logits ``[B,K]``, in the images' dtype.

        Raises:
            ShapeError: the images have no batch axis, or are whole numbers, of which logits in their dtype would be cut to whole numbers,
                too.
        """
        if images.ndim == 3:
            raise ShapeError(f"images must be [B,C,H,W], received {tuple(images.shape)}: add the batch axis (image[None]).")
        if not images.is_floating_point():
            raise ShapeError(f"images must be floating point in [0,1], received {images.dtype}: divide images in 0..255 by 255.")
        if self.input_size is not None and images.shape[-2:] != (self.input_size, self.input_size):
            images = nn.functional.interpolate(images, (self.input_size, self.input_size), mode="bilinear", align_corners=False)
        with at_rest(self):
            logits = logits_of(self._run(self.normalize(images)), self.num_classes)
        return logits if logits.dtype == images.dtype else logits.to(images.dtype)

    def _run(self, normalized: Tensor) -> Any:
        """The classifier's own output."""
        return answer_of(self.classifier, normalized)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Sigmoid (multi-label) or softmax (single-label) of logits ``[B,K]``."""
        return logits.sigmoid() if self.task == "multilabel" else logits.softmax(dim=1)

    def fingerprint(self) -> str:
        """SHA-256 (first 16 hex digits) over the classifier's state, task, classes and normalisation."""
        state = {**self.classifier.state_dict(), "explanandum.mean": self.mean, "explanandum.std": self.std}
        return state_digest(state, repr((self.task, self.num_classes, self.input_size)))

    def require_fingerprint(self, expected: str, source: str) -> None:
        """Raise :class:`FingerprintMismatchError` unless this classifier is the one that ``source`` was made for."""
        actual = self.fingerprint()
        if actual != expected:
            raise FingerprintMismatchError(
                f"{source} was made for the classifier with fingerprint {expected}, but the classifier given has {actual}. "
                "Load the classifier it was trained with, or train again for this one."
            )
