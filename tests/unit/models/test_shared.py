"""A decoder on the classifier's own features: which features, that they stay frozen, and that checkpoints hold the decoder alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import explainer
from explainer.attribution.layouts import CHANNELS_FIRST
from explainer.attribution.stages import Stage, find_stages, linear_head, named_stages
from explainer.baselines.kernels.maps import guided_filter
from explainer.cli import main
from explainer.data.shapes import Shapes
from explainer.errors import CheckpointError, ConfigError, FingerprintMismatchError, ShapeError, UnsupportedLayerError
from explainer.export.fused import FusedExplainer
from explainer.models.checkpoints import load_explanandum
from explainer.models.class_head import ordered
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.models.shared import FeatureDecoder


def resnet(classes: int = 6) -> Explanandum:
    torch.manual_seed(0)
    return Explanandum(build_classifier("timm:resnet10t", classes), classes, "multilabel", mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize(
    ("arch", "paths", "linear"),
    [
        ("timm:resnet10t", ["layer1", "layer2", "layer3", "layer4"], True),
        ("timm:tf_efficientnet_lite0", ["blocks.1", "blocks.2", "blocks.4", "bn2"], True),
        ("torchvision:mobilenet_v3_small", ["features.1", "features.3", "features.8", "features"], False),
        ("torchvision:vgg11_bn", ["features.13", "features.20", "features.27", "avgpool"], False),
        ("timm:convnext_atto", ["stages.0", "stages.1", "stages.2", "norm_pre"], False),
        ("torchvision:swin_t", ["features.1", "features.3", "features.5", "permute"], True),
    ],
)
def test_stages_of_known_families(arch, paths, linear):
    torch.manual_seed(0)
    classifier = build_classifier(arch, 5).eval()
    stages = find_stages(classifier)
    assert [s.path for s in stages] == paths and [s.stride for s in stages] == [4, 8, 16, 32]
    assert (linear_head(classifier, stages[-1], 5) is not None) == linear
    for s in stages:  # each really has one position per stride pixels
        seen = []
        handle = classifier.get_submodule(s.path).register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            classifier(torch.zeros(1, 3, 224, 224))
        handle.remove()
        assert s.spatial(seen[0], (224, 224)).shape == (1, s.channels, 224 // s.stride, 224 // s.stride)


def test_a_network_of_one_resolution_is_refused_and_layers_can_be_named():
    one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64 * 64, 3))
    with pytest.raises(UnsupportedLayerError, match="at least two"):
        find_stages(one, 64)
    classifier = resnet().classifier
    assert [s.path for s in named_stages(classifier, ["layer3", "layer2"], 64)] == ["layer2", "layer3"]
    with pytest.raises(UnsupportedLayerError, match="'nowhere'"):
        named_stages(classifier, ["nowhere"], 64)


def test_a_transformer_of_one_resolution_gives_four_depths():
    """Tokens behind the class token, in rows of the image's width; the shallowest is enlarged from stride 16 to 8 by its own filters."""
    torch.manual_seed(0)
    classifier = build_classifier("timm:vit_tiny_patch16_224", 5, img_size=64, depth=8, embed_dim=12, num_heads=2, dynamic_img_size=True)
    stages = find_stages(classifier.eval(), 64)
    found = {s.path: (s.stride, s.factor, s.prefix) for s in stages}
    assert found == {"blocks.1": (8, 2, 1), "blocks.3": (16, 1, 1), "blocks.5": (16, 1, 1), "blocks.7": (16, 1, 1)}
    tokens = torch.arange(1.0, 14).view(1, 13, 1)
    assert stages[1].spatial(tokens, (48, 64)).squeeze().tolist() == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12, 13]]
    e = Explanandum(classifier, 5, "multilabel", mean=[0.5] * 3, std=[0.5] * 3)
    net = Explainer("fpn", 5, {"width": 16}, image_size=64, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e).eval()
    with torch.no_grad():
        assert net.network(torch.rand(1, 3, 64, 96)).shape == (1, 5, 8, 12)
        seen = {}
        handles = [classifier.blocks[i].register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out)) for i in (1, 3, 5, 7)]
        x = torch.rand(2, 3, 64, 64)
        classifier(x)
        for handle in handles:
            handle.remove()
        maps, _ = net.network.features(x)
    for i, found in zip((1, 3, 5, 7), maps, strict=True):
        assert torch.equal(found.flatten(2), seen[i][:, 1:].transpose(1, 2))


