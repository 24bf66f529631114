"""Images of four colours, and a classifier whose features are the colours themselves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

#: Red, green, yellow (45 degrees from both), black.
QUADRANTS = ((200, 0, 0), (0, 200, 0), (200, 200, 0), (0, 0, 0))


class Colors(nn.Module):
    """Features are the mean colours of 2 x 2 pixels; ``act`` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 2, stride=2, bias=False, groups=3))
        self.act, self.unused, self.head = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1), nn.Linear(3, 3)
        with torch.no_grad():
            self.features[0].weight.copy_(torch.eye(3)[:, :, None, None])
            self.features[1].weight.fill_(0.25)

    def forward(self, images: Tensor) -> Tensor:
        x = self.act(self.features(images))
        return self.head(self.act(x + x).mean(dim=(2, 3)))


def quadrants(shift: int = 0, side: int = 8) -> np.ndarray:
    """``[side,side,3]`` uint8: the colours row by row, moved on by ``shift``."""
    colors = [QUADRANTS[(k + shift) % 4] for k in range(4)]
    small = np.array(colors, dtype=np.uint8).reshape(2, 2, 3)
    return small.repeat(side // 2, axis=0).repeat(side // 2, axis=1)
