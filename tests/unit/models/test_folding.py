"""Batch norms folded into convolutions: equal answers and gradients, and the classifier left as it was."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from explainer import Explanandum
from explainer.models.folding import folded


def trained(classifier: nn.Module, classes: int = 5) -> Explanandum:
    """With batch statistics that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(1)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            if module.weight is not None:
                module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
    return Explanandum(classifier, classes, "multiclass")


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


FAMILIES = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=5),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=5),
    "tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),  # convolutions padded to "same"
    "densenet121": lambda: torchvision.models.densenet121(num_classes=5),  # most norms come before their convolution
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_input_gradients_are_those_of_the_classifier(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        e = trained(FAMILIES[name]().double())  # rounding would move maxima of a pooling window
    before = copy.deepcopy(e.state_dict())
    other = folded(e, images().double())
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in x.modules()) for x in (e, other)]
    assert norms[1] < norms[0] and (norms[1] == 0 or name == "densenet121")
    found = []
    for network in (e, other):
        x = images().double().requires_grad_()
        logits = network(x)
        logits[:, 0].sum().backward()
        found.append((logits.detach(), x.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9 * float(theirs.abs().max()))
    after = e.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert e.fingerprint() == trained(copy.deepcopy(e.classifier)).fingerprint()


class Forked(nn.Module):
    """The convolution's output is read twice: once through the norm, and once as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv(x)
        return self.head((self.norm(a) + a).mean((2, 3)))


class Twice(nn.Module):
    """One convolution in front of two norms, as a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms, self.head = nn.Conv2d(3, 4, 3), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2)), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(norm(self.conv(x)) for norm in self.norms).mean((2, 3)))


class NoStatistics(nn.Sequential):
    """Its norms normalise by the batch at hand also in eval mode."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(4 * 30 * 30, 5))


def test_float32_answers_are_equal_enough_to_be_taken() -> None:
    e = trained(FAMILIES["tf_efficientnet_lite0"]())
    assert folded(e, images()) is not e


@pytest.mark.parametrize("make", [Forked, Twice, NoStatistics, lambda: torchvision.models.vgg11(num_classes=5)])
def test_where_folding_would_change_the_answer_or_is_nothing_the_classifier_itself_is_taken(make) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        e = trained(make())
    assert folded(e, images()) is e


def test_a_compiled_classifier_is_left_to_its_compiler() -> None:
    e = trained(torchvision.models.resnet18(num_classes=5))
    e.classifier.compile()
    assert folded(e, images()) is e
