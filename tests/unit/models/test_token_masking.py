"""Tokens left out instead of filled: equal to the network run on the tokens that are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from explainer import Explanandum
from explainer.errors import ShapeError, UnsupportedLayerError
from explainer.models.token_masking import forward_masked, weighted_softmax
from tests.contracts.networks import TinyTorchvisionViT, TinyVGG, randomize

SIZES = {"img_size": (16, 24), "patch_size": 4, "num_classes": 3, "embed_dim": 12, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "class token": lambda: VisionTransformer(**SIZES),
    "registers": lambda: VisionTransformer(**SIZES, reg_tokens=3),
    "distilled": lambda: VisionTransformerDistilled(**SIZES),
    "average": lambda: VisionTransformer(**SIZES, class_token=False, global_pool="avg"),
    "average beside a class token": lambda: VisionTransformer(**SIZES, global_pool="avg"),
}


def explanandum(network: nn.Module, **options: object) -> Explanandum:
    return Explanandum(randomize(network, 1).double(), 3, mean=(0.4, 0.5, 0.45), std=(0.25, 0.2, 0.3), **options)


def pictures(height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def patches() -> Tensor:
    """Two hard masks over 4 x 6 patches."""
    return (torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(4)) > 0.5).double()


def spread(board: Tensor, side: int = 4) -> Tensor:
    return board.repeat_interleave(side, 1).repeat_interleave(side, 2)


def on_tokens(network: nn.Module, image: Tensor, kept: Tensor) -> Tensor:
    """The network's own layers on one image ``[1,3,H,W]`` and those of its patches that are kept ``[patches]``."""
    tokens = network._pos_embed(network.patch_embed(image))
    chosen = torch.cat([torch.ones(network.num_prefix_tokens, dtype=torch.bool), kept])
    return network.forward_head(network.norm(network.blocks(tokens[:, chosen])))


@pytest.mark.parametrize("kind", NETWORKS)
def test_hard_masks_leave_tokens_out_exactly(kind: str) -> None:
    classifier, images, board = explanandum(NETWORKS[kind]()), pictures(), patches()
    logits = forward_masked(classifier, images, spread(board))
    normalized = classifier.normalize(images)
    expected = torch.cat([on_tokens(classifier.classifier, normalized[i : i + 1], board[i].flatten() > 0) for i in range(2)])
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert (logits - classifier(images)).abs().max() > 1e-3


def test_hard_masks_in_torchvision() -> None:
    classifier, images = explanandum(TinyTorchvisionViT()), pictures(16, 16)
    net, board = classifier.classifier, patches()[:, :, :4]
    logits = forward_masked(classifier, images, spread(board))
    for i in range(2):
        tokens = net.conv_proj(classifier.normalize(images)[i : i + 1]).flatten(2).transpose(1, 2)
        tokens = torch.cat([net.class_token, tokens], 1) + net.encoder.pos_embedding
        chosen = torch.cat([torch.ones(1, dtype=torch.bool), board[i].flatten() > 0])
        expected = net.heads(net.encoder.ln(net.encoder.layers(tokens[:, chosen]))[:, 0])
        torch.testing.assert_close(logits[i : i + 1], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_mask_of_ones_changes_nothing(kind: str) -> None:
    classifier, images = explanandum(NETWORKS[kind]()), pictures()
    torch.testing.assert_close(forward_masked(classifier, images, torch.ones_like(images[:, 0])), classifier(images))


def test_soft_masks_add_their_logarithm_to_the_scores() -> None:
    classifier, images = explanandum(NETWORKS["class token"]()), pictures()
    net = classifier.classifier
    board = 0.05 + 0.9 * torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    bias = torch.cat([torch.zeros(2, 1, dtype=torch.float64), board.flatten(1).log()], 1)[:, None, None]
    tokens = net._pos_embed(net.patch_embed(classifier.normalize(images)))
    for block in net.blocks:
        tokens = block(tokens, attn_mask=bias)
    torch.testing.assert_close(forward_masked(classifier, images, spread(board)), net.forward_head(net.norm(tokens)))


def test_a_patch_weighs_its_mean() -> None:
    classifier, images = explanandum(NETWORKS["average"]()), pictures()
    mask = torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    means = mask.unflatten(2, (6, 4)).unflatten(1, (4, 4)).mean((2, 4))
    torch.testing.assert_close(forward_masked(classifier, images, mask), forward_masked(classifier, images, spread(means)))
    torch.testing.assert_close(forward_masked(classifier, images, mask[:, None]), forward_masked(classifier, images, mask))


@pytest.mark.parametrize("kind", ["class token", "average"])
def test_gradients_reach_the_mask_also_where_it_is_zero(kind: str) -> None:
    classifier, images, board = explanandum(NETWORKS[kind]()), pictures(), 0.7 * patches()
    leaf = board.clone().requires_grad_()
    forward_masked(classifier, images, spread(leaf))[:, 1].sum().backward()
    step = 1e-6
    for place in [(0, 0, 0), (0, 2, 3), (1, 3, 5), (1, 1, 1)]:
        more = board.clone()
        more[place] += step
        less = forward_masked(classifier, images, spread(board))[:, 1].sum()
        slope = (forward_masked(classifier, images, spread(more))[:, 1].sum() - less) / step
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[place], slope, rtol=1e-3, atol=1e-5)
    assert {bool(v == 0) for v in board.flatten()} == {True, False}


