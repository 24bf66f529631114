"""Tiny networks and data for the tests of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from explainer.attribution import Attributor, DenseAttributor
from explainer.data.datamodule import DataModule
from explainer.evaluation.protocol import Protocol, parse_protocols
from explainer.evaluation.runner import Runner, Settings
from explainer.evaluation.scene import Method
from explainer.models.explanandum import Explanandum

NAMES = ("stripes", "checks", "dots")


def explanandum(seed: int = 0, task: str = "multilabel") -> Explanandum:
    """A random net of 3 classes on 32 px images."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return Explanandum(net, 3, task, class_names=NAMES)  # type: ignore[arg-type]


def data(**options: Any) -> DataModule:
    """``shapes`` at 32 px."""
    return DataModule("shapes", 4, options={"size": 32, "class_names": list(NAMES), "length": 12, **options})


class Brightness(Attributor):
    """``class + 1`` times the image's mean channel, and a count of the images it was asked about."""

    name: ClassVar[str] = "brightness"
    num_classes = 3

    def __init__(self) -> None:
        self.asked: list[int] = []

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        self.asked.append(len(images))
        return images.mean(1) * (class_index + 1)[:, None, None] / 3


class Noise(Attributor):
    """Random numbers from the generator alone."""

    name: ClassVar[str] = "noise"
    deterministic = False
    num_classes = 3

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        return torch.rand(images.shape[-2:], generator=generator).expand(len(images), -1, -1)


class Dense(DenseAttributor):
    """Channel k shows colour channel k."""

    name: ClassVar[str] = "dense"
    num_classes = 3

    def _explain_all(self, images: Tensor) -> Tensor:
        return images.clone()


def method(label: str, attributor: Attributor | DenseAttributor | None = None, **kwargs: Any) -> Method:
    """A method that is identified by its label."""
    return Method(label, attributor or Brightness(), {"name": label}, **kwargs)


def runner(out: Path, methods: list[Method], protocols: list[Any] | dict[str, Protocol], **settings: Any) -> Runner:
    """A runner on the tiny net and data."""
    built = parse_protocols(protocols, "corrected") if isinstance(protocols, list) else protocols
    return Runner(methods, built, explanandum(), data(), Settings(out, **{"batch_size": 4, "limit": 10, **settings}))
