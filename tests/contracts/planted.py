"""Small networks, one of each kind of classifier, that learn within seconds to name planted patches; and whether a map points at one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from explainer import Explanandum, baselines

SIDE, PLANTED, CLASSES = 64, 16, 3
_LATTICE = torch.arange(PLANTED)
#: One pattern a class: a red patch, a green and a blue one, each with a grating of its own.
_GRATINGS = torch.stack(
    [
        (_LATTICE[:, None] // 2 % 2).expand(PLANTED, PLANTED),
        (_LATTICE[None] // 2 % 2).expand(PLANTED, PLANTED),
        (_LATTICE[:, None] // 4 + _LATTICE[None] // 4) % 2,
    ]
).float()
PATCHES = 0.2 + (0.3 + 0.3 * _GRATINGS)[:, None] * torch.eye(3)[:, :, None, None]


def scenes(count: int, generator: torch.Generator, present: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Grey clouds with pixel noise, on which patches of some classes lie, at any place and one never on another.

    Args:
        count: n.
        generator: of all that is random.
        present: ``[n,K]`` bool, which classes an image has; None: each with probability 1/2, independently. So no class is known by the
            absence of the others.

    Returns:
        Images ``[n,3,H,W]`` in [0,1], labels ``[n,K]`` in {0,1}, areas of the patches ``[n,K,H,W]`` bool.
    """
    coarse = torch.rand(count, 1, 8, 8, generator=generator) - 0.5
    grey, contrast, noise = (
        0.25 + 0.5 * torch.rand(count, 1, 1, 1, generator=generator),
        0.5 * torch.rand(count, 1, 1, 1, generator=generator),
        0.15 * torch.rand(count, 1, 1, 1, generator=generator),
    )
    images = grey + contrast * functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)
    images = images + noise * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    if present is None:
        present = torch.rand(count, CLASSES, generator=generator) < 0.5
    areas = torch.zeros(count, CLASSES, SIDE, SIDE, dtype=torch.bool)
    for n, k in present.nonzero().tolist():
        free = False
        while not free:
            row, column = torch.randint(SIDE - PLANTED + 1, (2,), generator=generator).tolist()
            place = slice(row, row + PLANTED), slice(column, column + PLANTED)
            free = not bool(areas[n, :, place[0], place[1]].any())
        areas[n, k, place[0], place[1]] = True
        images[n, :, place[0], place[1]] = PATCHES[k]
    return images.clamp(0, 1), present.float(), areas


def vgg() -> nn.Module:
    """Torchvision's VGG with BatchNorm: three stages, mean, one linear layer."""
    net = models.VGG.__new__(models.VGG)
    nn.Module.__init__(net)
    net.features = make_layers([16, "M", 24, "M", 32, "M"], batch_norm=True)
    net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(32, CLASSES)
    return net


def resnet() -> nn.Module:
    """Torchvision's ResNet, its fourth stage empty: stride 16."""
    net = models.ResNet.__new__(models.ResNet)
    nn.Module.__init__(net)
    net._norm_layer, net.inplanes, net.dilation, net.groups, net.base_width = nn.BatchNorm2d, 16, 1, 1, 64
    net.conv1, net.bn1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16)
    net.relu, net.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
    net.layer1, net.layer2 = net._make_layer(BasicBlock, 16, 1), net._make_layer(BasicBlock, 24, 1, stride=2)
    net.layer3, net.layer4 = net._make_layer(BasicBlock, 32, 1), nn.Sequential()
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, CLASSES)
    return net


def efficientnet() -> nn.Module:
    """Torchvision's EfficientNet, with squeeze-and-excitation and SiLU: stride 8."""
    block = partial(MBConvConfig, num_layers=1, width_mult=1.0, depth_mult=1.0)
    return models.EfficientNet([block(1, 3, 1, 8, 8), block(4, 3, 2, 8, 16), block(4, 3, 2, 16, 24)], dropout=0.0, num_classes=CLASSES)


def convnext() -> nn.Module:
    """Torchvision's ConvNeXt with two stages, stride 8. Layer scale starts at 1: from 1e-6 a short training never leaves the start."""
    return models.ConvNeXt([CNBlockConfig(24, 32, 1), CNBlockConfig(32, None, 1)], layer_scale=1.0, num_classes=CLASSES)


def vit() -> nn.Module:
    """Timm's ViT with a class token and patches of 8 pixels."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=SIDE, patch_size=8, num_classes=CLASSES, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2.0)


def swin() -> nn.Module:
    """Torchvision's Swin with two stages, shifted windows of 4 x 4 patches of 4 pixels."""
    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], stochastic_depth_prob=0.0, num_classes=CLASSES
    )


#: By the family of the matrix (:data:`explainer.models.families.FAMILIES`) to which the network belongs: builder, steps, learning rate.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "VGG (torchvision)": (vgg, 120, 1e-2),
    "ResNet (torchvision)": (resnet, 150, 1e-2),
    "EfficientNet (torchvision)": (efficientnet, 200, 1e-2),
    "ConvNeXt (torchvision)": (convnext, 400, 3e-3),
    "ViT (timm)": (vit, 250, 2e-3),
    "Swin (torchvision)": (swin, 300, 2e-3),
}


