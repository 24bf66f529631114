"""The occlusion that follows the classifier in training: it covers the evidence and leaves the network as it was."""

from __future__ import annotations

import torch
from torch import nn

from explainer.config import ClassifierConfig, OcclusionConfig
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.draws import Draws
from explainer.tasks.optim import steps
from explainer.tensors import Batch


class Red(nn.Module):
    """Class 0: red, class 1: green; a norm whose statistics would drift in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[0, 0], self.conv.weight[1, 1] = 1.0, 1.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)).relu().mean((2, 3))


def batch() -> Batch:
    """A red and a green square in each of three images; the first is labelled red, the second green, the third nothing."""
    images = torch.zeros(3, 3, 56, 56)
    images[:, 0, 4:18, 8:22] = 1.0
    images[:, 1, 36:50, 30:44] = 1.0
    return Batch(images, torch.tensor([[1.0, 0], [0, 1], [0, 0]]), None, None, ("a", "b", "c"), None, (0, 0, 0))


def test_the_square_covers_the_label_and_the_network_is_left_alone() -> None:
    occlusion = OcclusionConfig(probability=1.0, kind="saliency", side=0.25, jitter=0.0, layer="norm")
    config = ClassifierConfig(arch="small_vgg", options={"widths": [4, 8]}, mean=[0.0] * 3, std=[1.0] * 3, occlusion=occlusion)
    task = ClassifyTask(config, 2, "multilabel", ("red", "green"))
    net = Red()
    task._occluder.classifier = net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    given = batch()
    masks = task._occluder(given, Draws(0, 0, given))
    removed = 1 - masks
    assert removed.sum((1, 2)).tolist() == [196, 196, 0]
    assert (removed[0] * given.images[0, 0]).sum() > 150 and (removed[1] * given.images[1, 1]).sum() > 150
    assert net.training and net.norm.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any("occluder" in key for key in task.state_dict())
    shown, targets = task._occlude(given.images, given)
    assert torch.equal(targets, given.targets) and torch.equal(shown[2], given.images[2]) and not shown[0, 0, 6:16, 10:20].any()


def test_the_learning_rate_falls_at_30_60_and_90_percent() -> None:
    factors = [steps(t, 100) for t in (0, 29, 30, 59, 60, 89, 90, 100)]
    assert all(abs(a - b) < 1e-12 for a, b in zip(factors, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001], strict=True))
