"""Gradient-type methods on networks whose maps can be written down by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from explainer import Explanandum
from explainer.baselines import build
from explainer.errors import ConfigError, ShapeError, UnsupportedLayerError


class Linear(nn.Module):
    """s_k = sum W_k x: every gradient is W_k."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(2 * 3 * 4, dtype=torch.float64).view(2, 3, 2, 2) - 11)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, self.weight)


def small_net(activation: type[nn.Module] = nn.ReLU, **options: bool) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            activation(**options),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            activation(**options),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, 3),
        )
    return net.double()


def random_images(batch: int = 2, side: int = 6) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_linear_model_by_hand() -> None:
    net = Linear()
    w = net.weight[1].detach()
    images = random_images(1, 2)
    model = Explanandum(net, 2, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 1.0])
    slope = w / torch.tensor([0.5, 0.25, 1.0], dtype=torch.float64).view(3, 1, 1)
    centred = images[0] - torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    expected = {
        "gradient": slope.abs().amax(0),
        "input_x_gradient": (images[0] * slope).sum(0),
        "linear_approx": (centred * slope).sum(0),
        "integrated_gradients": (images[0] * slope).sum(0),
        "smooth_grad": slope.abs().sum(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(build(name, model)(images, 1)[0], value, rtol=1e-9, atol=1e-12, msg=name)
    mean_start = build("integrated_gradients", model, baseline="mean")
    torch.testing.assert_close(mean_start(images, 1)[0], (centred * slope).sum(0))
    signed = build("gradient", model, absolute=False, reduction="mean")
    torch.testing.assert_close(signed(images, 1)[0], slope.mean(0))


def test_integrated_gradients_and_deeplift_shap_are_complete() -> None:
    model = Explanandum(small_net(), 3, mean=0.3, std=0.2)
    images, index = random_images(), torch.tensor([2, 0])
    rows = torch.arange(2)
    drop = (model(images) - model(torch.zeros_like(images)))[rows, index]
    maps = build("integrated_gradients", model, steps=300)(images, index)
    torch.testing.assert_close(maps.sum((1, 2)), drop, rtol=2e-2, atol=2e-3)

    references = random_images(5)[2:]
    expected = model(images)[rows, index] - model(references).mean(0)[index]
    maps = build("deeplift_shap", model, baselines=references)(images, index)
    torch.testing.assert_close(maps.sum((1, 2)), expected, rtol=1e-9, atol=1e-12)
    sampled = build("gradient_shap", model, baselines=references, samples=4000, batch_size=500)(images, index)
    torch.testing.assert_close(sampled.sum((1, 2)), expected, rtol=0.1, atol=0.02)


def test_gradient_shap_of_a_linear_model_and_its_noise() -> None:
    net = Linear()
    model = Explanandum(net, 2, mean=0.0, std=1.0)
    images = random_images(2, 2)
    references = random_images(3, 2)[2:]
    maps = build("gradient_shap", model, baselines=references, samples=3)(images, 0)
    torch.testing.assert_close(maps, ((images - references) * net.weight[0].detach()).sum(1))
    noisy = build("gradient_shap", model, baselines=references, samples=3, stdev=0.5)
    assert not torch.allclose(noisy(images, 0), maps)
    again = noisy(images, 0, generator=torch.Generator().manual_seed(5))
    assert torch.equal(again, noisy(images, 0, generator=torch.Generator().manual_seed(5)))


def test_smooth_grad_draws_from_the_generator_and_averages() -> None:
    model = Explanandum(small_net(), 3, mean=0.0, std=1.0)
    images = random_images()
    method = build("smooth_grad", model, samples=4, stdev=0.3, absolute=False, batch_size=3)
    maps = method(images, 1, generator=torch.Generator().manual_seed(9))
    noise = torch.randn((4, 3, 6, 6), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    plain = build("gradient", model, absolute=False)
    expected = torch.stack([plain.channels(images + 0.3 * n, 1) for n in noise]).mean(0).sum(1)
    torch.testing.assert_close(maps, expected)
    rows = torch.cat([noise, noise + 1])  # captum's order: all rows of the first image, then of the second
    given = build("smooth_grad", model, samples=4, stdev=0.3, absolute=False, noise=rows)
    second = torch.stack([plain.channels(images[1:] + 0.3 * n, 1) for n in noise + 1]).mean(0).sum(1)
    torch.testing.assert_close(given(images, 1), torch.cat([expected[:1], second]))


class TwoUnits(nn.Module):
    """s = v0 relu(a x) + v1 relu(b x), one pixel a time: the rules of the ReLU can be read off."""

    def __init__(self, a: float, b: float, v0: float, v1: float, how: str) -> None:
        super().__init__()
        self.slopes, self.values, self.how = (a, b), (v0, v1), how
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for slope, value in zip(self.slopes, self.values, strict=True):
            unit = slope * x
            if self.how == "module":
                unit = self.relu(unit)
            elif self.how == "function":
                unit = functional.relu(unit)
            elif self.how == "method":
                unit = unit.relu()
            elif self.how == "clamp":
                unit = unit.clamp(min=0)
            elif self.how == "clamp to 6":
                unit = unit.clamp(0, 6)
            else:
                torch.relu_(unit)  # the result is ignored on purpose
            total = total + value * unit.sum((1, 2, 3))
        return total[:, None]


@pytest.mark.parametrize("how", ["module", "function", "method", "statement"])
def test_relu_rules_by_hand(how: str) -> None:
    images = torch.tensor([0.5, 0.0]).double().view(1, 1, 1, 2).expand(1, 3, 1, 2)
    # unit 0: slope 2, weight 3; unit 1: slope -1, weight 5 (off at x > 0); at x = 0 both inputs are 0
    model = Explanandum(TwoUnits(2.0, -1.0, 3.0, 5.0, how), 1, mean=0.0, std=1.0)
    assert build("guided_backprop", model, reduction="mean")(images, 0).tolist() == [[[6.0, 1.0]]]
    assert build("guided_backprop", model, reduction="mean", convention="captum")(images, 0).tolist() == [[[6.0, 0.0]]]
    assert build("deconvnet", model, reduction="mean")(images, 0).tolist() == [[[1.0, 1.0]]]
    assert build("gradient", model, absolute=False, reduction="mean")(images, 0)[0, 0, 0] == 6.0
    # a negative output weight: both rules stop it, the gradient does not
    model = Explanandum(TwoUnits(2.0, -1.0, -3.0, -5.0, how), 1, mean=0.0, std=1.0)
    assert build("guided_backprop", model)(images, 0).tolist() == [[[0.0, 0.0]]]
    assert build("deconvnet", model)(images, 0).tolist() == [[[0.0, 0.0]]]
    assert build("gradient", model, absolute=False, reduction="mean")(images, 0)[0, 0, 0] == -6.0


@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet", "guided_grad_cam"])
@pytest.mark.parametrize("activation", [nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.SiLU])
def test_rectifiers_without_a_rule_are_refused(method: str, activation: type[nn.Module]) -> None:
    model = Explanandum(small_net(activation), 3)
    with pytest.raises(UnsupportedLayerError, match=rf"{activation.__name__} at '1'.*gradient"):
        build(method, model)(random_images(), 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_disguised_missing_and_scripted_relus_are_refused() -> None:
    images = random_images()
    for how in ("clamp", "clamp to 6"):
        beside = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), TwoUnits(2.0, -1.0, 3.0, 5.0, how))  # a ReLU that is known besides
        with pytest.raises(UnsupportedLayerError, match="clamp"):
            build("guided_backprop", Explanandum(beside, 1))(images, 0)
    with pytest.raises(UnsupportedLayerError, match="has none"):
        build("deconvnet", Explanandum(small_net(nn.Tanh), 3))(images, 0)
    scripted = Explanandum(torch.jit.trace(small_net().eval(), images), 3)
    with pytest.raises(UnsupportedLayerError, match="scripted"):
        build("guided_backprop", scripted)(images, 0)


def test_inplace_relus_change_nothing() -> None:
    plain, inplace = (Explanandum(small_net(inplace=flag), 3, mean=0.3, std=0.2) for flag in (False, True))
    images = random_images()
    for name in ("gradient", "guided_backprop", "deconvnet", "deeplift_shap", "full_grad", "guided_grad_cam"):
        torch.testing.assert_close(build(name, inplace)(images, 1), build(name, plain)(images, 1), msg=name)
    assert all(m.inplace for m in inplace.modules() if isinstance(m, nn.ReLU))


class Reused(nn.Module):
    """One ReLU module at two places, or something else at the second."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 2)
        self.relu, self.second = nn.ReLU(), second

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.relu(self.one(x)))
        if self.second == "module":
            x = self.relu(x)
        elif self.second == "function":
            x = functional.relu(x)
        elif self.second == "statement":
            torch.tanh_(x)
        elif self.second == "softmax":
            x = x.softmax(1)
        else:
            x = x * x.mean((2, 3), keepdim=True)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("second", ["module", "function", "statement"])
def test_deeplift_follows_reused_and_functional_activations(second: str) -> None:
    model, references = Explanandum(Reused(second).double(), 2), random_images(4)[2:]
    images = random_images()
    maps = build("deeplift_shap", model, baselines=references)(images, 1)
    expected = model(images)[:, 1] - model(references)[:, 1].mean()
    torch.testing.assert_close(maps.sum((1, 2)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("second", "message"), [("gate", r"product of two activations \(mul\).*Reused"), ("softmax", "softmax")])
def test_deeplift_refuses_what_has_no_rule(second: str, message: str) -> None:
    model = Explanandum(Reused(second).double(), 2)
    with pytest.raises(UnsupportedLayerError, match=message):
        build("deeplift_shap", model)(random_images(), 0)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.ELU])
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_deeplift_is_captums_where_that_is_right(activation: type[nn.Module]) -> None:
    from captum.attr import DeepLiftShap

    net = small_net(activation)
    net[2] = nn.AvgPool2d(2)
    model = Explanandum(net, 3, mean=0.3, std=0.2)
    images, references, index = random_images(), random_images(5)[2:], torch.tensor([2, 0])
    expected = DeepLiftShap(model).attribute(images.clone().requires_grad_(), references, target=index)
    got = build("deeplift_shap", model, baselines=references, batch_size=4).channels(images, index)
    torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.ReLU6, nn.Sigmoid])
def test_deeplift_is_complete_for_other_activations_and_overlapping_pools(activation: type[nn.Module]) -> None:
    net = small_net(activation)
    net[2] = nn.MaxPool2d(3, stride=2, padding=1)
    net[5] = nn.AdaptiveMaxPool2d(1)
    model, references = Explanandum(net, 3, mean=0.3, std=0.2), random_images(4)[2:]
    images = random_images()
    maps = build("deeplift_shap", model, baselines=references)(images, 1)
    torch.testing.assert_close(maps.sum((1, 2)), model(images)[:, 1] - model(references)[:, 1].mean(), rtol=1e-9, atol=1e-12)


def test_deeplift_max_pool_by_hand() -> None:
    net = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 1, bias=False)).double()
    net[2].weight.data.fill_(1.0)
    model = Explanandum(net, 1, mean=0.0, std=1.0)
    image = torch.tensor([5.0, 2, 3, 4]).double().view(1, 1, 2, 2).expand(1, 3, 2, 2)
    reference = torch.tensor([0.0, 0, 0, 6]).double().view(1, 1, 2, 2).expand(1, 3, 2, 2)
    # the reference's winner (the last pixel) pays for the fall from 6 to 5
    assert build("deeplift_shap", model, baselines=reference)(image, 0).tolist() == [[[0.0, 0.0], [0.0, -3.0]]]
    # and the image's winner earns a rise: from 6 to 5 the other way round
    assert build("deeplift_shap", model, baselines=image)(reference, 0).tolist() == [[[0.0, 0.0], [0.0, 3.0]]]


class TokenMixer(nn.Module):
    """Patches, a linear layer over their places and not their channels, the mean, a head without bias: piecewise linear."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix, self.head = nn.Conv2d(3, 7, 4, 4), nn.Linear(16, 16), nn.Linear(7, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.patches(x).flatten(2))).mean(2))


class NormInFront(nn.LayerNorm):
    """torchvision's and timm's LayerNorm2d: over the channels of ``[B,C,h,w]``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_full_grad_of_a_layer_norm_with_channels_first() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 2, 2), NormInFront(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3, bias=False)).double()
    net[1].bias.data.normal_()
    _, (_, at_norm) = build("full_grad", Explanandum(net, 3, mean=0.4, std=0.3)).terms(torch.rand(1, 3, 8, 8).double(), torch.tensor([2]))
    torch.testing.assert_close(at_norm, (net[1].bias * net[4].weight[2]).view(1, 5, 1, 1).expand(1, 5, 4, 4) / 16)


def test_full_grad_of_a_layer_that_mixes_places() -> None:
    """Its biases belong to places: what the terms sum to is the logit."""
    torch.manual_seed(0)
    model = Explanandum(TokenMixer().double(), 3, mean=0.4, std=0.3)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    at_input, at_biases = build("full_grad", model).terms(images, torch.tensor([0, 2]))
    assert [tuple(t.shape) for t in at_biases] == [(2, 7, 4, 4), (2, 7, 4, 4)]
    total = at_input.sum((1, 2, 3)) + sum(t.sum((1, 2, 3)) for t in at_biases)
    torch.testing.assert_close(total, model(images)[[0, 1], [0, 2]])


def test_full_grad_terms_are_complete_and_the_map_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3, bias=False),
    ).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*net[1].parameters(), net[1].running_mean):
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.3)
        net[1].running_var.copy_(torch.rand(4, generator=generator, dtype=torch.float64) + 0.5)
    model = Explanandum(net, 3, mean=0.3, std=0.2)
    images, index = random_images(), torch.tensor([1, 2])
    at_input, at_biases = build("full_grad", model).terms(images, index)
    total = at_input.sum((1, 2, 3)) + sum(t.sum((1, 2, 3)) for t in at_biases)
    torch.testing.assert_close(total, model(images)[torch.arange(2), index], rtol=1e-9, atol=1e-12)
    assert [tuple(t.shape[1:]) for t in at_biases] == [(4, 6, 6), (5, 4, 4)]

    linear = Explanandum(Linear(), 2, mean=0.0, std=1.0)  # no biases: the input term alone
    images = random_images(1, 2)
    term = (images[0] * linear.classifier.weight[1]).abs()
    low, high = term.amin((1, 2), keepdim=True), term.amax((1, 2), keepdim=True)
    expected = ((term - low) / (high - low)).sum(0)
    torch.testing.assert_close(build("full_grad", linear, convention="paper")(images, 1)[0], expected)
    rescaled = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(build("full_grad", linear)(images, 1)[0], rescaled, rtol=1e-5, atol=1e-6)
    together = ((term - term.min()) / (term.max() - term.min() + 1e-6)).sum(0)
    torch.testing.assert_close(build("full_grad", linear, convention="code")(images, 1)[0], together)


def test_full_grad_of_the_authors_code_keeps_what_a_channel_is_worth() -> None:
    """Bias times gradient is 8 at the left two pixels of channel 0 and 1 at the right ones of channel 1; corners are aligned."""
    conv = nn.Conv2d(1, 2, 1)
    net = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(8, 1, bias=False)).double()
    with torch.no_grad():
        conv.weight.zero_()
        conv.bias.fill_(1.0)
        net[3].weight.copy_(torch.tensor([[8.0, 0, 8, 0, 0, 1, 0, 1]]))

    model = Explanandum(net, 1, mean=0.0, std=1.0)

    def at(convention: str) -> torch.Tensor:
        method = build("full_grad", model, convention=convention)
        _, (term,) = method.terms(torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0]))
        return method._postprocess(term.abs(), torch.Size((2, 3)))

    torch.testing.assert_close(at("code")[0], torch.tensor([[1, 0.5 + 0.0625, 0.125]] * 2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(at("paper")[0], torch.tensor([[1, 1.0, 1]] * 2, dtype=torch.float64))


def test_wrong_options_are_refused() -> None:
    model = Explanandum(small_net(), 3)
    for name, options, message in [
        ("gradient", {"reduction": "median"}, "max_abs"),
        ("gradient", {"layer": "conv9"}, "Its modules"),
        ("gradient", {"smooth": -1.0}, "smooth"),
        ("guided_backprop", {"convention": "zennit"}, "torchray"),
        ("smooth_grad", {"statistic": "median"}, "vargrad"),
        ("smooth_grad", {"samples": 0}, "samples"),
        ("integrated_gradients", {"steps": 1}, "steps"),
        ("gradient_shap", {"samples": 0}, "samples"),
        ("deeplift_shap", {"batch_size": 0}, "batch_size"),
        ("full_grad", {"convention": "captum"}, "paper"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build(name, model, **options)
    with pytest.raises(ShapeError, match="noise"):
        build("smooth_grad", model, noise=torch.zeros(3, 3, 6, 6))(random_images(), 0)
    with pytest.raises(ShapeError, match="baselines"):
        build("gradient_shap", model, baselines=torch.zeros(2, 3, 5, 5))(random_images(), 0)


METHODS = [
    "gradient",
    "input_x_gradient",
    "linear_approx",
    "integrated_gradients",
    "smooth_grad",
    "guided_backprop",
    "deconvnet",
    "full_grad",
    "guided_grad_cam",
    "deeplift_shap",
    "gradient_shap",
]


@pytest.mark.parametrize("name", METHODS)
def test_batch_of_two_is_two_singles_and_the_model_stays(name: str) -> None:
    model = Explanandum(small_net(inplace=True), 3, mean=0.3, std=0.2)
    before = copy.deepcopy(model.state_dict())
    images, index = random_images(), torch.tensor([2, 0])
    method = build(name, model)
    with torch.no_grad():
        both = method(images, index)
    singles = torch.cat([method(x[None], k[None]) for x, k in zip(images, index, strict=True)])
    torch.testing.assert_close(both, singles, rtol=1e-10, atol=1e-13)
    assert both.abs().max() > 0
    assert not torch.allclose(both, method(images, 1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()), "the user's parameters stay trainable"
    single_precision = build(name, Explanandum(small_net().float(), 3, mean=0.3, std=0.2))(images.float(), index)
    assert single_precision.dtype == torch.float32
    torch.testing.assert_close(single_precision.double(), both, rtol=1e-3, atol=1e-4 * float(both.abs().max()))
