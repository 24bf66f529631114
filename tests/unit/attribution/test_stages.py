"""The default layer over the families of torchvision and timm: the last spatial stage, with all its rows, columns and channels.

Each row was written by hand from the network's source. A map of the wrong layout fails twice: the shape differs, and a change in one
corner of the image is felt in the wrong place.
"""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from explainer import Explanandum
from explainer.attribution.stages import default_layer
from explainer.baselines.kernels.features import forward_features
from explainer.baselines.kernels.hooks import find_layer
from explainer.errors import UnsupportedLayerError

# name, height x width, layer, channels, rows, columns
FAST = [
    ("torchvision:resnet18", (64, 96), "layer4", 512, 2, 3),
    ("torchvision:convnext_tiny", (64, 96), "features", 768, 2, 3),
    ("torchvision:swin_t", (64, 96), "permute", 768, 2, 3),
    ("torchvision:googlenet", (64, 96), "inception5b", 1024, 2, 3),
    ("torchvision:densenet121", (64, 96), "features", 1024, 2, 3),
    ("torchvision:mobilenet_v3_small", (64, 96), "features", 576, 2, 3),
    ("torchvision:regnet_y_400mf", (64, 96), "trunk_output", 440, 2, 3),
    ("torchvision:squeezenet1_1", (64, 96), "classifier.2", 5, 3, 5),
    ("timm:vit_tiny_patch16_224", (64, 96), "blocks.11.norm1", 192, 4, 6),
    ("timm:deit_tiny_distilled_patch16_224", (64, 96), "blocks.11.norm1", 192, 4, 6),
    ("timm:convnext_atto", (64, 96), "stages", 320, 2, 3),
    ("timm:edgenext_xx_small", (64, 96), "stages", 168, 2, 3),
    ("timm:mixer_s32_224", (96, 96), "norm", 512, 3, 3),
    ("timm:poolformer_s12", (64, 96), "stages", 512, 2, 3),
    ("timm:hgnetv2_b0", (64, 96), "stages", 1024, 2, 3),
    ("timm:xcit_nano_12_p16_224", (64, 96), "cls_attn_blocks.1.norm1", 128, 4, 6),
    ("timm:mobilevit_xxs", (64, 96), "final_conv", 320, 2, 3),
    ("timm:efficientnet_lite0", (64, 96), "bn2", 1280, 2, 3),
    ("timm:mambaout_femto", (64, 96), "stages", 288, 2, 3),
]
SLOW = [
    ("torchvision:vgg11_bn", (64, 96), "features.27", 512, 4, 6),
    ("torchvision:alexnet", (96, 128), "features.11", 256, 5, 7),
    ("torchvision:inception_v3", (128, 192), "Mixed_7c", 2048, 2, 4),
    ("torchvision:efficientnet_b0", (64, 96), "features", 1280, 2, 3),
    ("torchvision:mobilenet_v2", (64, 96), "features", 1280, 2, 3),
    ("torchvision:shufflenet_v2_x0_5", (64, 96), "conv5", 1024, 2, 3),
    ("torchvision:mnasnet0_5", (64, 96), "layers", 1280, 2, 3),
    ("torchvision:resnext50_32x4d", (64, 96), "layer4", 2048, 2, 3),
    ("torchvision:swin_v2_t", (64, 96), "permute", 768, 2, 3),
    ("torchvision:vit_b_32", (224, 224), "encoder.layers.encoder_layer_11.ln_1", 768, 7, 7),
    ("torchvision:maxvit_t", (224, 224), "blocks.3", 512, 7, 7),
    ("timm:swin_tiny_patch4_window7_224", (64, 96), "norm", 768, 2, 3),
    ("timm:swinv2_cr_tiny_224", (64, 64), "stages", 768, 2, 2),
    ("timm:maxvit_rmlp_pico_rw_256", (64, 64), "norm", 256, 2, 2),
    ("timm:hgnet_tiny", (64, 96), "stages", 768, 2, 3),
    ("timm:gmlp_ti16_224", (64, 64), "norm", 128, 4, 4),
    ("timm:resmlp_12_224", (64, 64), "norm", 384, 4, 4),
    ("timm:cait_xxs24_224", (64, 64), "blocks_token_only.1.norm1", 192, 4, 4),
    ("timm:beit_base_patch16_224", (64, 96), "norm", 768, 4, 6),
    ("timm:levit_128s", (128, 128), "stages", 384, 2, 2),
    ("timm:pit_ti_224", (96, 96), "transformers.2.blocks.3.norm1", 256, 3, 3),
    ("timm:coat_lite_tiny", (64, 64), "serial_blocks4.1.norm1", 320, 2, 2),
    ("timm:pvt_v2_b0", (64, 96), "stages", 256, 2, 3),
    ("timm:twins_svt_small", (64, 64), "norm", 512, 2, 2),
    ("timm:volo_d1_224", (64, 64), "norm", 384, 4, 4),
    ("timm:nest_tiny_jx", (64, 64), "norm", 384, 4, 4),
    ("timm:sequencer2d_s", (64, 64), "norm", 384, 4, 4),
    ("timm:gcvit_xxtiny", (64, 96), "stages", 512, 2, 3),
    ("timm:visformer_tiny", (64, 64), "norm", 384, 2, 2),
    ("timm:eva02_tiny_patch14_224", (56, 84), "norm", 192, 4, 6),
    ("timm:convit_tiny", (64, 64), "blocks.11.norm1", 192, 4, 4),
    ("timm:tnt_s_patch16_224", (64, 64), "blocks.11.norm_out", 384, 4, 4),
    ("timm:mvitv2_tiny", (64, 64), "norm", 768, 2, 2),
    ("timm:davit_tiny", (64, 96), "stages", 768, 2, 3),
    ("timm:fastvit_t8", (64, 96), "final_conv", 768, 2, 3),
    ("timm:tiny_vit_5m_224", (64, 64), "stages", 320, 2, 2),
    ("timm:repvit_m0_9", (64, 96), "stages", 384, 2, 3),
    ("timm:hiera_tiny_224", (224, 224), "blocks.11", 768, 7, 7),
    ("timm:repvgg_a0", (64, 96), "stages", 1280, 2, 3),
    ("timm:dla34", (64, 96), "level5", 512, 2, 3),
    ("timm:res2net50_26w_4s", (64, 96), "layer4", 2048, 2, 3),
    ("timm:resnetv2_50", (64, 96), "norm", 2048, 2, 3),
    ("timm:cspresnet50", (64, 96), "stages", 1024, 2, 3),
    ("timm:darknet53", (64, 96), "stages", 1024, 2, 3),
    ("timm:vovnet39a", (64, 96), "stages", 1024, 2, 3),
    ("timm:ghostnet_100", (64, 96), "blocks", 960, 2, 3),
    ("timm:rexnet_100", (64, 96), "features", 1280, 2, 3),
    ("timm:hrnet_w18_small", (64, 96), "final_layer", 2048, 2, 3),
    ("timm:inception_resnet_v2", (128, 192), "conv2d_7b", 1536, 2, 4),
    ("timm:mobilenetv4_conv_small", (64, 96), "blocks", 960, 2, 3),
    ("timm:vit_tiny_r_s16_p8_224", (64, 96), "blocks.11.norm1", 192, 2, 3),
    ("timm:vit_base_patch32_siglip_256", (64, 96), "norm", 768, 2, 3),
    ("timm:caformer_s18", (64, 96), "stages", 512, 2, 3),
    ("timm:inception_next_atto", (64, 96), "stages", 320, 2, 3),
    ("timm:vit_small_patch14_reg4_dinov2", (56, 84), "blocks.11.norm1", 384, 4, 6),
]


