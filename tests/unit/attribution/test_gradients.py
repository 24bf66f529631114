"""Classifiers whose gradients are missing or wrong are refused by name; sound ones, also odd ones, are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from explainer import Explanandum
from explainer.attribution.gradients import require_gradients
from explainer.baselines import build
from explainer.errors import NotDifferentiableError
from explainer.models.explainer import Explainer
from explainer.tasks.explain import ExplainTask
from explainer.tensors import Batch


class Net(nn.Module):
    """A small CNN whose features, head or branch are spoilt in one of several ways."""

    def __init__(self, spoilt: str) -> None:
        super().__init__()
        self.spoilt = spoilt
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
            self.branch = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 6, 3))
            self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.spoilt == "no_grad":
            with torch.no_grad():
                features = self.features(x)
        elif self.spoilt == "inference_mode":
            with torch.inference_mode():
                features = self.features(x)
            features = features.clone()
        else:
            features = self.features(x)
        if self.spoilt == "branch":
            features = features * 0.1 + self.branch(x.detach())
        if self.spoilt == "rounded":
            features = (features * 20).round() / 20
        pooled = features.mean((2, 3))
        if self.spoilt == "class":
            return self.head(pooled.detach()) + pooled.mean(1, keepdim=True)
        if self.spoilt == "nan":
            return self.head(pooled) + 0 * (x.flatten(1).sum(1, keepdim=True) * 0).sqrt()
        return self.head(pooled)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)).to(dtype)


SPOILT = {
    "no_grad": "no gradient",
    "inference_mode": "no gradient",
    "branch": "misses",
    "rounded": "0 everywhere",
    "class": "same for every class",
    "nan": "NaN",
}


@pytest.mark.parametrize(("spoilt", "words"), SPOILT.items())
@pytest.mark.parametrize("method", ["gradient", "meaningful_perturbation", "agf", "guided_backprop", "grad_cam"])
def test_methods_with_gradients_refuse_and_name_the_others(spoilt: str, words: str, method: str) -> None:
    model = Explanandum(Net(spoilt), 3, mean=0.4, std=0.3)
    with pytest.raises(NotDifferentiableError, match=rf"{method} needs gradients.*{words}.*rise, occlusion"):
        build(method, model)(images(), 1)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_methods_without_gradients_work(spoilt: str) -> None:
    model = Explanandum(Net(spoilt), 3, mean=0.4, std=0.3)
    maps = build("occlusion", model, window=4, stride=4)(images(), 1)
    assert maps.abs().max() > 0


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_training_is_refused_before_its_first_step(spoilt: str) -> None:
    task = ExplainTask(
        Explainer("vgg_unet", 3, {"widths": [8, 8], "decoder_channels": [8]}, stride=4),
        Explanandum(Net(spoilt), 3, mean=0.4, std=0.3),
        {"classification": {}, "area_bound": {"min_area": 0.1, "max_area": 0.5}},
    )
    batch = Batch(images(), torch.eye(3)[:2], ids=("a", "b"))
    with pytest.raises(NotDifferentiableError, match=r"losses\.classification needs gradients.*losses\.coalition"):
        task._explanation(batch, "train")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("net", ["sound", "saturated", "sharp", "leaky"])
def test_sound_classifiers_pass(net: str, dtype: torch.dtype) -> None:
    layers: list[nn.Module] = [nn.Conv2d(3, 6, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(294, 3)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for layer in layers:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    if net == "saturated":
        layers.append(nn.Sigmoid())
    if net == "sharp":
        layers[0].weight.data *= 100
    if net == "leaky":
        layers[2] = nn.GELU()
    model = Explanandum(nn.Sequential(*layers).to(dtype), 3, mean=0.4, std=0.3)
    for x in (images(), torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)):
        require_gradients(model, x, "a test")


def test_scores_that_say_nothing_are_not_judged() -> None:
    net = Net("sound")
    nn.init.zeros_(net.head.weight)
    require_gradients(Explanandum(net, 3), images(), "a test")
