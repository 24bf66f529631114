"""The kernel of the relevance methods: networks of every shape, conservation, and the classifier left as it was."""

import gc
import hashlib
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.densenet import DenseNet
from torchvision.models.vgg import make_layers
from torchvision.ops.misc import FrozenBatchNorm2d

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels.hooks import untouched
from explainer.baselines.kernels.relevance import trace
from explainer.baselines.kernels.relevance_rules import Rules, epsilon_rule
from explainer.errors import ConfigError, UnsupportedLayerError
from tests.golden.cases import ResNetLike

METHODS = ["lrp", "lrp_alpha_beta", "lrp_zplus", "clrp", "sglrp", "rap", "excitation_backprop", "contrastive_excitation_backprop"]


def randomize(net, seed=0):
    """Weights of a trained network's size, batch-norm statistics that matter, biases of both signs."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval()
    for name, value in net.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        if value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        elif name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif name.endswith("bias") or name.endswith("running_mean"):
            value.copy_(0.1 * noise)
        else:
            value.copy_(1 + 0.1 * noise)
    return net


class SmallVGG(nn.Module):
    """torchvision's VGG with a small head."""

    def __init__(self, **options):
        super().__init__()
        self.features = make_layers([4, "M", 8, "M"], **options)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(nn.Linear(8 * 49, 6), nn.ReLU(True), nn.Dropout(), nn.Linear(6, 4))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def small_resnet(block, expansion):
    """torchvision's blocks (one in-place ReLU shared by two or three places) in its layout."""
    stages = [[[block, 8, 4, 1], [block, 4 * expansion, 4, 1]], [[block, 4 * expansion, 8, 2]]]
    return ResNetLike([3, 8, 7, 2, 3], [3, 2, 1], stages, [8 * expansion, 4])


NETWORKS = {
    "resnet_basic": lambda: small_resnet("basicblock", 1),
    "resnet_bottleneck": lambda: small_resnet("bottleneck", 4),
    "vgg": lambda: SmallVGG(),
    "vgg_bn": lambda: SmallVGG(batch_norm=True),
    "densenet": lambda: DenseNet(4, (2, 2), num_init_features=8, num_classes=4),
}


@pytest.fixture(scope="module")
def networks():
    made = {}

    def get(name):
        if name not in made:
            made[name] = Explanandum(randomize(NETWORKS[name]()), 4, mean=0.4, std=0.3)
        return made[name]

    return get


