"""CAM methods and NormGrad against hand-worked maps and slow derivations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels.cam import contrasted
from explainer.errors import ConfigError, UnsupportedLayerError
from explainer.models.families import FAMILIES

FAMILY = [
    "grad_cam",
    "grad_cam_pp",
    "x_grad_cam",
    "layer_cam",
    "hires_cam",
    "grad_cam_elementwise",
    "competition_cam",
    "score_cam",
    "ablation_cam",
    "norm_grad",
]


def gap_net() -> nn.Sequential:
    """Feature maps, global average pooling, one linear layer: Zhou et al.'s CAM is exact."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        ).double()


def deep_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(5 * 3 * 3, 6),
            nn.ReLU(),
            nn.Linear(6, 3),
        ).double()


def random_images(batch: int = 2, side: int = 6) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def minmax(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low + 1e-7)


def test_on_a_gap_network_the_weights_are_the_linear_layers() -> None:
    net = gap_net()
    model = Explanandum(net, 3, mean=0.3, std=0.2)
    images = random_images()
    features = net[:2](model.normalize(images))
    weights = net[4].weight[1].view(1, -1, 1, 1) / 36  # d mean / d A = 1 / (h w)
    cam = (weights * features).sum(1)
    torch.testing.assert_close(build("grad_cam", model, layer="1")(images, 1), cam.clamp(min=0))
    torch.testing.assert_close(build("grad_cam", model)(images, 1), cam.clamp(min=0))  # found by itself
    torch.testing.assert_close(build("grad_cam", model, relu=False)(images, 1), cam)
    torch.testing.assert_close(build("grad_cam", model, convention="captum")(images, 1), cam)
    torch.testing.assert_close(build("grad_cam", model, convention="pytorch_grad_cam")(images, 1), minmax(minmax(cam.clamp(min=0))))
    # gradients are constant over space, so these coincide with CAM
    torch.testing.assert_close(build("hires_cam", model, convention="captum")(images, 1), cam)
    torch.testing.assert_close(build("x_grad_cam", model, convention="captum")(images, 1), cam, rtol=1e-6, atol=1e-9)
    positive = (weights.clamp(min=0) * features).sum(1)
    torch.testing.assert_close(build("layer_cam", model, convention="captum")(images, 1), positive)
    torch.testing.assert_close(build("grad_cam_elementwise", model, convention="captum")(images, 1), positive)


def test_hires_cam_sums_to_the_logit_without_its_bias_and_grad_cam_does_not() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).double()
    model = Explanandum(net, 2, mean=0.0, std=1.0)
    images = random_images()
    logit = model(images)[:, 1] - net[3].bias[1]
    torch.testing.assert_close(build("hires_cam", model, layer="1").layer_maps(images, 1)[0].sum((1, 2)), logit)
    torch.testing.assert_close(build("x_grad_cam", model, layer="1").layer_maps(images, 1)[0].sum((1, 2)), logit, rtol=1e-5, atol=1e-7)


class Given(nn.Module):
    """Feature maps = the first channels of the image; s_0 = sum V * A + sum Q * A^2 / 2."""

    def __init__(self, linear: Tensor, square: Tensor) -> None:
        super().__init__()
        self.read = nn.Identity()
        self.linear, self.square = linear, square

    def forward(self, x: Tensor) -> Tensor:
        a = self.read(x[:, : len(self.linear)])
        return (self.linear * a + self.square * a**2 / 2).sum((1, 2, 3))[:, None]


def test_grad_cam_pp_by_hand() -> None:
    images = torch.tensor([[[[1.0, 2.0]], [[4.0, 1.0]], [[0.0, 0.0]]]]).double()
    linear = torch.tensor([[[1.0, -2.0]], [[0.0, 3.0]]]).double()
    model = Explanandum(Given(linear, torch.zeros(2, 1, 2).double()), 1, mean=0.0, std=1.0)
    # channel 0: sum A = 3; g = 1: 1/(2+3) * 1 = 1/5; g = -2: relu 0.  channel 1: sum A = 5; g = 0: alpha 0; g = 3: 9/(18+5*27) * 3
    first, second = 1 / (5 + 1e-6), 27 / (153 + 1e-6)
    expected = torch.tensor([[[first * 1 + second * 4, first * 2 + second * 1]]], dtype=torch.float64)
    torch.testing.assert_close(build("grad_cam_pp", model, layer="read").layer_maps(images, 0)[0], expected, rtol=1e-12, atol=0)