def network(name: str, size: tuple[int, int]) -> nn.Module:
    library, _, rest = name.partition(":")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if library == "torchvision":
            extra = {"init_weights": False, "aux_logits": False} if rest in ("googlenet", "inception_v3") else {}
            return models.get_model(rest, weights=None, num_classes=5, **extra)
        try:
            return timm.create_model(rest, num_classes=5, img_size=size)
        except TypeError:  # a network for every size
            return timm.create_model(rest, num_classes=5)


def check(name: str, size: tuple[int, int], layer: str, channels: int, rows: int, columns: int) -> None:
    net = network(name, size)
    for parameter, values in net.named_parameters():
        if parameter.endswith("attention_biases"):  # LeViT, untrained, attends alike to all places and so forgets them: here to near ones
            values.data[:, 0] = 5
    model = Explanandum(net, 5, task="multiclass", mean=0.5, std=0.5)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    assert default_layer(model, images) == layer
    corners = images.repeat(5, 1, 1, 1)
    h, w = size[0] // 2, size[1] // 2
    places = [
        (slice(0, h), slice(0, w)),
        (slice(0, h), slice(-w, None)),
        (slice(-h, None), slice(0, w)),
        (slice(-h, None), slice(-w, None)),
    ]
    for row, (y, x) in enumerate(places, 1):
        corners[row, :, y, x] = 1 - corners[row, :, y, x]
    with torch.no_grad():
        (features,) = forward_features(model, {layer: find_layer(net, layer)}, corners)[1]
    values = features.values
    assert values.shape == (5, channels, rows, columns)
    if features.layout.channels == 1:
        return  # as it is, no positions to confuse; deep random CNNs feel every change everywhere
    change = (values[1:] - values[:1]).double().square().sum(1)
    centers = torch.stack([(change * grid).sum((1, 2)) / change.sum((1, 2)) for grid in _steps(rows, columns)], dim=1)
    assert centers[0, 0] < centers[2, 0] and centers[1, 0] < centers[3, 0], f"top and bottom are not where they are: {centers}"
    assert centers[0, 1] < centers[1, 1] and centers[2, 1] < centers[3, 1], f"left and right are not where they are: {centers}"