def test_the_finest_of_a_transformers_maps_is_enlarged_by_learned_filters():
    """What the 1x1 filters put into four channels of a position becomes its two by two positions."""
    from explainer.models.shared import _project

    project = _project(1, 1, 2).eval()
    project[0].weight.data = torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1, 1)
    found = project(torch.tensor([[1.0, 10]]).view(1, 1, 1, 2))
    assert torch.allclose(found[0, 0], torch.tensor([[1.0, 2, 10, 20], [3, 4, 30, 40]]), rtol=1e-4)


def test_masks_begin_as_class_activations():
    e, x = resnet(), torch.rand(2, 3, 64, 64)
    e.classifier.fc.weight.data.mul_(100)  # so that the constant that keeps flat maps finite is small beside the activation
    net = Explainer("fpn", 6, {}, image_size=64, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e).eval()
    nn.init.zeros_(net.network.head.from_head.weight)  # what is learned contributes nothing: the start is left
    seen = {}
    for name in ("layer3", "layer4"):
        e.classifier.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        logits = net.network((x - 0.5) / 0.5)
        scores = e(x)
    cam = torch.einsum("bchw,kc->bkhw", seen["layer4"], e.classifier.fc.weight)  # Zhou et al. 2016
    cam = nn.functional.interpolate(cam, (4, 4), mode="bilinear").flatten(2)
    spread = torch.zeros_like(cam)
    f = (seen["layer3"] - seen["layer3"].mean((2, 3), keepdim=True)).flatten(2)
    for b in range(2):
        for i in range(16):  # each position takes the mean of those whose features point its way
            weights = torch.stack([nn.functional.cosine_similarity(f[b, :, i], f[b, :, j], dim=0).clamp_min(0) for j in range(16)])
            spread[b, :, i] = (cam[b] * weights).sum(1) / weights.sum()
    z = (spread - spread.mean(2, keepdim=True)) / spread.std(2, keepdim=True, unbiased=False)
    z = nn.functional.interpolate(z.unflatten(2, (4, 4)), (8, 8), mode="bilinear")
    fitted = guided_filter(z, nn.functional.adaptive_avg_pool2d(x, 8), 0.15, 3e-4)
    expected = nn.functional.interpolate(2 * fitted, (16, 16), mode="bilinear") - 1
    expected = expected + 0.5 * nn.functional.logsigmoid(scores).clamp_min(-8)[..., None, None]
    assert torch.allclose(logits, expected, atol=1e-2)