def test_weighted_softmax_by_hand() -> None:
    scores = torch.tensor([[0.0, 2.0, 900.0]], dtype=torch.float64).log()  # exp: 0, 2, 900
    actual = weighted_softmax(scores, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(actual, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
    scores = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64).log()
    actual = weighted_softmax(scores, torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64))
    torch.testing.assert_close(actual, torch.tensor([[1.0, 1.5, 0.5]], dtype=torch.float64) / 3)
    assert torch.equal(weighted_softmax(scores, torch.zeros(3)), torch.zeros(1, 3, dtype=torch.float64))
    huge = weighted_softmax(torch.tensor([[0.0, 5000.0]]), torch.tensor([1.0, 0.0]))
    assert torch.equal(huge, torch.tensor([[1.0, 0.0]]))


def test_without_any_patch_what_stays_is_what_no_pixel_enters() -> None:
    images, nothing = pictures(), torch.zeros(2, 16, 24, dtype=torch.float64)
    for kind in NETWORKS:
        classifier = explanandum(NETWORKS[kind]())
        logits = forward_masked(classifier, images, nothing)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits, forward_masked(classifier, 1 - images, nothing))


def test_padding_and_resizing_of_the_input() -> None:
    padded = explanandum(VisionTransformer(**{**SIZES, "img_size": 16}, dynamic_img_size=True, dynamic_img_pad=True))
    images = pictures(14, 21)  # 4 x 6 patches, the last ones partly padding
    mask = spread(patches())[:, :14, :21]
    hidden = torch.where(mask[:, None] > 0, images, 1 - images)
    torch.testing.assert_close(forward_masked(padded, images, mask), forward_masked(padded, hidden, mask))
    torch.testing.assert_close(forward_masked(padded, images, torch.ones_like(mask)), padded(images))
    resized = explanandum(VisionTransformer(**{**SIZES, "img_size": 16}), input_size=16)
    large, board = pictures(32, 32), patches()[:, :, :4]
    small = nn.functional.interpolate(large, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(forward_masked(resized, large, spread(board, 8)), forward_masked(resized, small, spread(board)))


class ConvolutionalStem(VisionTransformer):
    """Patches that see their neighbours' pixels."""

    def __init__(self) -> None:
        super().__init__(**SIZES)
        self.patch_embed.proj = nn.Conv2d(3, 12, 7, stride=4, padding=3)


class SumPool(VisionTransformer):
    """Sums tokens where others average them."""

    def __init__(self) -> None:
        super().__init__(**SIZES, global_pool="avg")

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        return x.sum(1)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: TinyVGG(), "no attention ran in TinyVGG"),
        (
            lambda: SwinTransformer(img_size=16, patch_size=2, num_classes=3, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4),
            "not over all patches",
        ),
        (ConvolutionalStem, "left out still change the logits"),
        (SumPool, "left out still change the logits"),
    ],
    ids=["cnn", "swin", "stem", "sum"],
)
def test_refusals_name_the_reason_and_another_fill(network: Callable[[], nn.Module], message: str) -> None:
    images = pictures(16, 24) if network in (ConvolutionalStem, SumPool) else pictures(16, 16)
    with pytest.raises(UnsupportedLayerError, match=message) as caught:
        forward_masked(explanandum(network()), images, torch.ones_like(images[:, 0]))
    assert "masking.fill mean" in str(caught.value)


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ShapeError, match="images' size"):
        forward_masked(explanandum(NETWORKS["average"]()), pictures(), torch.ones(2, 4, 6))