def test_layer_cam_and_grad_cam_by_hand() -> None:
    images = torch.tensor([[[[1.0, 2.0]], [[4.0, 1.0]], [[0.0, 0.0]]]]).double()
    linear = torch.tensor([[[1.0, -2.0]], [[0.0, 3.0]]]).double()
    square = torch.tensor([[[0.0, 1.0]], [[-1.0, 0.0]]]).double()
    model = Explanandum(Given(linear, square), 1, mean=0.0, std=1.0)
    # g = V + Q A: [[1, 0], [-4, 3]]
    expected = {
        "layer_cam": [1.0, 3.0],
        "hires_cam": [1.0 - 16.0, 0.0 + 3.0],
        "grad_cam_elementwise": [1.0, 3.0],
        "grad_cam": [0.5 * 1 - 0.5 * 4, 0.5 * 2 - 0.5 * 1],
        "x_grad_cam": [1 / 3 * 1 + (-13 / 5) * 4, 1 / 3 * 2 + (-13 / 5) * 1],
    }
    for name, row in expected.items():
        got = build(name, model, layer="read").layer_maps(images, 0)[0]
        torch.testing.assert_close(got, torch.tensor([[row]], dtype=torch.float64), rtol=1e-6, atol=1e-9, msg=name)


def test_score_and_ablation_cam_against_loops() -> None:
    net = deep_net()
    model = Explanandum(net, 3, mean=[0.3, 0.4, 0.5], std=0.2)
    images = random_images()
    features = net[:5](model.normalize(images)).detach()
    for b, k in ((0, 2), (1, 0)):
        scores, drops = [], []
        for c in range(5):
            mask = functional.interpolate(features[b : b + 1, c : c + 1], (6, 6), mode="bilinear", align_corners=True)
            mask = (mask - mask.min()) / (mask.max() - mask.min() + 1e-8)
            scores.append(net(mask * model.normalize(images[b : b + 1]))[0, k])
            ablated = features[b : b + 1].clone()
            ablated[:, c] = 0
            drops.append(net[5:](ablated)[0, k])
        logit = model(images)[b, k]
        by_score = (torch.stack(scores).softmax(0)[:, None, None] * features[b]).sum(0)
        by_drop = (((logit - torch.stack(drops)) / logit)[:, None, None] * features[b]).sum(0)
        for size in (2, 64):
            index = torch.tensor([2, 0])
            got = build("score_cam", model, layer="4", batch_size=size).layer_maps(images, index)[0][b]
            torch.testing.assert_close(got, by_score)
            got = build("ablation_cam", model, layer="4", batch_size=size).layer_maps(images, index)[0][b]
            torch.testing.assert_close(got, by_drop)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_norm_grad_is_the_norm_of_each_locations_weight_gradient(kernel_size: int) -> None:
    """A real identity convolution is put behind the layer; its weight gradient is split over locations one by one."""
    net = deep_net()
    model = Explanandum(net, 3, mean=0.3, std=0.2)
    images, k = random_images(1), 2
    features = net[:4](model.normalize(images)).detach()  # before the ReLU
    identity = torch.zeros(5, 5, kernel_size, kernel_size).double()
    identity[range(5), range(5), kernel_size // 2, kernel_size // 2] = 1
    rows = []
    for u in range(3):
        for v in range(3):
            weight = identity.clone().requires_grad_()
            out = functional.conv2d(features, weight, padding=kernel_size // 2)
            here = torch.zeros_like(out)
            here[..., u, v] = 1
            out = out * here + (features * (1 - here))  # only location (u, v) depends on the weight
            (slope,) = torch.autograd.grad(net[4:](out)[0, k], weight)
            rows.append(slope.norm())
    expected = torch.stack(rows).view(1, 3, 3)
    got = build("norm_grad", model, layer="3", kernel_size=kernel_size, mode="code").layer_maps(images, k)[0]
    torch.testing.assert_close(got, expected.detach())


def test_norm_grad_contributions_by_hand() -> None:
    images = torch.tensor([[[[1.0, 2.0]], [[4.0, 1.0]], [[0.0, 0.0]]]]).double()
    linear = torch.tensor([[[3.0, -2.0]], [[4.0, 0.0]]]).double()
    model = Explanandum(Given(linear, torch.zeros(2, 1, 2).double()), 1, mean=0.0, std=1.0)
    expected = {
        "convolution": [5 * 17**0.5, 2 * 5**0.5],
        "bias": [5.0, 2.0],
        "scaling": [(9 + 256) ** 0.5, 4.0],
        "selective": [(9 + 256) ** 0.5, 0.0],
    }
    for contribution, row in expected.items():
        got = build("norm_grad", model, layer="read", contribution=contribution, mode="code")(images, 0)
        torch.testing.assert_close(got[0, 0], torch.tensor(row, dtype=torch.float64), msg=contribution)


class TwoScores(nn.Module):
    """Logits a.x + ln 3 and b.x - 7 of the first channel, which has two places."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.read(x[:, :2])[:, 0].flatten(1)
        return torch.stack([x @ x.new_tensor([2.0, 1.0]) + torch.log(x.new_tensor(3.0)), x @ x.new_tensor([-1.0, 5.0]) - 7], dim=1)


def test_norm_grad_of_the_loss_by_hand() -> None:
    model = Explanandum(TwoScores(), 2, task="multiclass", mean=0.0, std=1.0)
    images = torch.tensor([[[[1.0, 3.0]], [[0.0, 0.0]], [[0.0, 0.0]]]]).double()  # a.x = 5, b.x - 7 = 7: p_0 = 3 / (3 + e^2)
    p = 3 / (3 + torch.e**2)
    # slopes of the loss of class 0: (1 - p)(b - a) = (1 - p)(-3, 4); of class 1: p (a - b)
    for k, factor in ((0, 1 - p), (1, p)):
        got = build("norm_grad", model, layer="read")(images, k)
        torch.testing.assert_close(got[0, 0], factor * torch.tensor([3 * 1.0, 4 * 3.0]).double())
    selective = build("norm_grad", model, layer="read", contribution="selective")(images, 0)
    torch.testing.assert_close(selective[0, 0], (1 - p) * torch.tensor([3.0, 0.0]).double())  # the second place speaks for class 1
    several = Explanandum(TwoScores(), 2, mean=0.0, std=1.0)  # multi-label: sigmoid of the class's own logit, 7 for class 1
    got = build("norm_grad", several, layer="read")(images, 1)
    torch.testing.assert_close(got[0, 0], torch.tensor(-7.0).double().sigmoid() * torch.tensor([1 * 1.0, 5 * 3.0]).double())
    code = build("norm_grad", model, layer="read", mode="code")(images, 0)
    torch.testing.assert_close(code[0, 0], torch.tensor([2.0, 3.0]).double())


def test_norm_grad_of_a_sure_classifier_is_not_lost() -> None:
    """In float32 the softmax rounds to 1 at a margin of 40; the loss's slopes, e^-40 times the difference, do not."""
    model = Explanandum(TwoScores(), 2, task="multiclass", mean=0.0, std=1.0)
    images = torch.tensor([[[[9.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]]])
    logits = model(images)[0]
    assert logits.softmax(0)[0] == 1
    got = build("norm_grad", model, layer="read")(images, 0)
    torch.testing.assert_close(got[0, 0, 0], (logits[1] - logits[0]).exp() * 27, rtol=1e-4, atol=0)


def test_norm_grad_mode_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"mode must be paper .* or code .*'logit'"):
        build("norm_grad", Explanandum(deep_net(), 3), mode="logit")


def test_norm_grad_combines_layers() -> None:
    model = Explanandum(deep_net(), 3, mean=0.3, std=0.2)
    images = random_images()
    one, two = (build("norm_grad", model, layer=path)(images, 1) for path in ("1", "4"))
    one, two = (m / m.amax((1, 2), keepdim=True) for m in (one, two))
    product = build("norm_grad", model, layer=["1", "4"])(images, 1)
    torch.testing.assert_close(product, (one * two).sqrt())
    weighted = build("norm_grad", model, layer=["1", "4"], weights=[2.0, 0.5])(images, 1)
    torch.testing.assert_close(weighted, one**2 * two**0.5)
    torch.testing.assert_close(build("norm_grad", model, layer=["1", "4"], combine="mean")(images, 1), (one + two) / 2)
    with pytest.raises(ConfigError, match="one entry per layer"):
        build("norm_grad", model, layer=["1", "4"], weights=[1.0])


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_meta_saliency_is_the_map_after_one_step_of_descent(task: str) -> None:
    images, index, rate = random_images(), torch.tensor([2, 0]), 0.5
    model = Explanandum(deep_net(), 3, task=task, mean=0.3, std=0.2)
    before = copy.deepcopy(model.state_dict())
    got = build("norm_grad", model, layer="4", meta_rate=rate)(images, index)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for b in range(2):
        net = deep_net()
        stepped = Explanandum(net, 3, task=task, mean=0.3, std=0.2)
        optimizer = torch.optim.SGD(net.requires_grad_(True).parameters(), lr=rate)
        logits = net(stepped.normalize(images[b : b + 1]))
        probability = logits.softmax(1) if task == "multiclass" else logits.sigmoid()
        (-probability[0, index[b]].log()).backward()
        optimizer.step()
        net.requires_grad_(False)
        torch.testing.assert_close(got[b], build("norm_grad", stepped, layer="4")(images[b : b + 1], int(index[b]))[0])
    assert not torch.allclose(got, build("norm_grad", model, layer="4")(images, index), rtol=1e-2)


@pytest.mark.parametrize("name", ["gradient", "grad_cam", "excitation_backprop", "lrp"])
def test_meta_saliency_around_any_method(name: str) -> None:
    images, index = random_images(), torch.tensor([2, 0])
    model = Explanandum(deep_net(), 3, task="multiclass", mean=0.3, std=0.2)
    before = copy.deepcopy(model.state_dict())
    got = build("meta_saliency", model, method=name, eps=0.25)(images, index)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    plain = build(name, model)(images, index)
    torch.testing.assert_close(build("meta_saliency", model, method=name, eps=0.0)(images, index), plain)
    assert not torch.allclose(got, plain, rtol=1e-2)
    for b in range(2):
        stepped = Explanandum(deep_net(), 3, task="multiclass", mean=0.3, std=0.2)
        optimizer = torch.optim.SGD(stepped.classifier.requires_grad_(True).parameters(), lr=0.5)  # rate 2 eps
        torch.nn.functional.cross_entropy(stepped.classifier(stepped.normalize(images[b : b + 1])), index[b : b + 1]).backward()
        optimizer.step()
        stepped.classifier.requires_grad_(False)
        torch.testing.assert_close(got[b], build(name, stepped)(images[b : b + 1], int(index[b]))[0])


def test_meta_saliency_of_norm_grad_is_its_own() -> None:
    images, model = random_images(), Explanandum(deep_net(), 3, mean=0.3, std=0.2)
    own = build("norm_grad", model, layer="4", meta_rate=0.5)(images, 1)
    around = build("meta_saliency", model, method="norm_grad", options={"layer": "4"}, eps=0.25)(images, 1)
    torch.testing.assert_close(around, own)
    with pytest.raises(ConfigError, match="does not read the classifier"):
        build("meta_saliency", model, method="edges")


@pytest.mark.parametrize("name", FAMILY)
def test_contract(name: str) -> None:
    model = Explanandum(deep_net(), 3, mean=0.3, std=0.2)
    images, index = random_images(), torch.tensor([2, 0])
    method = build(name, model)
    assert method.layer is None
    with torch.no_grad():
        both = method(images, index)
    assert method.layer == "4"
    singles = torch.cat([method(x[None], k[None]) for x, k in zip(images, index, strict=True)])
    torch.testing.assert_close(both, singles)
    every = method.all_classes(images)
    torch.testing.assert_close(every[torch.arange(2), index], both)
    torch.testing.assert_close(method.all_classes(images, [1, 0]), every[:, [1, 0]])
    assert method.all_classes(images, []).shape == (2, 0, 6, 6)
    assert both.min() >= 0 and every.max() > 0
    assert not torch.allclose(every[:, 0], every[:, 2])
    several = build(name, model, layer=["1", "4"])(images, index)
    assert not torch.allclose(several, both)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(m.inplace for m in (model.classifier[1], model.classifier[4]))
    half = build(name, Explanandum(deep_net().float(), 3, mean=0.3, std=0.2))(images.float(), index)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), both, rtol=1e-3, atol=1e-3 * float(both.max()))