def _steps(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    return y, x


@pytest.mark.parametrize(("name", "size", "layer", "channels", "rows", "columns"), FAST, ids=[f[0] for f in FAST])
def test_the_default_layer_of_a_family(name: str, size: tuple[int, int], layer: str, channels: int, rows: int, columns: int) -> None:
    check(name, size, layer, channels, rows, columns)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "layer", "channels", "rows", "columns"), SLOW, ids=[f[0] for f in SLOW])
def test_the_default_layer_of_more_families(name: str, size: tuple[int, int], layer: str, channels: int, rows: int, columns: int) -> None:
    check(name, size, layer, channels, rows, columns)


def test_at_least_forty_families() -> None:
    assert len({row[0] for row in FAST + SLOW}) == len(FAST + SLOW) >= 70


class Branches(nn.Module):
    """Two branches and nothing behind their sum but the head: no module's output holds all evidence."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 5), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x).mean((2, 3)), self.right(x).mean((2, 3))], dim=1))


def test_without_a_layer_that_all_evidence_passes_through_the_readable_ones_are_listed() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"no layer of Branches.*layer=.*: right, left\."):
        default_layer(Explanandum(Branches(), 3), torch.rand(1, 3, 12, 12))


def test_a_head_of_zeros_hides_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    nn.init.zeros_(net[4].weight)
    assert default_layer(Explanandum(net, 3), torch.rand(1, 3, 12, 12)) == "1"


def test_nothing_is_left_behind() -> None:
    net = network("timm:vit_tiny_patch16_224", (64, 96))
    default_layer(Explanandum(net, 5, mean=0.5, std=0.5), torch.rand(1, 3, 64, 96))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