def pictures(count=1, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_epsilon_rule_is_input_times_gradient_on_relu_networks(networks, name):
    """With epsilon -> 0 and the logit at the start (Shrikumar et al. 2016); folding, sums and shared ReLUs included."""
    explanandum, images = networks(name), pictures()
    x = explanandum.normalize(images).requires_grad_()
    logits = explanandum.classifier(x)
    (gradient,) = torch.autograd.grad(logits[0, 2], x)
    expected = (x * gradient).detach()
    actual = build("lrp", explanandum, epsilon=1e-13, stabilizer=1e-13).relevance(images, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck", "vgg_bn"])
def test_epsilon_relevance_and_the_biases_share_sum_to_the_logit(networks, name):
    explanandum, images = networks(name), pictures()
    classifier = explanandum.classifier
    x = explanandum.normalize(images)
    with untouched(classifier):
        classifier.requires_grad_(True)
        logit = classifier(x)[0, 1]
        absorbed = 0.0
        for module in classifier.modules():
            bias = getattr(module, "bias", None)
            if bias is None:
                continue
            (gradient,) = torch.autograd.grad(logit, bias, retain_graph=True)
            if isinstance(module, nn.BatchNorm2d):  # what it adds to g x
                bias = bias - module.running_mean * module.weight / (module.running_var + module.eps).sqrt()
            absorbed += float((bias * gradient).sum().detach())
    total = float(build("lrp", explanandum, epsilon=1e-13, stabilizer=1e-13)(images, 1).sum())
    assert abs(absorbed) > 1e-3 * abs(float(logit.detach()))
    assert total + absorbed == pytest.approx(float(logit.detach()), rel=1e-6)


def without_biases(net):
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith(("bias", "running_mean")):
                value.zero_()
    return net


@pytest.mark.parametrize("name", ["resnet_basic", "resnet_bottleneck", "vgg", "vgg_bn"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lrp", {}),
        ("lrp", {"rule": "gamma"}),
        ("lrp", {"rule": "epsilon_plus"}),
        ("lrp", {"rule": "zplus_zero_bias"}),
        ("lrp", {"rule": "zplus_zero_bias", "first_layer": "z_box", "max_pool": "proportional"}),
        ("lrp_zplus", {}),
        ("lrp_zplus", {"contributions": "positive", "first_layer": "w_square"}),
        ("rap", {}),
    ],
)
def test_relevance_is_conserved_without_biases(name, method, options):
    """What starts at the logit arrives at the pixels, through pooling, folded batch norms and residual sums."""
    explanandum = Explanandum(without_biases(randomize(NETWORKS[name](), seed=4)), 4, mean=0.4, std=0.3)
    images = pictures(2)
    logits, best = explanandum(images).max(dim=1)
    assert float(logits.min()) > 0
    total = build(method, explanandum, **options)(images, best).sum((1, 2))
    torch.testing.assert_close(total, logits, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["vgg", "vgg_bn"])
def test_excitation_signal_is_a_probability(name):
    explanandum = Explanandum(without_biases(randomize(NETWORKS[name](), seed=4)), 4, mean=0.4, std=0.3)
    images = pictures(2)
    attributor = build("excitation_backprop", explanandum, layer="features.2")
    signal = attributor.relevance(images, explanandum(images).argmax(dim=1))
    torch.testing.assert_close(signal.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(signal.min()) >= 0


@pytest.mark.parametrize("method", METHODS)
def test_batches_classes_repeats_and_precision(networks, method):
    explanandum, images = networks("resnet_basic"), pictures(2)
    attributor = build(method, explanandum)
    maps = attributor(images, [1, 3])
    assert torch.equal(maps, attributor(images, [1, 3]))
    assert maps.dtype == torch.float64 and not maps.requires_grad and bool(maps.isfinite().all())
    single = torch.stack([attributor(images[:1], 1)[0], attributor(images[1:], 3)[0]])
    torch.testing.assert_close(maps, single, rtol=1e-6, atol=1e-8 * float(maps.abs().max()))
    every = attributor.all_classes(images)
    assert every.shape == (2, 4, 32, 32)
    torch.testing.assert_close(every[0, 1], maps[0], rtol=1e-8, atol=1e-10 * float(maps.abs().max()))
    torch.testing.assert_close(attributor.all_classes(images, [3])[1, 0], maps[1], rtol=1e-8, atol=1e-10 * float(maps.abs().max()))
    assert float((every[:, 0] - every[:, 1]).abs().max()) > 1e-3 * float(every.abs().max())
    assert attributor.signed or float(maps.min()) >= 0
    with torch.inference_mode():
        assert torch.equal(attributor(images, [1, 3]), maps)


def test_float32():
    double = Explanandum(randomize(NETWORKS["vgg"]()), 4)
    images = pictures()
    expected = build("lrp", double)(images, 1)
    actual = build("lrp", double.float())(images.float(), 1)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def state(model):
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().numpy().tobytes())
    return (
        digest.hexdigest(),
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "inplace", None)) for m in model.modules()],
        [(p.requires_grad, p.grad) for p in model.parameters()],
        torch.get_rng_state().sum().item(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_classifier_is_left_as_it_was(networks, method):
    explanandum = networks("resnet_basic")
    images = pictures()
    kept, before = images.clone(), state(explanandum)
    build(method, explanandum)(images, 0)
    build(method, explanandum).relevance(images, 0, at="layer2")
    assert state(explanandum) == before and torch.equal(images, kept)


def test_the_classifier_is_left_as_it_was_after_an_error():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(144, 2), nn.Softmax(1)).double()
    explanandum = Explanandum(net, 2)
    before = state(explanandum)
    with pytest.raises(UnsupportedLayerError):
        build("lrp", explanandum)(pictures(side=8), 0)
    assert state(explanandum) == before
    with pytest.raises(RuntimeError):
        build("lrp", explanandum)(pictures(side=9), 0)
    assert state(explanandum) == before


def test_recorded_passes_are_freed_without_the_garbage_collector(networks):
    explanandum = networks("resnet_basic")
    gc.collect()
    gc.disable()
    try:
        with untouched(explanandum):
            record = trace(explanandum, pictures(), Rules(lambda _: epsilon_rule), "lrp")
            watched = [weakref.ref(record.logits), weakref.ref(record.layers[0].source), weakref.ref(record.layers[-1].out)]
            del record
        assert [w() for w in watched] == [None, None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------- ways of writing the same network
class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 2)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        y = self.relu1(self.a(x))
        z = self.b(y) + y
        return self.head(self.relu2(z).mean((2, 3)))


class Terse(Plain):
    """The same numbers with in-place operations whose results are dropped, functional calls and views."""

    def forward(self, x):
        y = F.conv2d(x, self.a.weight, self.a.bias, padding=1)
        F.relu_(y)
        z = self.b(y)
        z += y
        z.relu_()
        pooled = F.adaptive_avg_pool2d(z, 1).view(x.size(0), -1)
        return pooled @ self.head.weight.t() + self.head.bias


class Detour(Plain):
    """The same numbers through cat, chunk, indexing, scaling and one shared in-place ReLU."""

    def forward(self, x):
        self.relu1.inplace = True
        y = self.relu1(self.a(x))
        y = torch.cat([y[:, :1], *torch.chunk(y[:, 1:], 3, dim=1)], dim=1)
        z = self.relu1(torch.add(self.b(y), y) * 2.0 / 2.0)
        return self.head(F.avg_pool2d(F.dropout(z, training=False), z.shape[-1]).squeeze(-1).squeeze(-1))


