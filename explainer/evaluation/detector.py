"""A small network that tells two kinds of maps apart, trained on some images and asked about others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]
#: Share of the images that the network is trained on (4000 of 5000 in the paper).
_TRAIN = 0.8


def detection_accuracy(clean: Array, changed: Array, images: Sequence[int], epochs: int = 30, seed: int = 0) -> tuple[float, int]:
    """Accuracy on held-out images of telling ``clean`` from ``changed`` maps, and how many maps it was measured on.

    Three convolutions and a linear layer; SGD, learning rate 1e-2, momentum 0.9, weight decay 1e-4 (the paper trains an AlexNet so).
    Images are split, so that both maps of one image are on the same side.

    Args:
        clean, changed: ``[N,h,w]``; each map is brought to zero mean and unit deviation, so that no scale gives it away.
        images: number of each row's image.
        epochs: over the training images.
        seed: seed of the split, the first weights and the order.

    Returns:
        NaN and 0 with fewer than 10 images.
    """
    members = sorted(set(images))
    if len(members) < 10:
        return float("nan"), 0
    order = np.random.default_rng(seed).permutation(members)
    trained_on = set(order[: round(_TRAIN * len(members))].tolist())
    train = torch.tensor([i in trained_on for i in images] * 2)
    maps = torch.from_numpy(np.concatenate([clean, changed])).float()[:, None]
    maps = (maps - maps.mean((2, 3), keepdim=True)) / maps.std((2, 3), keepdim=True).clamp(min=1e-6)
    labels = torch.arange(2).repeat_interleave(len(clean))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(_block(1, 16), nn.MaxPool2d(2), _block(16, 32), nn.MaxPool2d(2), _block(32, 32), _head())
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-4)
        own, target = maps[train], labels[train]
        for _ in range(epochs):
            for part in torch.randperm(len(own)).split(32):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(own[part]), target[part]).backward()
                optimizer.step()
    with torch.no_grad():
        hits = net(maps[~train]).argmax(1) == labels[~train]
    return float(hits.double().mean()), len(hits)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


def _head() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(288, 2))
