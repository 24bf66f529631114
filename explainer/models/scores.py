"""The logits in what a classifier returns: a tensor, a tuple, a dict, named outputs, a Hugging Face ModelOutput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from explainer.errors import ShapeError

_NAMES = ("logits", "output", "out", "scores", "prediction", "predictions")
#: Weight of an auxiliary head's loss by the number of such heads: GoogLeNet's two (Szegedy et al. 2015, section 5), Inception-v3's one.
AUXILIARY_WEIGHTS = {1: 0.4, 2: 0.3}


def logits_of(output: Any, num_classes: int) -> Tensor:
    """The logits ``[B,K]``.

    Taken in this order: a tensor itself (``[B]`` counts as ``[B,1]``); the field or key ``logits`` (or another usual name); the first
    tensor ``[B,K]`` of a sequence or mapping.

    Raises:
        ShapeError: there is none, or it has another number of classes.
    """
    found = _find(output, num_classes)
    if found is not None and found.ndim == 1 and num_classes == 1:
        found = found[:, None]
    if found is None or found.ndim != 2 or found.shape[1] != num_classes:
        raise ShapeError(f"the classifier returned {_described(output)}, expected logits (B,{num_classes}); {_remedy(found, num_classes)}")
    return found


def auxiliary_logits(output: Any, num_classes: int) -> list[Tensor]:
    """The other heads' logits that a network returns in training: fields or keys ``aux...`` that are ``[B,K]``, as GoogLeNet, Inception
    and torchvision's dictionaries have them.
    """
    fields: Mapping[str, Any] = output if isinstance(output, Mapping) else getattr(output, "_asdict", dict)()
    return [v for k, v in fields.items() if str(k).startswith("aux") and isinstance(v, Tensor) and v.shape[1:] == (num_classes,)]


def _find(output: Any, num_classes: int) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    for name in _NAMES:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values = list(output.values()) if isinstance(output, Mapping) else list(output) if isinstance(output, Sequence) else []
    fitting = [v for v in values if isinstance(v, Tensor) and v.shape[1:] == (num_classes,)]
    return fitting[0] if fitting else next((v for v in values if isinstance(v, Tensor)), None)


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with {', '.join(str(k) for k in output) or 'nothing'}"
    return type(output).__name__


def _remedy(found: Tensor | None, num_classes: int) -> str:
    if found is not None and num_classes == 2 and found.shape[1:] in ((), (1,)):
        return (
            "one logit for two classes: explain it with num_classes=1 and task='multilabel', or wrap the model in "
            "explainer.models.scores.TwoClasses (class 0: against, class 1: for)."
        )
    return "check num_classes or wrap the model."


class TwoClasses(nn.Module):
    """A binary classifier with one logit ``z`` as one with two classes: logits ``(-z/2, z/2)``, whose softmax is ``sigmoid(-z)`` and
    ``sigmoid(z)``. Evidence for one class is evidence against the other.

    Args:
        classifier: normalised images -> ``[B]`` or ``[B,1]``.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B,C,H,W]`` -> logits ``[B,2]``."""
        logit = logits_of(self.classifier(images), 1)
        return torch.cat([-logit / 2, logit / 2], dim=1)