@pytest.mark.parametrize("start", ["competition", "foreground"])
def test_masks_begin_as_shares_of_the_classes_in_a_position(start):
    e, x = resnet(), torch.rand(2, 3, 64, 64)
    e.classifier.fc.weight.data.mul_(100)
    options = {"start": start}
    net = Explainer("fpn", 6, options, image_size=64, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e).eval()
    nn.init.zeros_(net.network.head.from_head.weight)
    nn.init.constant_(net.network.head.contrast, 0.7)
    seen = {}
    for name in ("layer3", "layer4"):
        e.classifier.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        logits = net.network((x - 0.5) / 0.5)
        log_p = nn.functional.logsigmoid(e(x)).clamp_min(-8)
        some = net.network.with_scores((x - 0.5) / 0.5, lambda _: torch.tensor([[4, 1], [0, 5]]))[2]
    assert torch.allclose(some, torch.stack([logits[0, [4, 1]], logits[1, [0, 5]]]), atol=1e-4), "all compete, few are asked for"
    evidence = torch.zeros(2, 6, 4, 4)
    for b in range(2):
        a = torch.einsum("chw,kc->khw", seen["layer4"][b], e.classifier.fc.weight.detach())
        for row in range(2):
            for column in range(2):
                odds = [0.7 * float((a[k, row, column] - a.mean()) / a.std(unbiased=False).detach()) + float(log_p[b, k]) for k in range(6)]
                evidence[b, :, row, column] = torch.tensor(odds).softmax(0)
        if start == "foreground":
            mean = seen["layer4"][b].mean(0)
            evidence[b, :, :2, :2] *= (mean - mean.min()) / (mean.max() - mean.min())
    shares = nn.functional.interpolate(evidence[:, :, :2, :2], (4, 4), mode="bilinear").flatten(2)
    f = (seen["layer3"] - seen["layer3"].mean((2, 3), keepdim=True)).flatten(2)
    spread = torch.zeros_like(shares)
    for b in range(2):
        for i in range(16):
            alike = torch.stack([nn.functional.cosine_similarity(f[b, :, i], f[b, :, j], dim=0).clamp_min(0) for j in range(16)]) ** 3
            spread[b, :, i] = (shares[b] * alike).sum(1) / alike.sum()
    z = (spread - spread.mean(2, keepdim=True)) / (spread.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
    z = nn.functional.interpolate(z.unflatten(2, (4, 4)), (8, 8), mode="bilinear")
    fitted = guided_filter(z, nn.functional.adaptive_avg_pool2d(x, 8), 0.15, 3e-4)
    expected = nn.functional.interpolate(2 * fitted, (16, 16), mode="bilinear") - 1 + 0.5 * log_p[..., None, None]
    assert torch.allclose(logits, expected, atol=1e-2)


def test_the_start_is_named_or_refused():
    with pytest.raises(ConfigError, match="start must be one of activation, competition, foreground, none, received 'cam'"):
        Explainer("fpn", 6, {"start": "cam"}, encoder="shared", explanandum=resnet(), image_size=64)
    none = Explainer("fpn", 6, {"start": "none", "width": 16}, encoder="shared", explanandum=resnet(), image_size=64)
    assert none.network.head.gain is None and none.network.head.contrast is None


def test_the_classifier_stays_frozen_and_out_of_the_state(tmp_path):
    e = resnet()
    before = {k: v.clone() for k, v in e.classifier.state_dict().items()}
    net = Explainer("deeplabv3plus", 6, {"width": 16}, image_size=64, encoder="shared", explanandum=e)
    net.train()
    assert not any(m.training for m in net.network.classifier.modules()) and net.network.decoder.training
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    net(torch.rand(2, 3, 64, 64)).mean().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in e.classifier.state_dict().items())
    e.classifier.train()  # its user may do that: the masks stay those of the classifier at rest
    x = torch.rand(2, 3, 64, 64)
    net.eval()
    masks = net(x)
    e.classifier.train()
    assert torch.equal(net(x), masks) and torch.equal(e.classifier.bn1.running_mean, before["bn1.running_mean"])
    state = net.state_dict()
    assert state and not any("classifier" in k for k in state)
    other = Explainer("deeplabv3plus", 6, {"width": 16}, image_size=64, encoder="shared", explanandum=e)
    other.load_state_dict(state)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), net.eval()(x))


@pytest.mark.parametrize("order", [0.0, 2.0])
@pytest.mark.parametrize("classes", [[2, 0], [[2, 0], [1, 5]]])
def test_chosen_classes_are_columns_of_all(classes, order):
    e, x = resnet(), torch.rand(2, 3, 64, 64)
    net = Explainer("fpn", 6, {"width": 16, "order": order}, encoder="shared", explanandum=e, image_size=64).eval()
    nn.init.normal_(net.network.head.own)
    if order:
        nn.init.normal_(net.network.head.rank_own)
        e.classifier.fc.weight.data.mul_(100)  # activations whose rounding is small beside them
    with torch.no_grad():
        every, some = net(x), net(x, classes)
    rows = torch.tensor(classes).expand(2, 2)
    assert torch.allclose(some, torch.stack([every[i, rows[i]] for i in range(2)]), atol=1e-4 if order else 1e-5)


def test_decoders_differ_in_the_stages_that_they_read():
    """One skip of DeepLabV3+, two of Panoptic-DeepLab, all of a feature pyramid."""
    stages = [Stage("", stride, 8) for stride in (4, 8, 16, 32)]
    kinds = ("deeplabv3plus", "panoptic_deeplab", "fpn")
    assert [FeatureDecoder(stages, 8, kind).used for kind in kinds] == [[0], [0, 1], [0, 1, 2]]
    maps = [torch.rand(1, 8, side, side) for side in (16, 8, 4, 2)]
    assert all(FeatureDecoder(stages, 8, kind).eval()(maps).shape == (1, 8, 16, 16) for kind in kinds)


