"""Targets without labels: the classifier's own decisions. What is explained is the classifier, not whoever annotated the images."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from explainer.data.datamodule import DataModule
from explainer.errors import ConfigError
from explainer.files import parse_json, write_text
from explainer.metrics.classifier import predicted_classes
from explainer.models.explanandum import Explanandum

log = logging.getLogger(__name__)

CONFIDENT = 0.5  # probability from which a decision counts as confident in what is said at start


@dataclass(frozen=True)
class Decisions:
    """What the classifier sees in the images of a split.

    Attributes:
        classes: the predicted class indices of each image, the most probable first; empty for an image without any, and for one that
            could not be read (``on_error: skip``), which training leaves out by itself.
        confident: share of the images whose most probable class has a probability of at least :data:`CONFIDENT`.
    """

    classes: list[tuple[int, ...]]
    confident: float


def decide(logits: Tensor, task: str, top: int = 1, threshold: float = 0.5) -> list[tuple[int, ...]]:
    """The predicted classes of each image, the most probable first.

    Args:
        logits: ``[B,K]``.
        task: ``multiclass``: the ``top`` most probable classes; ``multilabel``: all with a probability of at least ``threshold``.
        top: number of classes of an image, single-label only.
        threshold: least probability of a predicted class, multi-label only; see :func:`~explainer.metrics.classifier.predicted_classes`.
    """
    if task == "multiclass":
        return [tuple(row) for row in logits.topk(min(top, logits.shape[1]), dim=1).indices.tolist()]
    order = logits.argsort(dim=1, descending=True, stable=True)
    seen = predicted_classes(logits, task, threshold, at_least_one=False)
    return [tuple(k for k in ranked if seen[i, k]) for i, ranked in enumerate(order.tolist())]


@torch.no_grad()
def predict_targets(
    explanandum: Explanandum, data: DataModule, split: str, *, top: int = 1, threshold: float = 0.5, folder: str | Path | None = None
) -> Decisions:
    """Ask the classifier about every unaugmented image of a split.

    Args:
        explanandum: the classifier.
        data: whose images; they are shown without augmentation.
        split: train, val or test.
        top, threshold: the rule for predicted classes; see :func:`decide`.
        folder: where the answers are kept; answers of the same classifier for the same images are read from there. None keeps none.

    Raises:
        ConfigError: ``top`` or ``threshold`` is out of range.
    """
    if not 1 <= top <= explanandum.num_classes or not 0 < threshold < 1:
        raise ConfigError(f"data.top must lie in 1..{explanandum.num_classes} and data.threshold in (0,1), received {top} and {threshold}.")
    dataset = data.dataset(split)
    explanandum.eval()
    key = {"classifier": explanandum.fingerprint(), "data": dataset.fingerprint(), "top": top, "threshold": threshold}
    file = None if folder is None else Path(folder) / f"predicted_{split}.json"
    known = _read(file, key, len(dataset))
    if known is not None:
        return known
    names = [dataset.sample_id(i) for i in range(len(dataset))]
    answers: dict[str, tuple[int, ...]] = {}
    confident = seen = 0
    device = next((p.device for p in explanandum.parameters()), torch.device("cpu"))
    plain = data.unaugmented() if split == "train" else data
    whole = plain.dataset(split)  # an evaluation's split may have been cut to a sample, which these images have not
    there = {whole.sample_id(i): i for i in range(len(whole))}
    own = [there[name] for name in names]
    parts = [own[i : i + data.eval_batch_size] for i in range(0, len(own), data.eval_batch_size)]
    for batch in plain.batches(split, parts):
        logits = explanandum(batch.images.to(device)).float()
        answers.update(zip(batch.ids, decide(logits, explanandum.task, top, threshold), strict=True))
        seen += len(batch)
        confident += int((explanandum.probabilities(logits).amax(dim=1) >= CONFIDENT).sum())
    classes = [answers.get(name, ()) for name in names]
    found = Decisions(classes, confident / max(1, seen))
    if file is not None and seen == len(dataset):
        content = {"key": key, "classes": classes, "confident": found.confident}
        write_text(file, json.dumps({**content, "digest": _digest(content)}), durable=False)
    return found


def _read(file: Path | None, key: dict[str, object], number: int) -> Decisions | None:
    """The answers in a file, if they are this classifier's for these images."""
    if file is None or not file.is_file():
        return None
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
        if content.pop("digest") != _digest(content) or content["key"] != key:
            return None  # bits have changed, or it is of another classifier or data set
        classes = [tuple(row) for row in content["classes"]]
        return Decisions(classes, content["confident"]) if len(classes) == number else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # cut short or of another version: asked again


def _digest(content: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def use_predicted_targets(
    explanandum: Explanandum,
    data: DataModule,
    splits: Sequence[str],
    *,
    top: int = 1,
    threshold: float = 0.5,
    folder: str | Path | None = None,
) -> None:
    """From here on the images of these splits carry the classifier's decisions as their targets; says how confident they are.

    Args:
        explanandum: the classifier.
        data: whose images.
        splits: names of the splits.
        top, threshold, folder: the rule for predicted classes, and where they are kept; see :func:`predict_targets`.
    """
    for split in splits:
        found = predict_targets(explanandum, data, split, top=top, threshold=threshold, folder=folder)
        data.set_targets(split, found.classes)
        empty = sum(not row for row in found.classes)
        log.warning(
            "%s: targets are the classifier's decisions for %d images, %d different classes; %.0f %% with a probability of at least %.1f%s",
            split,
            len(found.classes),
            len({k for row in found.classes for k in row}),
            100 * found.confident,
            CONFIDENT,
            f"; {empty} without any class" if empty else "",
        )
