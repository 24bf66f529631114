"""Methods for vision transformers against the numbers of the public implementations, in both precisions.

The map of a bad bug in vit-explain (columns divided by the sums of rows) is not reproduced: ``rownorm_*`` is
the repaired one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels.maps import resize_map
from tests.golden.cases import load_transformer

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def to_torchvision(net: nn.Module) -> VisionTransformer:
    """The same network in torchvision, whose attention is torch's own module."""
    block = net.blocks[0]
    args = {"num_layers": len(net.blocks), "num_heads": block.attn.num_heads, "mlp_dim": block.mlp.fc1.out_features}
    twin = VisionTransformer(image_size=32, patch_size=8, hidden_dim=net.embed_dim, num_classes=net.num_classes, **args)
    names = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    prefixes = {"patch_embed.proj.": "conv_proj.", "norm.": "encoder.ln.", "head.": "heads.head."}
    inner = {"norm1.": "ln_1.", "norm2.": "ln_2.", "attn.qkv.": "self_attention.in_proj_", "attn.proj.": "self_attention.out_proj."}
    for i in range(len(net.blocks)):
        prefixes |= {f"blocks.{i}.{a}": f"encoder.layers.encoder_layer_{i}.{b}" for a, b in inner.items()}
        prefixes |= {f"blocks.{i}.mlp.fc{a}.": f"encoder.layers.encoder_layer_{i}.mlp.{b}." for a, b in ((1, 0), (2, 3))}
    for old, new in prefixes.items():
        names |= {key: new + key.removeprefix(old) for key in net.state_dict() if key.startswith(old)}
    twin.load_state_dict({names[key]: value for key, value in net.state_dict().items()})
    return twin.to(net.cls_token.dtype).eval()


class Case:
    """One golden case with its network in the wanted precision."""

    def __init__(self, name: str, dtype: torch.dtype, torchvision: bool = False) -> None:
        self.entry, self.arrays, net = load_transformer(name, dtype)
        self.dtype, self.args = dtype, self.entry["args"]
        network = to_torchvision(net) if torchvision else net
        self.explanandum = Explanandum(network, 5, task="multiclass", mean=0.0, std=1.0)
        self.images = torch.as_tensor(self.arrays["in/x"]).to(dtype)
        self.target = torch.as_tensor(self.arrays["in/target"])

    def check(self, actual: Tensor, key: str) -> None:
        expected = self.arrays[key].astype(np.float64)
        if actual.ndim == expected.ndim + 1 and len(actual) == 1:
            actual = actual[0]
        tolerance = self.entry["tolerance"]["suggest_float64"]["atol_rel_to_max"]
        if self.dtype == torch.float32:
            # Twice what was suggested: float32 rounds otherwise on another processor (1.2 times was seen).
            tolerance = 2 * self.entry["tolerance"]["per_output"][key]["suggest_float32_atol_rel_to_max"]
        assert actual.dtype == self.dtype
        assert actual.shape == expected.shape
        worst = np.abs(actual.double().numpy() - expected).max()
        assert worst <= tolerance * np.abs(expected).max(), (key, worst / np.abs(expected).max(), tolerance)


def stretched(maps: Tensor) -> Tensor:
    """From 0 to 1 per image."""
    shifted = maps - maps.amin((1, 2), keepdim=True)
    return shifted / shifted.amax((1, 2), keepdim=True)