def test_bfloat16_autocast_changes_little_even_where_the_image_is_flat():
    """The filter divides by variances of 3e-4, which bfloat16 does not hold: it gave NaN."""
    torch.manual_seed(0)
    e = Explanandum(build_classifier("small_vgg", 6), 6, "multilabel")
    options = {"layers": ["features.5", "features.12", "features"]}
    net = Explainer("panoptic_deeplab", 6, options, image_size=32, encoder="shared", explanandum=e).eval()
    images = Shapes("test", size=32, length=8)
    images = torch.stack([images[i].image for i in range(8)])
    with torch.no_grad():
        exact = net(images)
        with torch.autocast("cpu", torch.bfloat16):
            masks = net(images)
    assert masks.isfinite().all() and (masks - exact).abs().mean() < 0.02


def test_an_order_by_hand():
    """r = 2: an edge stays an edge, far inside 2 r +- r, far outside -2 r +- r; atanh(0.5) = 0.5493."""
    extent = torch.tensor([0.0, 0.0, 50, 50, 50, -50, -50, 0.5493061])
    rank = torch.tensor([9.0, -9.0, 50, 0, -50, 50, -50, 50])
    assert torch.allclose(ordered(extent, rank, 2.0), torch.tensor([0.0, 0, 6, 4, 2, -2, -6, 2.5]), atol=1e-5)


