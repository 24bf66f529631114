"""Training classifiers whose output is no plain tensor: auxiliary heads, dictionaries, tuples, named outputs."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explainer.config import ClassifierConfig
from explainer.models.classifiers import build_classifier
from explainer.tasks.classify import ClassifyTask
from explainer.tensors import Batch

Two = namedtuple("Two", ["logits", "aux_logits2", "aux_logits1"])
One = namedtuple("One", ["logits", "aux_logits"])


@dataclass
class ModelOutput:
    """As Hugging Face's."""

    loss: Any
    logits: Tensor


#: What a network makes of its three heads in training, and the weights with which the heads' losses count.
FORMS: dict[str, tuple[Any, tuple[float, float, float]]] = {
    "GoogLeNet": (lambda a, b, c: Two(a, b, c), (1, 0.3, 0.3)),
    "Inception-v3": (lambda a, b, c: One(a, b), (1, 0.4, 0)),
    "an auxiliary head that is switched off": (lambda a, b, c: Two(a, None, None), (1, 0, 0)),
    "dictionary": (lambda a, b, c: {"features": torch.zeros(len(a), 5), "logits": a, "aux": b}, (1, 0.4, 0)),
    "tuple": (lambda a, b, c: (a, b), (1, 0, 0)),
    "model output": (lambda a, b, c: ModelOutput(None, a), (1, 0, 0)),
}


class Heads(nn.Module):
    """Three linear heads on the mean colour; at rest the first alone, as torchvision's."""

    def __init__(self, num_classes: int, form: str) -> None:
        super().__init__()
        self.heads, self.form = nn.ModuleList(nn.Linear(3, num_classes) for _ in range(3)), FORMS[form][0]

    def forward(self, x: Tensor) -> Any:
        scores = [head(x.mean((2, 3))) for head in self.heads]
        return self.form(*scores) if self.training or self.form(*scores).__class__ in (dict, tuple, ModelOutput) else scores[0]


def task_of(arch: str, options: dict[str, Any], task: Any = "multiclass") -> ClassifyTask:
    return ClassifyTask(ClassifierConfig(arch=arch, options=options, mean=[0.0], std=[1.0]), 3, task, ("a", "b", "c"))


def batch(task: str = "multiclass", side: int = 8) -> Batch:
    images = torch.rand(4, 3, side, side, generator=torch.Generator().manual_seed(2))
    return Batch(images, torch.eye(3)[[0, 1, 2, 0]], ids=("w", "x", "y", "z"))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("form", FORMS)
def test_heads_count_with_the_papers_weights_in_training_and_not_afterwards(form: str, task: str) -> None:
    module = task_of("tests.unit.tasks.test_auxiliary_heads:Heads", {"form": form}, task).train()
    given = batch()
    loss = F.cross_entropy if task == "multiclass" else F.binary_cross_entropy_with_logits
    losses = [loss(head(given.images.mean((2, 3))), given.targets) for head in module.classifier.heads]
    expected = sum(weight * each for weight, each in zip(FORMS[form][1], losses, strict=True))
    torch.testing.assert_close(module._shared_step(given, "fit"), expected)
    module.eval()
    torch.testing.assert_close(module._shared_step(given, "val"), losses[0])
    assert module(given.images).shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "side", "heads", "weight"), [("googlenet", 64, 2, 0.3), ("inception_v3", 299, 1, 0.4)])
def test_torchvision_networks(arch: str, side: int, heads: int, weight: float) -> None:
    module = task_of(f"torchvision:{arch}", {"init_weights": False, "dropout": 0.0}).train()
    given = batch(side=side)
    torch.manual_seed(0)
    loss = module._shared_step(given, "fit")
    outputs = module.classifier(given.images)
    losses = [F.cross_entropy(scores, given.targets) for scores in outputs]
    assert len(losses) == 1 + heads
    if arch == "inception_v3":  # the other's auxiliary heads drop out at random
        torch.testing.assert_close(loss, losses[0] + weight * losses[1])
    loss.backward()
    trained = [p.grad is not None and bool(p.grad.abs().max() > 0) for n, p in module.classifier.named_parameters() if "weight" in n]
    assert all(trained)
    assert isinstance(build_classifier(f"torchvision:{arch}", 3, init_weights=False).eval()(given.images), Tensor)
