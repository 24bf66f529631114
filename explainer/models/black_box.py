"""Classifiers that give scores only: a Python function, a service behind an API, an ONNX file. They look like an Explanandum.

No gradient flows through them. What still works: the losses ``coalition``, ``ranking`` and ``distillation`` with the terms that look at
masks alone (area_bound, total_variation, ...), the methods without gradients (rise, occlusion, ...), and every evaluation of masked images.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explainer.errors import CheckpointError, ConfigError, NumericalError, QueryBudgetError, ShapeError, UnknownNameError
from explainer.models.explanandum import IMAGENET_MEAN, IMAGENET_STD, Explanandum, Task
from explainer.models.response_cache import ResponseCache

Scores = Literal["logit", "probability"]


class ScoreFunction(Protocol):
    """What a black box has to be: images ``[B,C,H,W]`` float32 (tensor on the CPU) -> scores ``[B,K]`` (tensor or array)."""

    def __call__(self, images: Tensor, /) -> Any:
        """Scores of a batch."""


class Questions(nn.Module):
    """Stands where an Explanandum has its classifier: asks the function about each new image once, within a budget.

    Args:
        function: the score function; see :class:`ScoreFunction`.
        identity: the function's name in messages.
        task, scores, batch_size, budget, cache: as for :class:`BlackBox`.

    Attributes:
        queries: images that this process has asked about so far.
    """

    def __init__(
        self,
        function: ScoreFunction,
        identity: str,
        *,
        task: Task,
        scores: Scores,
        batch_size: int,
        budget: int | None,
        cache: ResponseCache,
    ) -> None:
        super().__init__()
        self.function, self.identity, self.task, self.scores = function, identity, task, scores
        self.batch_size, self.budget, self.cache = batch_size, budget, cache
        self.queries = 0

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``[B,C,H,W]`` -> logits ``[B,K]`` on the images' device.

        Raises:
            NumericalError: an answer is NaN or infinite; it is not stored.
            QueryBudgetError: the budget does not cover the images that are not in the cache; none of them was asked about.
        """
        known = images.detach().float().cpu().contiguous()
        keys = [self.cache.key(image) for image in known]
        answers: dict[str, Tensor] = {}
        missing: dict[str, int] = {}
        for row, key in enumerate(keys):
            if key in answers or key in missing:
                continue
            scores = self.cache.get(key)
            if scores is None:
                missing[key] = row
            else:
                answers[key] = scores
        todo = list(missing)
        if todo and not self.cache.pay(len(todo), self.budget):
            raise QueryBudgetError(
                f"the query budget of {self.identity} is used up: {self.cache.paid()} of {self.budget} images asked about, {len(todo)} "
                "more wanted. Raise classifier.options.budget, keep answers in classifier.options.cache_file, or ask less "
                "(losses.coalition.coalitions, fewer epochs)."
            )
        asked = 0
        try:
            for start in range(0, len(todo), self.batch_size):
                part = todo[start : start + self.batch_size]
                asked += len(part)
                self.queries += len(part)
                scores = torch.as_tensor(self.function(known[[missing[key] for key in part]])).detach().float().cpu()
                if scores.ndim != 2 or len(scores) != len(part):
                    raise ShapeError(f"{self.identity} returned {tuple(scores.shape)} for {len(part)} images, expected scores (B,K).")
                if not bool(torch.isfinite(scores).all()):  # kept for good, they would poison all later runs
                    bad = int((~torch.isfinite(scores).all(dim=1)).nonzero()[0])
                    raise NumericalError(
                        f"{self.identity} answered {scores[bad].tolist()[:8]} for image {start + bad} of {len(todo)}: scores must be "
                        "finite. Nothing of this answer was stored; correct the function or the service behind it."
                    )
                self.cache.put(part, scores)
                answers.update(zip(part, scores, strict=True))
        finally:
            if asked < len(todo):  # the function failed: the rest was never sent
                self.cache.pay(asked - len(todo))
        return self._logits(torch.stack([answers[key] for key in keys])).to(images)

    def _logits(self, scores: Tensor) -> Tensor:
        if self.scores == "logit":
            return scores
        # Double precision: the logit of 1 - 1e-7 is lost in float32.
        p = scores.double().clamp(1e-12, 1.0)
        return torch.logit(p, eps=1e-12) if self.task == "multilabel" else p.log()