def test_pixels_are_ordered_by_the_class_activation_and_no_edge_moves():
    e, x = resnet(), torch.rand(2, 3, 64, 64)
    e.classifier.fc.weight.data.mul_(100)
    options = {"image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "encoder": "shared", "explanandum": e}
    plain = Explainer("fpn", 6, {}, **options).eval()
    net = Explainer("fpn", 6, {"order": 1.5}, **options).eval()
    missing, unexpected = net.load_state_dict(plain.state_dict(), strict=False)
    added = [key for key in missing if "classifier" not in key and "order_decoder" not in key]
    assert added == ["network.head.rank_own", "network.head.rank_from_head.weight"] and not unexpected
    for one in (plain, net):
        one.network.head.bias.data.fill_(40.0)  # every pixel is far inside
    seen = {}
    e.classifier.layer4.register_forward_hook(lambda _, __, out: seen.__setitem__("deep", out))
    with torch.no_grad():
        inside = net.network((x - 0.5) / 0.5)
        cam = torch.einsum("bchw,kc->bkhw", seen["deep"], e.classifier.fc.weight).clamp_min(0)  # Grad-CAM of a linear head
        share = nn.functional.interpolate(cam / cam.amax((2, 3), keepdim=True).clamp_min(1e-6), (16, 16), mode="bilinear")
        assert torch.allclose(inside, 1.5 * (2 + (2 * share - 1).tanh()), atol=1e-4)
        for one in (plain, net):
            one.network.head.bias.data.fill_(0.0)
        # at the decoder's resolution: enlarged maps cross 0 between its positions
        assert torch.equal(net.network((x - 0.5) / 0.5) > 0, plain.network((x - 0.5) / 0.5) > 0)
    with pytest.raises(ConfigError, match=r"order must be a number of at least 0, received -1"):
        Explainer("fpn", 6, {"order": -1}, **options)


def test_an_order_is_trained_apart_and_masks_end_where_they_would_without_one():
    """Losses on the masks see the network without an order, and losses on the order reach no weight that decides where a mask ends."""
    e, x = resnet(), torch.rand(2, 3, 64, 64)
    options = {"image_size": 64, "encoder": "shared", "explanandum": e}
    torch.manual_seed(3)
    plain = Explainer("fpn", 6, {"width": 16}, **options).eval()
    torch.manual_seed(3)
    net = Explainer("fpn", 6, {"width": 16, "order": 2.0}, **options).eval()
    for weight in (net.network.head.rank_own, net.network.head.rank_from_head.weight):
        nn.init.normal_(weight)
    extent, order = net.logits_and_order(x)
    assert torch.allclose(extent, plain.logits(x), atol=1e-5) and torch.allclose(order, net.logits(x), atol=1e-5)
    assert (order - extent).abs().max() > 1
    assert net.has_order and not plain.has_order
    ranking = {name for name, _ in net.named_parameters() if "rank" in name or "order" in name}
    assert {name.split(".")[1] for name in ranking} == {"head", "order_decoder"}
    for loss, reached in ((extent, lambda name: name not in ranking), (order, lambda name: name in ranking)):
        net.zero_grad()
        loss.square().mean().backward(retain_graph=True)
        for name, weight in net.named_parameters():
            if "classifier" not in name:
                assert reached(name) == (weight.grad is not None and bool(weight.grad.any())), name
    named = Explainer("fpn", 6, {"width": 16, "order": 2.0, "order_layers": ["layer4", "layer3"]}, **options).eval()
    named.load_state_dict(net.state_dict())
    assert torch.equal(named.logits(x), net.logits(x)), "by default the two coarsest"
    finer = Explainer("fpn", 6, {"order": 2.0, "order_layers": ["layer1", "layer3"]}, **options)
    assert finer.network.order_decoder.sides["0"][0].in_channels == net.network.decoder.sides["0"][0].in_channels
    with pytest.raises(ConfigError, match=r"order_layers must name at least two different layers, received \['layer3'\]"):
        Explainer("fpn", 6, {"order": 2.0, "order_layers": ["layer3"]}, **options)
    with pytest.raises(ConfigError, match="order_layers says what an order reads"):
        Explainer("fpn", 6, {"order_layers": ["layer3", "layer4"]}, **options)
    with pytest.raises(UnsupportedLayerError, match=r"options\.layers names 'layer9'"):
        Explainer("fpn", 6, {"layers": ["layer3", "layer9"]}, **options)
    with pytest.raises(UnsupportedLayerError, match="order_layers names 'layer9'"):
        Explainer("fpn", 6, {"order": 2.0, "order_layers": ["layer3", "layer9"]}, **options)
    some = net.logits_and_order(x, torch.tensor([4, 1]))
    assert all(torch.allclose(part, whole[:, [4, 1]], atol=1e-4) for part, whole in zip(some, (extent, order), strict=True))


def test_without_a_linear_head_the_order_is_learned_alone():
    torch.manual_seed(0)
    e = Explanandum(build_classifier("torchvision:mobilenet_v3_small", 4), 4, "multilabel")
    net = Explainer("fpn", 4, {"width": 8, "order": 2.0}, image_size=64, encoder="shared", explanandum=e).train()
    assert net.network.head.rank_from_head is None
    net.logits(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert net.network.head.rank_own.grad.abs().max() > 0


def test_what_cannot_share_is_refused():
    with pytest.raises(ConfigError, match="give the classifier"):
        Explainer("fpn", 6, encoder="shared")
    with pytest.raises(ConfigError, match="fpn"):
        Explainer("unet", 6, encoder="shared", explanandum=resnet(), image_size=64)
    with pytest.raises(ConfigError, match="width, layers, start, level, order and order_layers"):
        Explainer("fpn", 6, {"encoder_name": "resnet18"}, encoder="shared", explanandum=resnet(), image_size=64)
    for options, message in (
        ({"width": -4}, r"width must be a whole number of channels, at least 1, received -4"),
        ({"width": 1.5}, "width must be a whole number"),
        ({"layers": "layer2"}, r"layers must be a list of module paths, received 'layer2': write \[layer2"),
        ({"order": 4, "order_layers": "layer2"}, "order_layers must be a list"),
    ):
        with pytest.raises(ConfigError, match=message):
            Explainer("fpn", 6, options, encoder="shared", explanandum=resnet(), image_size=64)
    with pytest.raises(ConfigError, match="downscale"):
        Explainer("fpn", 6, downscale=2, encoder="shared", explanandum=resnet(), image_size=64)


def test_load_needs_the_same_classifier(tmp_path):
    e = resnet()
    net = Explainer("fpn", 6, {"width": 16}, image_size=64, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e)
    saved = {"kind": "explainer", "explainer": net.config, "fingerprint": e.fingerprint(), "task": "multilabel"}
    saved["classifier"] = {"arch": "timm:resnet10t", "options": {}, "checkpoint": str(tmp_path / "gone.ckpt"), "input_size": None}
    path = tmp_path / "net.ckpt"
    torch.save({"state_dict": {f"explainer.{k}": v for k, v in net.state_dict().items()}, "hyper_parameters": saved}, path)
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(explainer.load(path, explanandum=e)(x), net.eval()(x))
    said = []
    assert torch.equal(explainer.load(path, given=lambda about: said.append(about) or e)(x), net(x))
    assert said[0]["classifier"]["arch"] == "timm:resnet10t" and said[0]["task"] == "multilabel" and len(said[0]["classes"]) == 6
    with pytest.raises(CheckpointError, match=r"gone\.ckpt, which is not there"):
        explainer.load(path)
    torch.save(e.classifier.state_dict(), tmp_path / "gone.ckpt")
    assert torch.equal(explainer.load(path)(x), net(x)), "found where training found it"
    torch.manual_seed(1)
    with pytest.raises(FingerprintMismatchError):
        explainer.load(path, explanandum=Explanandum(build_classifier("timm:resnet10t", 6), 6, "multilabel", mean=0.5, std=0.5))


@pytest.mark.parametrize("command", ["explain", "export", "bench"])
def test_commands_open_a_decoder_beside_a_classifier_that_has_moved(tmp_path, command, capsys):
    """--classifier FILE is what the error asks for: a state_dict and a checkpoint elsewhere are opened by what the decoder's file says."""
    e = resnet()
    net = Explainer("fpn", 6, {"width": 16}, image_size=64, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e)
    saved = {"kind": "explainer", "explainer": net.config, "fingerprint": e.fingerprint(), "task": "multilabel"}
    saved["classifier"] = {
        "arch": "timm:resnet10t",
        "options": {},
        "checkpoint": "runs/gone/best.ckpt",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    torch.save({"state_dict": {f"explainer.{k}": v for k, v in net.state_dict().items()}, "hyper_parameters": saved}, tmp_path / "net.ckpt")
    torch.save(e.classifier.state_dict(), tmp_path / "moved.pth")
    Image.fromarray(np.full((64, 64, 3), 120, np.uint8)).save(tmp_path / "picture.png")
    rest = {
        "explain": [str(tmp_path / "picture.png"), "--out", str(tmp_path / "out")],
        "export": ["--out", str(tmp_path / "out")],
        "bench": ["--repeats", "1", "--batch", "1", "--size", "64", "--quiet"],
    }[command]
    assert main([command, str(tmp_path / "net.ckpt"), *rest]) == 2
    assert "--classifier FILE" in capsys.readouterr().err
    assert main([command, str(tmp_path / "net.ckpt"), *rest, "--classifier", str(tmp_path / "moved.pth")]) == 0


@pytest.mark.parametrize("side", [64, 128])
def test_a_map_with_as_many_channels_as_rows_is_a_stage(side):
    """ResNet-18's first stage has 64 channels: of 64 rows at 256 px. Here 16 channels, of 16 rows at 64 px and of 32 at 128."""
    net = nn.Sequential()
    for given, made in [(3, 16), (16, 16), (16, 24), (24, 32), (32, 40)]:
        net.append(nn.Sequential(nn.Conv2d(given, made, 3, stride=2, padding=1), nn.ReLU()))
    net += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 6))
    stages = find_stages(net.eval(), side)
    assert [(s.path, s.stride, s.channels, s.layout) for s in stages] == [
        ("1", 4, 16, CHANNELS_FIRST),
        ("2", 8, 24, CHANNELS_FIRST),
        ("3", 16, 32, CHANNELS_FIRST),
        ("4", 32, 40, CHANNELS_FIRST),
    ]
    assert [s.path for s in named_stages(net, ["1", "3"], side)] == ["1", "3"]


def test_a_decoder_of_before_such_maps_counted_is_opened(tmp_path):
    """It was built without the stage, and its file names no layers."""
    torch.manual_seed(0)
    body = nn.Sequential()
    for given, made in [(3, 16), (16, 16), (16, 24), (24, 32), (32, 40)]:
        body.append(nn.Sequential(nn.Conv2d(given, made, 3, stride=2, padding=1), nn.ReLU()))
    body += nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 6))
    e = Explanandum(body.eval(), 6, "multilabel", mean=0.5, std=0.5)
    fixed = {"image_size": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "encoder": "shared", "explanandum": e}
    before = Explainer("fpn", 6, {"width": 16, "layers": ["2", "3", "4"]}, **fixed).eval()
    saved = {
        "kind": "explainer",
        "explainer": {**before.config, "options": {"width": 16}},
        "fingerprint": e.fingerprint(),
        "task": "multilabel",
    }
    state = {f"explainer.{k}": v for k, v in before.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": saved}, tmp_path / "old.ckpt")
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(explainer.load(tmp_path / "old.ckpt", explanandum=e)(x), before(x))
    assert len(Explainer("fpn", 6, {"width": 16}, **fixed).network.stages) == 4, "a new one reads the stage"


def test_the_layout_of_an_ambiguous_map_is_found_out():
    """Channels last, 16 of them at 16 x 16: the shape is that of channels first."""

    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    class First(nn.Module):
        def forward(self, x):
            return x.permute(0, 3, 1, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last, self.first = nn.Conv2d(3, 16, 4, 4), Last(), First()
            self.body, self.fc = nn.Conv2d(16, 20, 2, 2), nn.Linear(20, 6)

        def forward(self, x):
            return self.fc(self.body(self.first(self.last(self.stem(x)))).mean((2, 3)))

    torch.manual_seed(0)
    assert named_stages(Net().eval(), ["last", "body"], 64)[0].layout.channels == 3
    assert named_stages(Net().eval(), ["first", "body"], 64)[0].layout.channels == 1


class Wrapped(nn.Module):
    def __init__(self, net, how):
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x):
        logits = self.net(x)
        return {"dict": {"logits": logits}, "tuple": (logits, logits), "flat": logits[:, 0]}[self.how] if self.how else logits


@pytest.mark.parametrize(("how", "classes"), [("dict", 6), ("tuple", 6), ("flat", 1)])
def test_a_classifier_may_return_its_logits_in_other_ways(how, classes):
    torch.manual_seed(0)
    body = build_classifier("timm:resnet10t", classes)
    made = []
    for wrapping in (None, how):
        e = Explanandum(Wrapped(body, wrapping).eval(), classes, "multilabel", mean=0.5, std=0.5)
        torch.manual_seed(1)
        net = Explainer("fpn", classes, {"width": 16}, image_size=64, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e).eval()
        x = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        fused = FusedExplainer(net, e).eval()
        made.append((net(x), *fused(x)))
    assert made[0][0].shape == (3, classes, 64, 64)
    for plain, wrapped in zip(*made, strict=True):
        torch.testing.assert_close(plain, wrapped)


def test_a_decoder_on_a_librarys_weights_is_opened_by_their_name(tmp_path, monkeypatch):
    """Nothing is stored of torchvision's weights but their name."""
    whole = torchvision.models.resnet18(num_classes=1000)
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda self, **_: whole.state_dict())
    names = [str(k) for k in range(1000)]
    e = load_explanandum(None, "torchvision:resnet18", {"weights": "IMAGENET1K_V1"}, 1000, task="multiclass", class_names=names)
    mean, std = e.normalization
    net = Explainer("fpn", 1000, {"width": 8}, image_size=64, mean=mean, std=std, class_names=names, encoder="shared", explanandum=e).eval()
    saved = {"kind": "explainer", "explainer": net.config, "fingerprint": e.fingerprint(), "task": "multiclass"}
    saved["classifier"] = {"arch": "torchvision:resnet18", "options": {"weights": "IMAGENET1K_V1"}, "checkpoint": None, "input_size": None}
    torch.save({"state_dict": {f"explainer.{k}": v for k, v in net.state_dict().items()}, "hyper_parameters": saved}, tmp_path / "net.ckpt")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(explainer.load(tmp_path / "net.ckpt")(x, [3]), net(x, [3]))
    saved["classifier"]["options"] = {"weights": "http://example.org/w.pth"}
    torch.save({"state_dict": {f"explainer.{k}": v for k, v in net.state_dict().items()}, "hyper_parameters": saved}, tmp_path / "net.ckpt")
    with pytest.raises((CheckpointError, FingerprintMismatchError)):
        explainer.load(tmp_path / "net.ckpt")


def test_images_that_the_classifier_cannot_take_are_an_error_with_words():
    """timm asserts the size of a transformer's images; a pooling has none left of one pixel."""
    vit = build_classifier("timm:vit_tiny_patch16_224", 6, img_size=96, depth=4)
    e = Explanandum(vit, 6, "multilabel", mean=0.5, std=0.5)
    net = Explainer("fpn", 6, {"width": 16}, image_size=96, mean=[0.5] * 3, std=[0.5] * 3, encoder="shared", explanandum=e).eval()
    assert net(torch.rand(1, 3, 96, 96)).shape == (1, 6, 96, 96)
    for ask in (net, e):
        with pytest.raises(ShapeError, match=r"cannot take images of 96x109 pixels .*input_size"):
            ask(torch.rand(1, 3, 96, 109))
    pooling = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 6))
    with pytest.raises(ShapeError, match="cannot take images of 1x1 pixels"):
        Explanandum(pooling, 6, mean=0.5, std=0.5)(torch.rand(1, 3, 1, 1))
