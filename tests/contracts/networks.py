"""Tiny classifiers for the contract suites: milliseconds in float64, with the layers that methods treat differently."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import VisionTransformer as TorchvisionVisionTransformer

import explainer

CLASSES = 3


class TinyVGG(nn.Module):
    """Two convolution blocks with in-place ReLUs and two linear layers, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(nn.Linear(8 * 16, 10), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(10, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class Block(nn.Module):
    """Residual block without bottleneck; each ReLU is a module of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(x + self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))


class TinyResNet(nn.Module):
    """Stem, one residual block, global average pooling, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Block(6))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Gate(nn.Module):
    """A product of two activations: no relevance rule covers it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cos(self.conv(x))


class Gated(TinyVGG):
    """TinyVGG with a gate between its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.features.insert(3, Gate(6))


class TinyViT(VisionTransformer):
    """timm's vision transformer: 16 patches, a class token, two blocks with biases."""

    def __init__(self) -> None:
        super().__init__(img_size=16, patch_size=4, num_classes=CLASSES, embed_dim=12, depth=2, num_heads=2, mlp_ratio=2.0)


class TinyTorchvisionViT(TorchvisionVisionTransformer):
    """The same sizes in torchvision, whose attention is torch's own module."""

    def __init__(self) -> None:
        super().__init__(image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=24, num_classes=CLASSES)


class TokenGate(nn.Module):
    """Tokens times a function of themselves: no relevance rule covers it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.cos(x)


class GatedViT(TinyViT):
    """TinyViT with a gate in its last block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].norm1 = nn.Sequential(self.blocks[1].norm1, TokenGate())


def randomize(network: nn.Module, seed: int) -> nn.Module:
    """Reproducible weights of a usual size, and BatchNorm statistics that are not the identity, without touching the global seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                scale = (2 / module.weight[0].numel()) ** 0.5
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * scale)
                if module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
            else:
                for name, tensor in module.named_parameters(recurse=False):
                    center = 1.0 if isinstance(module, nn.LayerNorm) and name == "weight" else 0.0
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + center)
    return network


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "vgg": TinyVGG,
    "resnet": TinyResNet,
    "gated": Gated,
    "vit": TinyViT,
    "torchvision_vit": TinyTorchvisionViT,
    "gated_vit": GatedViT,
}


def tiny(architecture: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> explainer.Explanandum:
    """A multi-label Explanandum for 16x16 images."""
    network = randomize(ARCHITECTURES[architecture](), seed).to(dtype)
    return explainer.Explanandum(network, CLASSES, mean=(0.4, 0.5, 0.45), std=(0.25, 0.2, 0.3))


def color_detector(dtype: torch.dtype = torch.float64) -> explainer.Explanandum:
    """Class k answers to patches of pure colour k (red, green, blue) and to nothing else."""
    network = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 3, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )
    first, second, last = network[0], network[3], network[7]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        first.weight[:, :, 1, 1] = 2.75 * torch.eye(3) - 0.75
        first.bias.fill_(-0.3)
        second.weight[range(3), range(3)] = 1 / 9
        last.weight.copy_(40 * torch.eye(3))
        last.bias.fill_(-1)
    return explainer.Explanandum(network.to(dtype), 3, mean=0.0, std=1.0)
