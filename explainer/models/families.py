"""One small network of every family of classifiers, with random weights: what a method is tried on before it is said to work there.

Widths, depths and image sizes are reduced, so that one forward pass takes milliseconds; the layers, and how a network calls them, are those
of the libraries' own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from explainer.models.classifiers import build_classifier

_NOISE = 0.1  # standard deviation of what is added to parameters that all start at one number


@dataclass(frozen=True)
class Family:
    """How the small network of a family is built.

    Attributes:
        kind: ``CNN``, ``gated CNN`` (squeeze and excitation), ``modern CNN``, ``transformer``, ``windows``, ``hybrid``, ``MLP``.
        arch, options: for :func:`~explainer.models.classifiers.build_classifier`.
        side: side length of its images, in pixels.
    """

    kind: str
    arch: str
    options: Mapping[str, Any] = field(default_factory=dict)
    side: int = 64

    def build(self, num_classes: int, seed: int = 0) -> nn.Module:
        """The network in eval mode: another one for each seed, the same every time.

        Fresh networks of many families give nearly the same scores for every image. So layers get weights of the size that keeps a
        signal's, parameters that start at one number (norms, layer scale, biases, heads of zeros) get noise, and BatchNorm takes the
        statistics of random images.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = build_classifier(self.arch, num_classes, **self.options)
            with torch.no_grad():
                _awaken(net)
                norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
                net.train(False)
                for norm in norms:
                    norm.train().momentum = None  # the mean over all batches: of the one that follows
                    norm.reset_running_stats()
                net(torch.randn(4, 3, self.side, self.side))
            return net.eval()


def _awaken(net: nn.Module) -> None:
    """See :meth:`Family.build`."""
    for parameter in net.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(_NOISE * torch.randn(parameter.shape))
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            wanted = module.weight[0].numel() ** -0.5
            module.weight.mul_(max(1.0, wanted / float(module.weight.std())))


def _vit(kind: str, name: str, side: int = 64, heads: int = 3) -> Family:
    """A vision transformer of timm with two narrow blocks."""
    return Family(kind, f"timm:{name}", {"img_size": side, "depth": 2, "embed_dim": 16 * heads, "num_heads": heads}, side)


def _widths(name: str, depths: str, widths: str, values: tuple[int, ...] = (16, 24, 32, 48)) -> Family:
    """A network of four stages of timm with one narrow block each."""
    return Family("modern CNN", f"timm:{name}", {depths: (1, 1, 1, 1), widths: values})


_HERE = __name__
_WINDOWS = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}