@functools.cache
def trained(family: str) -> Explanandum:
    """The family's network after its training: AdamW, warm-up and cosine, batches of 32 new scenes."""
    build, steps, rate = NETWORKS[family]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build()
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
        for _ in range(steps):
            images, labels, _areas = scenes(32, generator)
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(net((images - 0.5) / 0.25), labels).backward()
            optimizer.step()
            schedule.step()
    return Explanandum(net.eval(), CLASSES, mean=0.5, std=0.25)


@functools.cache
def held_out(count: int, distractor: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Other scenes: images ``[n,3,H,W]``, a class of each ``[n]`` and its patch's area ``[n,H,W]``.

    Args:
        count: n.
        distractor: each image also has the patch of one other class, at which a map that is about the class must not point.
    """
    generator = torch.Generator().manual_seed(1)
    index = torch.arange(count) % CLASSES
    other = (index + torch.randint(1, CLASSES, (count,), generator=generator)) % CLASSES
    present = functional.one_hot(index, CLASSES).bool()
    if distractor:
        present = present | functional.one_hot(other, CLASSES).bool()
    images, _, areas = scenes(count, generator, present)
    return images, index, areas[torch.arange(count), index]


def _smooth(maps: Tensor) -> Tensor:
    return functional.avg_pool2d(maps[:, None].double(), 5, stride=1, padding=2, count_include_pad=False).flatten(1)


def pointing(maps: Tensor, areas: Tensor) -> float:
    """Share of the images whose map, averaged over 5 x 5 pixels, is greatest inside the area; constant maps miss."""
    smooth = _smooth(maps)
    constant = smooth.amax(1) == smooth.amin(1)
    hit = areas.flatten(1).gather(1, smooth.argmax(1, keepdim=True))[:, 0]
    return (hit & ~constant).double().mean().item()


def ranking(maps: Tensor, areas: Tensor) -> float:
    """Probability that a pixel inside the area ranks above one outside (pixel AUC), ties counting half; the mean over images."""
    found = []
    for values, area in zip(_smooth(maps), areas.flatten(1), strict=True):
        ranks = torch.searchsorted(values.sort().values, values) + torch.searchsorted(values.sort().values, values, right=True)
        inside = int(area.sum())
        found.append((ranks[area].double().sum() / 2 - inside * inside / 2) / (inside * int((~area).sum())))
    return float(torch.stack(found).mean())


#: Options under which the slow methods take seconds, and a fill that hides the evidence: a blurred patch still has its colour.
OPTIONS: dict[str, dict[str, Any]] = {
    "extremal_perturbation": {"areas": (PLANTED**2 / SIDE**2,), "perturbation": "constant"},
    "gradient_shap": {"samples": 8},
    "igos": {"size": 16, "iterations": 6, "points": 8, "fill": "mean"},
    "igos_pp": {"size": 16, "iterations": 6, "points": 8, "fill": "mean"},
    "integrated_gradients": {"steps": 16},
    "meaningful_perturbation": {"iterations": 100, "perturbation": "constant"},
    "occlusion": {"window": 8, "stride": 4},
    "rise": {"n_masks": 500, "grid": 8, "p": 0.3},
    "smooth_grad": {"samples": 8},
}


#: Maps that no method makes, and by how much a method must be better than two of them, in the pointing game or as a ranking of pixels.
SANITY = {"centre", "constant", "edges", "ground_truth", "random"}
MARGIN = 0.1


@dataclass(frozen=True)
class Found:
    """How well a method's maps point at planted evidence.

    Attributes:
        pointing: see :func:`pointing`.
        ranking: see :func:`ranking`.
    """

    pointing: float
    ranking: float

    def beats(self, rivals: Iterable[Found], by: float) -> bool:
        """Whether it is better than every rival by a margin, in the pointing game or as a ranking of pixels."""
        rivals = list(rivals)
        return all(self.pointing >= r.pointing + by for r in rivals) or all(self.ranking >= r.ranking + by for r in rivals)


@functools.cache
def found(name: str, family: str, count: int = 36) -> Found:
    """What a method finds on the family's trained network, with another class's patch in the image if it says that it knows classes."""
    method = baselines.build(name, trained(family), **OPTIONS.get(name, {}))
    images, index, areas = held_out(count, method.class_specific)
    maps = method(images, index)
    return Found(pointing(maps, areas), ranking(maps, areas))


@functools.cache
def rivals(name: str, family: str, count: int = 36) -> tuple[Found, Found]:
    """The centre's map and a random one, on the images that the method was asked about."""
    images, index, areas = held_out(count, baselines.build(name, trained(family), **OPTIONS.get(name, {})).class_specific)
    chance = [baselines.build(rival, trained(family))(images, index) for rival in ("centre", "random")]
    return Found(pointing(chance[0], areas), ranking(chance[0], areas)), Found(pointing(chance[1], areas), ranking(chance[1], areas))
