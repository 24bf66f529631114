"""Weights of layers: by hand, and which layer a linear classifier can read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explainer.baselines import build
from explainer.baselines.layer_weights import layer_weights
from explainer.errors import ConfigError, ShapeError
from explainer.models.explanandum import Explanandum


class Blind(nn.Module):
    """Its first layer shows the brightness; its second only the first pixel's noise."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.noise, self.head = nn.Identity(), nn.Identity(), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.seen(x)
        return self.head(self.noise(x[:, :, :1, :1].expand_as(x)).mean((2, 3)))


def data(number: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % 2
    images = 0.3 + 0.4 * labels.view(-1, 1, 1, 1) + 0.1 * torch.rand(number, 3, 8, 8, generator=generator)
    images[:, :, 0, 0] = torch.rand(number, 3, generator=generator)
    return images, labels


def test_spread_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)
    )
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([[1.0, 0, 0], [0, 2.0, 0]])[:, :, None, None]
        net[1].weight[:] = torch.tensor([[1.0, 1.0]])[:, :, None, None]
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0], images[1, 1] = 0.2, 0.4
    # Layer 0: means (0, 0) and (0.2, 0.8), each (0.1, 0.4) from their mean: 0.5 / 2 channels. Layer 1: 0 and 1, each 0.5 from it.
    weights = layer_weights(Explanandum(net, 2, mean=0.0, std=1.0), ["0", "1"], "spread", images=images)
    assert weights == pytest.approx([0.25 / 0.75, 0.5 / 0.75])


def test_accuracy_is_that_of_the_layer_that_can_be_read() -> None:
    model = Explanandum(Blind(), 2, mean=0.0, std=1.0)
    images, labels = data()
    first, second = layer_weights(model, ["seen", "noise"], "accuracy", images=images, labels=labels)
    assert first + second == pytest.approx(1)
    accuracy = second / first  # the first layer's accuracy is 1
    assert 0.2 < accuracy < 0.8 and (accuracy * 40) == pytest.approx(round(accuracy * 40)), "a share of 40 images, near chance"
    assert layer_weights(model, ["seen", "noise"], "accuracy", images=images, labels=labels) == [first, second]
    assert not any(p.grad is not None for p in model.parameters())


def test_fixed_weights_and_refusals() -> None:
    model = Explanandum(Blind(), 2, mean=0.0, std=1.0)
    assert layer_weights(model, ["seen", "noise"], "uniform") == [0.5, 0.5]
    assert layer_weights(model, ["seen", "noise", "head"], "linear") == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    images, labels = data()
    for arguments, given, error, words in (
        ((["seen"], "best"), {}, ConfigError, "kind must be one of"),
        (([], "linear"), {}, ConfigError, "at least one layer"),
        ((["seen"], "spread"), {}, ConfigError, "give images="),
        ((["seen"], "accuracy"), {"images": images}, ConfigError, "and labels="),
        ((["nothing"], "spread"), {"images": images}, ConfigError, "nothing"),
        ((["seen"], "accuracy"), {"images": images[:4], "labels": labels[:4]}, ShapeError, "at least 5"),
        ((["seen"], "spread"), {"images": images[:1]}, ConfigError, "no layer tells"),
    ):
        with pytest.raises(error, match=words):
            layer_weights(model, *arguments, **given)  # type: ignore[arg-type]


def test_norm_grad_takes_them() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    model = Explanandum(net, 2, mean=0.5, std=0.5)
    images, _ = data(6)
    weights = layer_weights(model, ["1", "3"], "spread", images=images)
    both = build("norm_grad", model, layer=["1", "3"], weights=weights, combine="mean")(images, 0)
    even = build("norm_grad", model, layer=["1", "3"], combine="mean")(images, 0)
    assert weights[0] != weights[1] and not torch.allclose(both, even)