@DTYPES
@pytest.mark.parametrize("name", ["rollout_vit", "rollout_rect", "rollout_reg"])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.9])
def test_rollout(name: str, fusion: str, discard: float, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = build("attention_rollout", case.explanandum, head_fusion=fusion, discard_ratio=discard)
    tokens = method.tokens(case.images, case.target)
    case.check(tokens, f"out/rownorm_map_{fusion}_{discard}")
    case.check(tokens / tokens.amax(), f"out/rownorm_mask_{fusion}_{discard}")
    torch.testing.assert_close(method(case.images, case.target), resize_map(tokens, case.images.shape[-2:]))


@DTYPES
@pytest.mark.parametrize("name", ["rollout_vit", "rollout_rect", "rollout_reg"])
def test_rollout_of_the_paper_equals_the_public_code(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    case.check(build("attention_rollout", case.explanandum).tokens(case.images, case.target), "out/map_mean_0.0")


@DTYPES
@pytest.mark.parametrize("start", [0, 1])
def test_rollout_from_a_later_layer(start: int, dtype: torch.dtype) -> None:
    case = Case("chefer_baselines_vit", dtype)
    method = build("attention_rollout", case.explanandum, start_layer=start)
    case.check(method.tokens(case.images, case.target), f"out/rollout_s{start}")


@DTYPES
def test_attention_grad_cam(dtype: torch.dtype) -> None:
    case = Case("chefer_baselines_vit", dtype)
    tokens = build("attention_grad_cam", case.explanandum).tokens(case.images, case.target)
    case.check(tokens, "out/attn_gradcam_raw")
    case.check(stretched(tokens), "out/attn_gradcam")


@DTYPES
@pytest.mark.parametrize(
    ("name", "torchvision"),
    [("chefer_vit", False), ("chefer_vit", True), ("chefer_vit_otherclass", False), ("chefer_rect", False)],
    ids=["vit", "torchvision", "otherclass", "rect"],
)
def test_transformer_attribution(name: str, torchvision: bool, dtype: torch.dtype) -> None:
    case = Case(name, dtype, torchvision)

    def tokens(**options: object) -> Tensor:
        return build("transformer_attribution", case.explanandum, **options).tokens(case.images, case.target)

    for start in (0, 1):
        for variant in ("transformer_attribution", "rollout"):
            case.check(tokens(variant=variant, start_layer=start), f"out/{variant}_s{start}")
        visible = build("transformer_attribution", case.explanandum, start_layer=start)(case.images, case.target)
        case.check(stretched(visible), f"out/vis_transformer_attribution_s{start}")
    for variant in ("last_layer", "last_layer_ablation", "last_layer_attn"):
        case.check(tokens(variant=variant), f"out/{variant}")
    case.check(build("transformer_attribution", case.explanandum, variant="full")(case.images, case.target), "out/full")


@DTYPES
@pytest.mark.parametrize("name", ["generic_vit", "generic_rect", "generic_reg", "generic_deit"])
def test_generic_attention(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = build("generic_attention", case.explanandum)
    case.check(method.tokens(case.images, case.target), "out/map")
    case.check(stretched(method(case.images, case.target)), "out/vis")
    if "out/map_mean_rows" in case.arrays:
        case.check(build("generic_attention", case.explanandum, row="all").tokens(case.images, case.target), "out/map_mean_rows")


LRP = {
    "attnlrp_vit": ("attn_lrp", False),
    "attnlrp_reg": ("attn_lrp", False),
    "attnlrp_gap_gamma": ("attn_lrp", False),
    "cplrp_rect": ("cp_lrp", False),
    "cplrp_tv_vit_gamma": ("cp_lrp", True),
}


@DTYPES
@pytest.mark.parametrize("name", LRP)
def test_attention_lrp(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype, torchvision=LRP[name][1])
    method = build(LRP[name][0], case.explanandum, gamma=case.args.get("gamma"))
    pixels = method(case.images, case.target)
    case.check(pixels, "out/pixel")
    case.check(pixels / pixels.abs().max(), "out/pixel_norm")
    rows, columns = case.args["token_grid"]
    case.check(pixels.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).sum((2, 4)), "out/patch_sum")
    at = "encoder.dropout" if LRP[name][1] else "norm_pre"  # the module whose output enters the first block
    tokens = method.relevance(case.images, case.target, at=at).sum(-1)
    case.check(tokens[:, case.args["drop_prefix"] :].unflatten(1, (rows, columns)), "out/token")


@pytest.fixture
def captum_in(dtype: torch.dtype) -> Iterator[None]:
    """captum computes the points of its trapezoids in torch's default type, whatever the images' type is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@DTYPES
@pytest.mark.usefixtures("captum_in")
def test_captum_gradients(dtype: torch.dtype) -> None:
    case = Case("captum_vit", dtype)

    def channels(name: str, **options: object) -> Tensor:
        return build(name, case.explanandum, **options).channels(case.images, case.target)

    case.check(channels("gradient"), "out/saliency_abs")
    case.check(channels("gradient", absolute=False), "out/saliency_signed")
    case.check(channels("input_x_gradient"), "out/input_x_gradient")
    for method in case.args["ig_methods"]:
        integrated = channels("integrated_gradients", steps=case.args["n_steps"], method=method, baseline=torch.zeros_like(case.images))
        case.check(integrated, f"out/ig_{method}")