#: By name; those of torchvision and timm are families of their own where the code differs.
FAMILIES: dict[str, Family] = {
    "VGG (torchvision)": Family("CNN", f"{_HERE}:small_vgg"),
    "ResNet (torchvision)": Family("CNN", f"{_HERE}:small_resnet"),
    "ResNet (timm)": Family("CNN", "timm:resnet50", {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}),
    "ResNetV2 (timm)": Family("CNN", "timm:resnetv2_50", {"layers": (1, 1, 1, 1), "channels": (32, 64, 64, 96)}),
    "DenseNet (torchvision)": Family(
        "CNN", "torchvision.models:DenseNet", {"growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16}
    ),
    "MobileNetV2 (torchvision)": Family(
        "CNN",
        "torchvision:mobilenet_v2",
        {"width_mult": 0.25, "inverted_residual_setting": [[1, 16, 1, 1], [4, 24, 1, 2], [4, 32, 1, 2], [4, 64, 1, 2]]},
    ),
    "ShuffleNetV2 (torchvision)": Family(
        "CNN", "torchvision.models:ShuffleNetV2", {"stages_repeats": [1, 1, 1], "stages_out_channels": [8, 16, 24, 32, 48]}
    ),
    "EfficientNet (torchvision)": Family("gated CNN", f"{_HERE}:small_efficientnet"),
    "EfficientNet (timm)": Family("gated CNN", "timm:test_efficientnet"),
    "MobileNetV3 (torchvision)": Family("gated CNN", f"{_HERE}:small_mobilenet_v3"),
    "SE-ResNet (timm)": Family("gated CNN", "timm:seresnet18", {"layers": (1, 1, 1, 1), "channels": (16, 24, 32, 48)}),
    "RegNetY (torchvision)": Family("gated CNN", f"{_HERE}:small_regnet_y"),
    "ConvNeXt (torchvision)": Family("modern CNN", f"{_HERE}:small_convnext"),
    "ConvNeXt (timm)": _widths("convnext_atto", "depths", "dims"),
    "PoolFormer (timm)": Family("modern CNN", f"{_HERE}:small_poolformer"),
    "FastViT (timm)": _widths("fastvit_t8", "layers", "embed_dims", (48, 48, 96, 96)),
    "MambaOut (timm)": Family("modern CNN", "timm:test_mambaout"),
    "EdgeNeXt (timm)": Family("hybrid", "timm:edgenext_xx_small", {"dims": (16, 24, 32, 48), "depths": (1, 1, 1, 1)}),
    "MobileViT (timm)": Family("hybrid", "timm:mobilevit_xxs"),
    "ViT with stem (timm)": _vit("hybrid", "vit_tiny_r_s16_p8_224"),
    "MaxViT (torchvision)": Family(
        "hybrid",
        "torchvision.models:MaxVit",
        {
            "input_size": (64, 64),
            "stem_channels": 16,
            "partition_size": 2,
            "block_channels": [16, 32],
            "block_layers": [1, 1],
            "head_dim": 8,
            "stochastic_depth_prob": 0.0,
        },
    ),
    "MaxViT (timm)": Family(
        "hybrid", "timm:maxvit_rmlp_pico_rw_256", {"img_size": 64, "embed_dim": (32, 32), "depths": (1, 1), "stem_width": 16}
    ),
    "CoAtNet (timm)": Family("hybrid", "timm:test_coatnet", {"img_size": 64}),
    "LeViT (timm)": Family(
        "hybrid", "timm:levit_128s", {"img_size": 64, "embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 1, 1)}
    ),
    "ViT (torchvision)": Family(
        "transformer",
        "torchvision.models:VisionTransformer",
        {"image_size": 64, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96},
    ),
    "ViT (timm)": _vit("transformer", "vit_tiny_patch16_224"),
    "ViT averaging (timm)": _vit("transformer", "vit_base_patch16_siglip_gap_224"),
    "ViT pooling by attention (timm)": _vit("transformer", "vit_base_patch16_siglip_224"),
    "DeiT distilled (timm)": _vit("transformer", "deit_tiny_distilled_patch16_224"),
    "DINOv2 with registers (timm)": _vit("transformer", "vit_small_patch14_reg4_dinov2", 56),
    "BEiT (timm)": _vit("transformer", "beit_base_patch16_224"),
    "EVA-02 (timm)": _vit("transformer", "eva02_tiny_patch14_224", 56),
    "CaiT (timm)": _vit("transformer", "cait_xxs24_224"),
    "XCiT (timm)": _vit("transformer", "xcit_nano_12_p16_224"),
    "Swin (torchvision)": Family(
        "windows",
        "torchvision.models:SwinTransformer",
        {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]},
    ),
    "Swin (timm)": Family("windows", "timm:swin_tiny_patch4_window7_224", _WINDOWS),
    "SwinV2 (timm)": Family("windows", "timm:swinv2_tiny_window8_256", _WINDOWS),
    "PVTv2 (timm)": Family("windows", "timm:pvt_v2_b0", {"embed_dims": (16, 16, 40, 48), "depths": (1, 1, 1, 1)}),
    "Hiera (timm)": Family("windows", "timm:hiera_tiny_224", {"img_size": 64, "embed_dim": 24, "stages": (1, 1, 1, 1)}),
    "Mixer (timm)": Family("MLP", "timm.models.mlp_mixer:MlpMixer", {"img_size": 64, "num_blocks": 2, "embed_dim": 48}),
    "gMLP (timm)": Family("MLP", f"{_HERE}:small_gmlp"),
}


def small_vgg(num_classes: int) -> models.VGG:
    """Torchvision's VGG with five narrow stages and a narrow head."""
    net = models.VGG.__new__(models.VGG)  # its own constructor begins with a head of 120 million weights
    nn.Module.__init__(net)
    net.features = make_layers([16, "M", 24, "M", 32, "M", 48, "M"])
    net.avgpool = nn.AdaptiveAvgPool2d(7)
    head = (nn.Linear(48 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, num_classes))
    net.classifier = nn.Sequential(*head)
    return net


def small_resnet(num_classes: int) -> models.ResNet:
    """A ResNet of torchvision's with four narrow stages of one block; its own constructor fixes the widths."""
    net = models.ResNet.__new__(models.ResNet)
    nn.Module.__init__(net)
    net._norm_layer, net.inplanes, net.dilation, net.groups, net.base_width = nn.BatchNorm2d, 16, 1, 1, 64
    net.conv1, net.bn1 = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16)
    net.relu, net.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
    for number, width in enumerate((16, 24, 32, 48), 1):
        setattr(net, f"layer{number}", net._make_layer(BasicBlock, width, 1, stride=1 if number == 1 else 2))
    net.avgpool, net.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(48, num_classes)
    return net