def test_cams_of_several_layers_are_averaged_after_rescaling() -> None:
    model = Explanandum(deep_net(), 3, mean=0.3, std=0.2)
    images = random_images()
    one, two = (build("layer_cam", model, layer=path).layer_maps(images, 1)[0] for path in ("1", "4"))
    two = functional.interpolate(minmax(two)[:, None], (6, 6), mode="bilinear", align_corners=False)[:, 0]
    expected = minmax((minmax(one) + two) / 2)
    torch.testing.assert_close(build("layer_cam", model, layer=["1", "4"])(images, 1), expected)


class Residual(nn.Module):
    """The block changes its normalised features in place, and reads one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu, self.fc = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.relu(self.conv(x)))
        out += x
        return self.fc(self.relu(out).mean((2, 3)))


def test_in_place_operations_after_the_layer_do_not_change_what_is_read() -> None:
    net = Residual().double().eval()
    model = Explanandum(net, 2, mean=0.0, std=1.0)
    images = random_images() - 0.5
    a = net.bn(torch.relu(net.conv(images)))
    slope = (net.fc.weight[1].view(1, 3, 1, 1) / 36) * (a + images > 0)
    expected = (a * slope.mean((2, 3), keepdim=True)).sum(1)
    torch.testing.assert_close(build("grad_cam", model, layer="bn").layer_maps(images, 1)[0], expected)


def test_layers_that_cannot_be_read_are_named() -> None:
    model = Explanandum(Residual().double(), 2)
    images = random_images()
    with pytest.raises(UnsupportedLayerError, match="'relu' is called 2 times"):
        build("grad_cam", model, layer="relu")(images, 0)
    with pytest.raises(UnsupportedLayerError, match=r"'fc' returns \(2, 2\), which is no feature map"):
        build("layer_cam", model, layer="fc")(images, 0)
    with pytest.raises(ConfigError, match="Its modules: conv, bn, relu, fc"):
        build("grad_cam", model, layer="layer4")
    with pytest.raises(ConfigError, match="Its modules"):
        build("grad_cam", model, layer=["conv", "layer4"])
    with pytest.raises(ConfigError, match="twice"):
        build("grad_cam", model, layer=["conv", "conv"])
    with pytest.raises(ConfigError, match="torchray"):
        build("grad_cam", model, convention="keras")
    with pytest.raises(ConfigError, match="bilinear"):
        build("grad_cam", model, interpolation="bicubic")


def test_a_map_without_evidence_is_zero() -> None:
    net = gap_net()
    with torch.no_grad():
        net[4].weight.copy_(-net[4].weight.abs())
    model = Explanandum(net, 3)
    for name in ("grad_cam", "grad_cam_pp", "x_grad_cam", "layer_cam", "hires_cam", "grad_cam_elementwise"):
        assert torch.equal(build(name, model)(random_images(), 0), torch.zeros(2, 6, 6).double()), name


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_contrast_explains_the_class_against_the_others(task: str) -> None:
    """On a network that is linear in the mean of its features the gradient is known: differences of the head's rows."""
    net, images = gap_net(), random_images()
    e = Explanandum(net, 3, task, mean=[0.0] * 3, std=[1.0] * 3)  # type: ignore[arg-type]
    index = torch.tensor([2, 0])
    found = build("hires_cam", e, layer="1", target="contrast", convention="captum")(images, index)
    features, logits, weight = net[:2](images), net(images), net[4].weight
    for b, k in enumerate(index.tolist()):
        others = [j for j in range(3) if j != k]
        if task == "multilabel":
            row = weight[k] - weight.mean(0)
        else:
            row = weight[k] - (logits[b, others].softmax(0)[:, None] * weight[others]).sum(0)
        expected = torch.einsum("chw,c->hw", features[b], row) / 36
        torch.testing.assert_close(found[b], expected.detach(), rtol=1e-6, atol=1e-9)
    one = build("hires_cam", e, layer="1", target="contrast", against=["1"], convention="captum")(images, index)
    for b, k in enumerate(index.tolist()):
        expected = torch.einsum("chw,c->hw", features[b], weight[k] - weight[1]) / 36
        torch.testing.assert_close(one[b], expected.detach(), rtol=1e-6, atol=1e-9)
    for wrong in (["free"], "1", []):
        with pytest.raises(ConfigError, match="against is a list of class names"):
            build("grad_cam", e, target="contrast", against=wrong)
    with pytest.raises(ConfigError, match="against is a list of class names"):
        build("grad_cam", e, against=["1"])
    with pytest.raises(ConfigError, match="target must be one of logit, contrast, received 'softmax'"):
        build("grad_cam", e, target="softmax")


