"""Planted evidence in a trained vision transformer: every method for attention finds what the class depends on."""

from __future__ import annotations

import functools

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

import explainer
from explainer import plugins
from explainer.baselines import build

METHODS = plugins.discover("explainer.baselines")
SIDE, PATCH, PLANTED = 24, 4, 8
# A baseline of the papers: one weight a head is little to tell places apart with.
WEAK = {"attention_grad_cam"}


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``[n,3,H,W]`` of a random colour with noise and a patch of red, green or blue; its class ``[n]`` and area ``[n,H,W]``."""
    images = 0.2 + 0.6 * torch.rand(count, 3, 1, 1, generator=generator) + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    corners = torch.randint(SIDE // PATCH - PLANTED // PATCH + 1, (count, 2), generator=generator) * PATCH
    grid = torch.arange(SIDE)
    rows, columns = ((grid >= c[:, None]) & (grid < c[:, None] + PLANTED) for c in corners.T)
    area = rows[:, :, None] & columns[:, None]
    pure = functional.one_hot(labels, 3).float()[:, :, None, None]
    return torch.where(area[:, None], pure, images).clamp(0, 1), labels, area


@functools.cache
def trained() -> explainer.Explanandum:
    """A vision transformer that names the patch's colour; seconds of training."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VisionTransformer(
            img_size=SIDE, patch_size=PATCH, num_classes=3, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0, pos_embed="none"
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for _ in range(120):
            images, labels, _area = scenes(64, generator)
            optimizer.zero_grad()
            functional.cross_entropy(net((images - 0.5) / 0.25), labels).backward()
            optimizer.step()
    return explainer.Explanandum(net, 3, task="multiclass", mean=0.5, std=0.25)


def pointing(maps: Tensor, area: Tensor) -> float:
    """Share of the images whose map, averaged over 5 x 5 pixels, is greatest inside the area; constant maps miss."""
    smooth = functional.avg_pool2d(maps[:, None], 5, stride=1, padding=2, count_include_pad=False).flatten(1)
    constant = smooth.amax(1) == smooth.amin(1)
    hit = area.flatten(1).gather(1, smooth.argmax(1, keepdim=True))[:, 0]
    return (hit & ~constant).double().mean().item()


@pytest.mark.parametrize("name", sorted(n for n, c in METHODS.items() if c.needs_attention))
def test_finds_the_planted_evidence(name: str) -> None:
    images, labels, area = scenes(96, torch.Generator().manual_seed(1))
    classifier = trained()
    assert (classifier(images).argmax(1) == labels).double().mean() > 0.95
    found = pointing(build(name, classifier)(images, labels), area)
    by_chance = max(pointing(build(rival, classifier)(images, labels), area) for rival in ("centre", "random"))
    assert found > by_chance + (0.1 if name in WEAK else 0.3), (found, by_chance)