def small_efficientnet(num_classes: int) -> nn.Module:
    """Torchvision's EfficientNet with four narrow blocks."""
    block = partial(MBConvConfig, num_layers=1, width_mult=1.0, depth_mult=1.0)
    blocks = [block(1, 3, 1, 8, 8), block(4, 3, 2, 8, 16), block(4, 5, 2, 16, 24), block(4, 3, 2, 24, 32)]
    net: nn.Module = models.EfficientNet(blocks, dropout=0.1, num_classes=num_classes)
    return net


def small_mobilenet_v3(num_classes: int) -> nn.Module:
    """Torchvision's MobileNetV3 with four narrow blocks, both activations."""
    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, True, "RE", 2),
        block(16, 3, 32, 24, False, "RE", 2),
        block(24, 5, 48, 32, True, "HS", 2),
        block(32, 5, 64, 32, True, "HS", 1),
    ]
    net: nn.Module = models.MobileNetV3(blocks, last_channel=64, num_classes=num_classes)
    return net


def small_convnext(num_classes: int) -> nn.Module:
    """Torchvision's ConvNeXt with four narrow stages of one block."""
    stages = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, 32, 1), CNBlockConfig(32, 48, 1), CNBlockConfig(48, None, 1)]
    net: nn.Module = models.ConvNeXt(stages, num_classes=num_classes)
    return net


def small_regnet_y(num_classes: int) -> nn.Module:
    """Torchvision's RegNetY with four narrow stages."""
    net: nn.Module = models.RegNet(
        BlockParams.from_init_params(depth=4, w_0=16, w_a=12.0, w_m=2.0, group_width=8, se_ratio=0.25), num_classes
    )
    return net


def small_poolformer(num_classes: int) -> nn.Module:
    """Timm's PoolFormer with four narrow stages of one block."""
    from timm.models.metaformer import GroupNorm1, MetaFormer

    return MetaFormer(
        num_classes=num_classes,
        depths=(1, 1, 1, 1),
        dims=(16, 24, 32, 48),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=(None,) * 4,
        use_mlp_head=False,
    )


def small_gmlp(num_classes: int) -> nn.Module:
    """Timm's gMLP with two narrow blocks."""
    from timm.layers import GatedMlp
    from timm.models.mlp_mixer import MlpMixer, SpatialGatingBlock

    return MlpMixer(num_classes, img_size=64, num_blocks=2, embed_dim=48, mlp_ratio=4, block_layer=SpatialGatingBlock, mlp_layer=GatedMlp)