@pytest.mark.parametrize("form", [Terse, Detour])
@pytest.mark.parametrize("method", ["lrp", "lrp_alpha_beta", "excitation_backprop"])
def test_the_map_does_not_depend_on_how_the_network_is_written(form, method):
    plain = randomize(Plain(), seed=1)
    other = form().double().eval()
    other.load_state_dict(plain.state_dict())
    images = pictures(2, side=8)
    expected = build(method, Explanandum(plain, 2))(images, [0, 1])
    actual = build(method, Explanandum(other, 2))(images, [0, 1])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


def test_relevance_at_layers_of_a_written_out_network():
    explanandum = Explanandum(randomize(Plain(), seed=1), 2)
    images = pictures(side=8)
    attributor = build("lrp", explanandum, rule="zplus_zero_bias")
    logit = float(explanandum(images)[0, 1])
    for layer in ("relu2", "relu1", "a"):
        assert float(attributor.relevance(images, 1, at=layer).sum()) == pytest.approx(logit, rel=1e-4)
    branch = float(attributor.relevance(images, 1, at="b").sum())
    assert 0 < branch / logit < 1
    with pytest.raises(ConfigError, match="nowhere"):
        attributor.relevance(images, 1, at="nowhere")


@pytest.mark.parametrize("activation", [nn.LeakyReLU(0.1), nn.ELU(), nn.SiLU(), nn.GELU(), nn.Tanh(), nn.Hardswish()])
def test_other_activations_pass_relevance(activation):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    explanandum = Explanandum(randomize(net, seed=2), 2)
    attributor = build("lrp", explanandum)
    images = pictures(side=8)
    torch.testing.assert_close(attributor.relevance(images, 0, at="0"), attributor.relevance(images, 0, at="1"))
    assert float(attributor(images, 0).abs().max()) > 0


def test_constant_scales_and_shifts_are_folded_like_a_batch_norm():
    class Frozen(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), norm, nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))

    plain = randomize(Frozen(nn.BatchNorm2d(4)), seed=5)
    frozen = Frozen(FrozenBatchNorm2d(4)).double().eval()
    frozen.load_state_dict({k: v for k, v in plain.state_dict().items() if "num_batches" not in k})
    images = pictures(side=8)
    for method in ("lrp", "lrp_alpha_beta", "rap"):
        expected = build(method, Explanandum(plain, 2))(images, 1)
        actual = build(method, Explanandum(frozen, 2))(images, 1)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


# ---------------------------------------------------------------- what has no rule
class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        y = self.conv(x)
        return self.head((y * y.sigmoid()).mean((2, 3)))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Hidden(nn.Module):
    def __init__(self, at_the_end):
        super().__init__()
        self.conv, self.at_the_end = nn.Conv2d(3, 2, 3), at_the_end

    def forward(self, x):
        y = self.conv(x).mean((2, 3))
        return Double.apply(y) if self.at_the_end else Double.apply(y) + 0.0


class Compiled(nn.Module):
    """What ``torch.compile`` leaves visible of a module."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module

    def forward(self, x):
        return self._orig_mod(x)


class Writes(nn.Module):
    def forward(self, x):
        y = x * 1.0
        y[:, 0] = 0
        return y.mean((2, 3))[:, :2]


def attention():
    return nn.Sequential(nn.Flatten(2), nn.Softmax(dim=-1), nn.Flatten(), nn.Linear(192, 2))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Gate, ["'mul'", "Gate", "by features"]),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.InstanceNorm2d(4)), nn.Flatten(), nn.Linear(144, 2)),
            ["instance_norm", "'1.0'", "InstanceNorm2d", "operation 6"],
        ),
        (attention, ["softmax", "'1'", "Softmax"]),
        (lambda: Hidden(False), ["custom autograd function"]),
        (lambda: Hidden(True), ["Hidden", "can be watched"]),
        (lambda: nn.Sequential(nn.Flatten(), Compiled(nn.Linear(192, 2))), ["compiled", "'1'"]),
        (Writes, ["__setitem__", "Writes"]),
    ],
)
def test_an_operation_without_a_rule_is_named(net, words):
    explanandum = Explanandum(net().double(), 2)
    with pytest.raises(UnsupportedLayerError) as error:
        build("lrp", explanandum)(pictures(side=8), 0)
    for word in [*words, "lrp", "integrated_gradients"]:
        assert word in str(error.value)


def test_a_linear_classifier_of_pixels_and_constants():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.ones(x.shape[0], 2, dtype=x.dtype)

    with pytest.raises(UnsupportedLayerError, match="does not depend on the image"):
        build("lrp", Explanandum(Constant(), 2))(pictures(side=8), 0)
    means = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match="at least one"):
        build("rap", Explanandum(means, 3))(pictures(side=8), 0)
    images = pictures(side=8)
    actual = build("lrp", Explanandum(means, 3, mean=0.0, std=1.0)).relevance(images, 1)
    expected = torch.zeros_like(images)
    expected[:, 1] = images[:, 1] / 64
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)