def test_contrasted_logits_by_hand_and_where_one_class_is_certain() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [90.0, -90.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    odds = contrasted(logits, "multiclass")
    slow = torch.stack([logits[:, k] - logits[:, [j for j in range(3) if j != k]].logsumexp(1) for k in range(3)], 1)
    torch.testing.assert_close(odds, slow)
    assert torch.autograd.grad(odds.sum(), logits)[0].isfinite().all()
    assert contrasted(logits[:1], "multilabel").tolist() == [[-1.0, 0.0, 1.0]]
    assert torch.equal(contrasted(logits[:, :1], "multilabel"), logits[:, :1])


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("foreground", [True, False])
def test_classes_compete_for_a_position(task: str, foreground: bool) -> None:
    """Slow derivation, position by position, on a network whose class activations are its head's rows times the features."""
    net, images = gap_net(), random_images()
    e = Explanandum(net, 3, task, mean=[0.0] * 3, std=[1.0] * 3)  # type: ignore[arg-type]
    found = build("competition_cam", e, contrast=2.0, foreground=foreground, convention="torchray").all_classes(images)
    features, logits = net[:2](images).detach(), net(images).detach()
    for b in range(2):
        activations = [
            [[float(net[4].weight[k].detach() @ features[b, :, y, x]) / 36 for x in range(6)] for y in range(6)] for k in range(3)
        ]
        spread = torch.tensor(activations).double().std(unbiased=False).item()
        present = logits[b].sigmoid() if task == "multilabel" else logits[b].softmax(0)
        seen = features[b].mean(0)
        for y in range(6):
            for x in range(6):
                odds = torch.tensor([float(present[k]) * math.exp(2 * activations[k][y][x] / spread) for k in range(3)]).double()
                level = float((seen[y, x] - seen.min()) / (seen.max() - seen.min())) if foreground else 1.0
                torch.testing.assert_close(found[b, :, y, x], odds / odds.sum() * level, rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match="contrast must be above 0, received 0"):
        build("competition_cam", e, contrast=0)


def test_shares_spread_over_positions_that_look_alike() -> None:
    """Slow derivation: every position is the mean of all, weighted by the third power of how alike their features are."""
    net, images = gap_net(), random_images()
    e = Explanandum(net, 3, mean=[0.0] * 3, std=[1.0] * 3)
    plain = build("competition_cam", e, convention="torchray").all_classes(images).flatten(2)
    found = build("competition_cam", e, spread="0", convention="torchray").all_classes(images).flatten(2)
    for b in range(2):
        features = net[0](images[b : b + 1])[0].detach().flatten(1)
        features = features - features.mean(1, keepdim=True)
        for i in range(36):
            weights = torch.stack(
                [functional.cosine_similarity(features[:, i], features[:, j], dim=0).clamp(min=0) ** 3 for j in range(36)]
            )
            torch.testing.assert_close(found[b, :, i], (plain[b] * weights).sum(1) / weights.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["grad_cam", "hires_cam", "norm_grad", "ablation_cam"])
@pytest.mark.parametrize("layer", ["norm", "blocks.1", "blocks.1.mlp"])
def test_a_layer_whose_patches_have_no_say_is_refused(name, layer):
    """Behind the last attention a ViT reads its class token alone: the map was empty, or ablation's rounding noise."""
    model, images = Explanandum(FAMILIES["ViT (timm)"].build(3), 3), torch.rand(2, 3, 64, 64)
    with pytest.raises(UnsupportedLayerError, match=rf"patch tokens of layer '{layer}'.*an earlier layer.*or none"):
        build(name, model, layer=layer)(images, 0)
    assert build(name, model, layer="blocks.1.norm1")(images, 0).amax() > 0