class BlackBox(Explanandum):
    """A classifier known by its scores alone, with the interface of an :class:`Explanandum`.

    Args:
        function: the score function; see :class:`ScoreFunction`.
        num_classes, task, class_names, input_size: as for :class:`Explanandum`.
        mean, std: the normalisation; the mean is also the colour that replaces removed pixels.
        normalize: the function takes normalised images; False: images in [0,1].
        scores: what it returns; probabilities (sigmoid, or softmax for multiclass) are turned into logits.
        identity: text that stands for the classifier in fingerprints; give it a new one when the model behind the function changes.
            Default: the function's ``identity`` attribute, or its module and name.
        batch_size: most images per call.
        cache_size, cache_file: answers kept in memory, and the file that keeps them; see :class:`ResponseCache`.
        budget: most images that may be asked about (answers from the cache are free), or None. With ``cache_file`` what earlier starts
            and other processes have asked counts; without, every process and every start has the budget anew.
    """

    differentiable: ClassVar[bool] = False

    def __init__(
        self,
        function: ScoreFunction,
        num_classes: int,
        *,
        task: Task = "multilabel",
        mean: float | Sequence[float] = IMAGENET_MEAN,
        std: float | Sequence[float] = IMAGENET_STD,
        class_names: Sequence[str] | None = None,
        input_size: int | None = None,
        normalize: bool = False,
        scores: Scores = "logit",
        identity: str | None = None,
        batch_size: int = 64,
        cache_size: int = 4096,
        cache_file: str | None = None,
        budget: int | None = None,
    ) -> None:
        if scores not in ("logit", "probability"):
            raise ConfigError(f"classifier.options.scores must be logit or probability, received {scores!r}.")
        if batch_size < 1 or (budget is not None and budget < 0):
            raise ConfigError(f"batch_size must be at least 1 and budget at least 0, received {batch_size} and {budget}.")
        self.identity = identity or getattr(function, "identity", None) or _name_of(function)
        self.takes_normalized, self.kind_of_scores = normalize, scores
        cache = ResponseCache(cache_size, cache_file, repr((self.identity, normalize, scores)))
        asked = Questions(function, self.identity, task=task, scores=scores, batch_size=batch_size, budget=budget, cache=cache)
        super().__init__(asked, num_classes, task, mean=mean, std=std, class_names=class_names, input_size=input_size)

    @property
    def queries(self) -> int:
        """Images that this process has asked about so far."""
        return int(self.classifier.queries)  # type: ignore[arg-type]

    def normalize(self, images: Tensor) -> Tensor:
        """What the function is given: normalised images, or the images themselves."""
        return super().normalize(images) if self.takes_normalized else images

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B,C,H,W]`` in [0,1] -> logits ``[B,K]``, without a graph.

        Raises:
            ConfigError: a gradient through the classifier was asked for.
            QueryBudgetError: see :class:`Questions`.
        """
        if torch.is_grad_enabled() and images.requires_grad:
            raise ConfigError(
                f"{self.identity} gives scores only, and a gradient through it was asked for. Train with losses coalition or distillation "
                "(and terms that look at masks alone), explain with methods without gradients (rise, occlusion)."
            )
        return super().forward(images)

    def fingerprint(self) -> str:
        """16 hex digits over the identity, task, classes and normalisation (weights cannot be seen)."""
        plain = (self.identity, self.task, self.num_classes, self.input_size, self.takes_normalized, self.kind_of_scores)
        return hashlib.sha256(repr((*plain, self.mean.tolist(), self.std.tolist())).encode()).hexdigest()[:16]


def _name_of(function: Any) -> str:
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}:{owner.__qualname__}"


class OnnxScores:
    """An ONNX file as a score function, run by onnxruntime when it is first asked.

    Args:
        path: the file; its first input takes ``[B,C,H,W]``.
        output: name of the output with the scores; default the first.
        threads: number of threads in one call; None lets onnxruntime choose.
        providers: execution providers of onnxruntime.

    Attributes:
        identity: hash of the file's content.
    """

    def __init__(
        self, path: str | Path, output: str | None = None, threads: int | None = None, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> None:
        self.path, self.output, self.threads, self.providers = Path(path), output, threads, list(providers)
        if not self.path.is_file():
            raise CheckpointError(f"ONNX file {path} does not exist. Check classifier.arch (onnx:PATH).")
        self.identity = f"onnx:{hashlib.sha256(self.path.read_bytes()).hexdigest()[:16]}"
        self._session: Any = None

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Images as the file wants them -> scores ``[B,K]``."""
        session = self._open()
        entry = session.get_inputs()[0]
        name = self.output or session.get_outputs()[0].name
        fixed = entry.shape[0] if isinstance(entry.shape[0], int) else None
        dtype = np.float16 if "float16" in entry.type else np.float64 if "double" in entry.type else np.float32
        array = images.numpy().astype(dtype)
        try:
            if fixed is None:
                return np.asarray(session.run([name], {entry.name: array})[0])
            return np.concatenate(
                [self._padded(session, entry.name, name, array[i : i + fixed], fixed) for i in range(0, len(array), fixed)]
            )
        except Exception as error:  # onnxruntime raises its own types
            raise ShapeError(
                f"{self.path} takes {entry.type} {entry.shape}, received {tuple(array.shape)} ({str(error).splitlines()[0][:200]}). "
                "Set classifier.input_size to the side the file was exported for."
            ) from error

    @staticmethod
    def _padded(session: Any, entry: str, output: str, part: NDArray[Any], fixed: int) -> NDArray[Any]:
        """One call of a file whose batch size is fixed."""
        full = np.concatenate([part, np.repeat(part[-1:], fixed - len(part), axis=0)])
        return np.asarray(session.run([output], {entry: full})[0])[: len(part)]

    def _open(self) -> Any:
        if self._session is None:
            try:
                import onnxruntime
            except ImportError as error:
                raise ConfigError(
                    f"classifier onnx:{self.path} needs onnxruntime ({error}): pip install 'explainer-net[export]'."
                ) from error
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # errors are raised
            if self.threads is not None:
                options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
            try:
                self._session = onnxruntime.InferenceSession(str(self.path), options, providers=self.providers)
            except Exception as error:  # onnxruntime raises its own types
                raise CheckpointError(f"{self.path} is not a model that onnxruntime can open ({str(error)[:200]}).") from error
        return self._session

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which cannot be copied: a copy opens its own."""
        return {**self.__dict__, "_session": None}


PREFIXES = ("onnx:", "callable:")


def is_black_box(arch: str) -> bool:
    """Whether ``classifier.arch`` names a classifier that gives scores only."""
    return arch.startswith(PREFIXES)


def build_black_box(arch: str, num_classes: int, options: dict[str, Any] | None = None, **kwargs: Any) -> BlackBox:
    """A black box from the configuration.

    Args:
        arch: ``onnx:PATH``, or ``callable:package.module:function``. A class is instantiated with ``options.arguments`` first.
        num_classes: number of classes K.
        options: keywords of :class:`BlackBox`; ``arguments`` are those of the class or of :class:`OnnxScores`.
        kwargs: task, mean, std, class_names, input_size.

    Raises:
        CheckpointError: no such file.
        UnknownNameError: the import path leads nowhere.
        ConfigError: an unknown option.
    """
    prefix, _, rest = arch.partition(":")
    chosen = dict(options or {})
    arguments = chosen.pop("arguments", {})
    try:
        if prefix == "onnx":
            return BlackBox(OnnxScores(rest, **arguments), num_classes, **kwargs, **chosen)
        function = _import(rest, arch)
        if inspect.isclass(function) or arguments:
            function = function(**arguments)
        return BlackBox(function, num_classes, **kwargs, **chosen)
    except TypeError as error:
        raise ConfigError(f"classifier {arch!r} could not be built with options {options}: {error}") from error


def _import(path: str, arch: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownNameError(
            f"classifier {arch!r} cannot be imported ({error}): write callable:package.module:function and check PYTHONPATH."
        ) from error
