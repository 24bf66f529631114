"""The relevance family: numbers worked by hand, and every rule against explicit weight matrices and loops."""

import math

import pytest
import torch
from torch import nn

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels.attention_lrp import AttentionLrp
from explainer.baselines.rap import shift_uniformly
from explainer.errors import ConfigError, UnsupportedLayerError
from explainer.models.families import FAMILIES


def wrap(net, classes, **options):
    return Explanandum(net.double(), classes, mean=0.0, std=1.0, **options)


@pytest.fixture
def two_layers():
    """x = (1,2) -> h = (3,1) -> logits (5,4)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    net[1].weight.data = torch.tensor([[1.0, 1.0], [3.0, -1.0]])
    net[3].weight.data = torch.tensor([[2.0, -1.0], [1.0, 1.0]])
    return wrap(net, 2), torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64)


Q = 1 / (1 + math.exp(-1)) * (1 - 1 / (1 + math.exp(-1)))  # y0 (1 - y0) of logits (5,4)
SAME = {"first_layer": "same"}


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        # h gets (6,-1); 6 splits 1:2, -1 splits 3:-2.
        ("lrp", {"rule": "epsilon"}, (-1.0, 6.0)),
        ("lrp", {"rule": "epsilon", "start": "one"}, (-0.2, 1.2)),
        # weights (4,-1): h gets 5 (12,-1)/11; first layer (2,2) and (6,-1).
        ("lrp", {"rule": "gamma", "gamma": 1.0}, (12.5 / 11, 42.5 / 11)),
        # all 5 to h0, which splits 1:2.
        ("lrp_zplus", {}, (5 / 3, 10 / 3)),
        ("lrp", {"rule": "zplus_zero_bias"}, (5 / 3, 10 / 3)),
        # h gets (10,-5); 2*10*(1,2)/3, and h1: 2*(-5) to x0, -(-5) to x1.
        ("lrp_alpha_beta", {"alpha": 2.0}, (-10 / 3, 55 / 3)),
        ("lrp_alpha_beta", {"alpha": 1.0}, (5 / 3, 10 / 3)),
        ("excitation_backprop", {}, (1 / 3, 2 / 3)),
        # dual signal sits on h1, whose positive weight reads x0: (1/3,2/3) - (1,0), clamped.
        ("contrastive_excitation_backprop", {}, (0.0, 2 / 3)),
        # class 1 sends 5 (3,1)/4 down: h gets (1.25,-1.25).
        ("clrp", SAME, (0.0, 2.5 / 3)),
        ("clrp", {"dual": "negated", **SAME}, (0.0, 10 / 3)),
        # class 1 starts with its own 4, sends (3,1) down: (1,2) + (1,0) at the pixels, scaled from 4 to 5; signed.
        ("clrp", {"dual": "other_logits", **SAME}, (-2.5 / 3, 2.5 / 3)),
        ("sglrp", SAME, (-Q / 6, Q / 6)),
        # h gets (6,1) 5/7; shares (15,22)/7 sum to 37/7, 2/7 too much: each gives back 1/7.
        ("rap", SAME, (2.0, 3.0)),
    ],
)
def test_two_layers_by_hand(two_layers, method, options, expected):
    explanandum, image = two_layers
    actual = build(method, explanandum, **options)(image, 0)
    torch.testing.assert_close(actual, torch.tensor([[expected]], dtype=torch.float64), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        # the logit 6 - 2 = 4 goes to the one feature that raises it; x w+ would give it 6 and -2 to the other.
        ("lrp_zplus", {}, (4.0, 0.0)),
        ("lrp_zplus", {"contributions": "weights"}, (6.0, -2.0)),
        ("excitation_backprop", {}, (1.0, 0.0)),
        # against the class: weights (-3,-2), of which the second makes a positive contribution of the feature -1.
        ("contrastive_excitation_backprop", {}, (1.0, 0.0)),
    ],
)
def test_negative_features_by_hand(method, options, expected):
    """Pixels (2,-1), which the first layer hands on as features, and weights (3,2). Without activation: features of both signs."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    net[1].weight.data = torch.eye(2)
    net[2].weight.data = torch.tensor([[3.0, 2.0]])
    explanandum = Explanandum(net.double(), 1, mean=0.5, std=0.25)
    actual = build(method, explanandum, **options)(torch.tensor([[[[1.0, 0.25]]]], dtype=torch.float64), 0)
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_first_layer_rules_by_hand():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1))
    net[1].weight.data = torch.tensor([[2.0, -1.0]])
    net[1].bias.data = torch.tensor([0.25])
    image = torch.tensor([[[[0.5, 0.25]]]], dtype=torch.float64)
    explanandum = wrap(net, 1)  # logit 1
    box = build("lrp", explanandum, first_layer="z_box")(image, 0)  # 0.5*2 - 0*2 = 1 and -0.25 + 1 = 0.75
    torch.testing.assert_close(box.flatten(), torch.tensor([1 / 1.75, 0.75 / 1.75], dtype=torch.float64), rtol=1e-6, atol=0)
    square = build("lrp", explanandum, first_layer="w_square")(image, 0)
    torch.testing.assert_close(square.flatten(), torch.tensor([0.8, 0.2], dtype=torch.float64), rtol=1e-6, atol=0)


def test_box_bounds_are_normalised_black_and_white():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
    net[1].weight.data = torch.tensor([[2.0, -1.0]])
    explanandum = Explanandum(net.double(), 1, mean=0.5, std=0.25)  # bounds -2 and 2; pixels 0 and -1; logit 1
    actual = build("lrp", explanandum, first_layer="z_box")(torch.tensor([[[[0.5, 0.25]]]], dtype=torch.float64), 0)
    # x0: 0*2 + 2*2 = 4; x1: (-1)(-1) + 2*1 = 3
    torch.testing.assert_close(actual.flatten(), torch.tensor([4 / 7, 3 / 7], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("max_pool", "expected"), [("winner", (0.0, 3.0)), ("stabilized", (0.0, 3.0)), ("proportional", (0.75, 2.25))])
def test_max_pool_by_hand(max_pool, expected):
    net = nn.Sequential(nn.MaxPool2d((1, 2)), nn.Flatten(), nn.Linear(1, 1, bias=False))
    net[2].weight.data = torch.ones(1, 1)
    actual = build("lrp", wrap(net, 1), max_pool=max_pool)(torch.tensor([[[[1.0, 3.0]]]], dtype=torch.float64), 0)
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


class Sum(nn.Module):
    """x + w x with w = -0.5 and 1."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.head = nn.Linear(2, 1, bias=False)
        self.conv.weight.data.fill_(-0.5)
        self.head.weight.data = torch.tensor([[1.0, 2.0]])

    def forward(self, x):
        return self.head((x + self.conv(x)).relu().flatten(1))


@pytest.mark.parametrize(
    ("residual", "expected"),
    [
        # sums (1,2), relevance (1,4); ratio: 2 to the identity, -1 to the convolution; both arrive at the same pixel.
        ("ratio", (1.0, 4.0)),
        ("positive", (1.0, 4.0)),
        ("absolute", (1.0, 4.0)),
    ],
)
def test_residual_sums_conserve_each_pixel(residual, expected):
    actual = build("lrp", wrap(Sum(), 1), residual=residual)(torch.tensor([[[[2.0, 4.0]]]], dtype=torch.float64), 0)
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("residual", "expected"), [("ratio", -1.0), ("positive", 0.0), ("absolute", 1 / 3)])
def test_residual_shares_by_hand(residual, expected):
    attributor = build("lrp", wrap(Sum(), 1), residual=residual)
    branch = attributor.relevance(torch.tensor([[[[2.0, 4.0]]]], dtype=torch.float64), 0, at="conv")
    torch.testing.assert_close(branch.flatten(), expected * torch.tensor([1.0, 4.0], dtype=torch.float64), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("residual", "shift", "expected"),
    [
        # x = (3,1) -> y = (1,-1) + shift -> 2 y0 + y1. With 1/std constant, y0 = (x0 - x1)/2 and y1 its opposite.
        ("ratio", (0.0, 0.0), (1.5, -0.5)),  # y gets (2,-1); 2 splits 1.5 : -0.5, -1 splits -1.5 : 0.5
        ("ratio", (1.0, 0.0), (1.5, -0.5)),  # y0 = 2 gets 4, of which the shift absorbs 2: the same for the pixels
        ("positive", (0.0, 0.0), (2.0, -1.0)),  # identity rule
    ],
)
@pytest.mark.parametrize("kind", ["layer", "group"])
def test_norms_by_hand(kind, residual, shift, expected):
    """The first sums to the logit 1: relevance is conserved where there is no shift."""
    norm = nn.LayerNorm(2, eps=0.0) if kind == "layer" else nn.GroupNorm(1, 2, eps=0.0)
    net = nn.Sequential(nn.Flatten(), norm, nn.Linear(2, 1, bias=False))
    norm.bias.data = torch.tensor(shift)
    net[2].weight.data = torch.tensor([[2.0, 1.0]])
    actual = build("lrp", wrap(net, 1), residual=residual)(torch.tensor([[[[3.0, 1.0]]]], dtype=torch.float64), 0)
    torch.testing.assert_close(actual, torch.tensor([[expected]], dtype=torch.float64), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["ConvNeXt (timm)", "PoolFormer (timm)", "Mixer (timm)"])
def test_epsilon_rule_of_networks_with_norms_is_a_modified_gradient(family):
    """AttnLRP's kernel is written the other way: input x gradient, with 1/std constant and the slope of an activation y/x."""
    net = FAMILIES[family].build(3).double()
    explanandum = wrap(net, 3)
    image = torch.rand(1, 3, FAMILIES[family].side, FAMILIES[family].side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mode = AttentionLrp(net, "test", constant_attention=False, gamma=None, gamma_in_attention=False)
    leaf = image.clone().requires_grad_()
    with mode.watching():
        logits = explanandum(leaf)
    assert mode.refused is None
    (gradient,) = torch.autograd.grad(logits[0, 1], leaf)
    actual = build("lrp", explanandum).relevance(image, 1)
    torch.testing.assert_close(actual, leaf.detach() * gradient, rtol=1e-4, atol=1e-4 * float(actual.abs().max()))


def test_attention_is_refused_with_methods_that_have_rules_for_it():
    with pytest.raises(UnsupportedLayerError, match="Use attn_lrp or cp_lrp, which have rules for attention, or a method without"):
        build("lrp", wrap(FAMILIES["ViT (timm)"].build(3), 3))(torch.rand(1, 3, 64, 64, dtype=torch.float64), 0)


def test_no_refusal_sends_to_a_method_that_refuses_for_the_same_reason():
    """Linear attention: products without a softmax. LRP has no rule for them, AttnLRP no attention to look at."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.head = nn.Conv2d(3, 4, 4, stride=4), nn.Linear(4, 3)

        def forward(self, x):
            q = self.q(x).relu().flatten(2)
            return self.head((q @ q.transpose(1, 2) @ q).mean(2))

    explanandum, image = wrap(Linear(), 3), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(UnsupportedLayerError, match="Use attn_lrp or cp_lrp, if this is attention with a softmax, or a method without"):
        build("lrp", explanandum)(image, 0)
    with pytest.raises(UnsupportedLayerError, match="none ran in Linear") as error:
        build("attn_lrp", explanandum)(image, 0)
    assert "lrp," not in str(error.value).partition("Use ")[2]
    assert build("integrated_gradients", explanandum)(image, 0).any()


def test_rap_pieces_on_degenerate_relevance():
    zero = torch.zeros(1, 3)
    assert torch.equal(shift_uniformly(zero, torch.ones(1)), zero)
    shifted = shift_uniformly(torch.tensor([[0.0, 2.0, 4.0]]), torch.tensor([3.0]))
    assert torch.equal(shifted, torch.tensor([[0.0, 0.5, 2.5]]))
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
    black = build("rap", wrap(net, 1))(torch.zeros(1, 1, 1, 2, dtype=torch.float64), 0)
    assert torch.equal(black, torch.zeros_like(black))


# ---------------------------------------------------------------- explicit matrices
def matrix(module, shape):
    """The module's linear map as a matrix [out, in], column by column."""
    count = math.prod(shape)
    basis = torch.eye(count, dtype=torch.float64).view(count, *shape)
    zero = module(torch.zeros(1, *shape, dtype=torch.float64))
    return (module(basis) - zero).flatten(1).T, zero.flatten()


def share(z, bias, relevance, epsilon):
    """R_i = sum_j z_ij / (z_j + eps) R_j, in loops."""
    out = torch.zeros(z.shape[1], dtype=torch.float64)
    for j in range(z.shape[0]):
        total = float(z[j].sum() + bias[j])
        total += epsilon if total >= 0 else -epsilon
        for i in range(z.shape[1]):
            out[i] += z[j, i] / total * relevance[j]
    return out


def slow_layer(method, options, w, b, x, relevance, last, kind, first):
    eps, zero = 1e-9, torch.zeros_like(b)
    z = w * x
    rule = options.get("rule", method)
    if first and method in ("clrp", "sglrp", "rap"):
        return share(w * x - w.clamp(min=0) * 0 - w.clamp(max=0) * 1, zero, relevance, eps)
    if rule == "epsilon" or (rule == "epsilon_plus" and kind is nn.Linear):
        return share(z, b, relevance, 1e-9 if rule == "epsilon" else 1e-6)
    if rule == "gamma":
        return share((w + 0.5 * w.clamp(min=0)) * x, b, relevance, eps)
    if rule == "epsilon_plus":
        return share(z.clamp(min=0), b.clamp(min=0), relevance, 1e-6)
    if rule == "zplus_zero_bias":
        return share(z.clamp(min=0), zero, relevance, 1e-6)
    if method == "lrp_zplus":
        return share(w.clamp(min=0) * x, b, relevance, eps)
    if method == "lrp_alpha_beta":
        return 3 * share(z.clamp(min=0), b.clamp(min=0), relevance, eps) - 2 * share(z.clamp(max=0), b.clamp(max=0), relevance, eps)
    if method == "excitation_backprop":
        return share(w.clamp(min=0) * x, zero, relevance, 1e-20)
    if method in ("clrp", "sglrp"):
        return share(z.clamp(min=0), zero, relevance, eps)
    assert method == "rap"
    if last:
        c = (z * relevance[:, None]).sum(0)
        return c.abs() * c.sum() / c.abs().sum()
    out = torch.zeros_like(x)
    for j in range(len(relevance)):
        up, down = float(z[j].clamp(min=0).sum()), float(-z[j].clamp(max=0).sum())
        for i in range(len(x)):
            if z[j, i] > 0:
                out[i] += relevance[j] * z[j, i] / up
            elif z[j, i] < 0:
                out[i] += relevance[j] * -z[j, i] / (up + down)
    return out - (out != 0) * (out.sum() - relevance.sum()) / (out != 0).sum()


def slow(net, image, start, method, options):
    inputs = [image]
    for module in net:
        inputs.append(module(inputs[-1]))
    weighted = [i for i, m in enumerate(net) if isinstance(m, (nn.Conv2d, nn.Linear))]
    r = start
    for i in reversed(range(len(net))):
        module, x = net[i], inputs[i]
        if i in weighted:
            w, b = matrix(module, x.shape[1:])
            r = slow_layer(method, options, w, b, x.flatten(), r, i == weighted[-1], type(module), i == weighted[0])
        elif isinstance(module, nn.AvgPool2d):
            w, b = matrix(module, x.shape[1:])
            r = share(w * x.flatten(), b, r, 1e-12)
        elif isinstance(module, nn.MaxPool2d):
            _, where = nn.functional.max_pool2d(x, 2, return_indices=True)
            side = x.shape[-1] * x.shape[-2]
            out = torch.zeros(x.shape[1] * side, dtype=torch.float64)
            for j, position in enumerate(where.flatten().tolist()):
                out[j // (where.shape[-1] * where.shape[-2]) * side + position] += r[j]
            r = out
    return r.view(image.shape[1:])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lrp", {"rule": "epsilon"}),
        ("lrp", {"rule": "gamma", "gamma": 0.5}),
        ("lrp", {"rule": "epsilon_plus"}),
        ("lrp", {"rule": "zplus_zero_bias"}),
        ("lrp_zplus", {}),
        ("lrp_alpha_beta", {"alpha": 3.0}),
        ("excitation_backprop", {}),
        ("clrp", {}),
        ("sglrp", {}),
        ("rap", {}),
    ],
)
def test_against_explicit_matrices(method, options):
    generator = torch.Generator().manual_seed(7)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=1, padding=1, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
        if parameter.ndim == 1:
            parameter.data.abs_()
    image = torch.rand(1, 2, 4, 4, generator=generator, dtype=torch.float64)
    explanandum = wrap(net, 3)
    # Pixels of both signs where the rule at the pixels has no box.
    if method not in ("clrp", "sglrp", "rap"):
        image = image - 0.4
    plain = nn.Sequential(*[nn.ReLU() if isinstance(m, nn.ReLU) else m for m in net])
    logits = plain(image)[0].detach()
    start = torch.zeros(3, dtype=torch.float64)
    if method == "clrp":
        start += -logits[1] / 2
        start[1] = logits[1]
    elif method == "sglrp":
        p = logits.softmax(0)
        start = -p * p[1]
        start[1] = p[1] * (1 - p[1])
    else:
        start[1] = 1 if method in ("rap", "excitation_backprop") else logits[1]
    expected = slow(plain, image, start, method, options)
    assert float(expected.abs().max()) > 0
    actual = build(method, explanandum, **options).relevance(image, 1)[0]
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6 * float(expected.abs().max()))


# ---------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lrp", {"rule": "delta"}, ["rule", "'epsilon_plus'", "delta"]),
        ("lrp", {"epsilon": 0.0}, ["epsilon", "positive"]),
        ("lrp", {"gamma": -1.0}, ["gamma", "-1"]),
        ("lrp", {"start": "two"}, ["start", "'logit'"]),
        ("lrp", {"max_pool": "mean"}, ["max_pool", "'winner'"]),
        ("lrp_alpha_beta", {"alpha": 0.5}, ["alpha", "0.5"]),
        ("lrp_zplus", {"contributions": "all"}, ["contributions"]),
        ("clrp", {"dual": "none"}, ["dual"]),
        ("rap", {"first_layer": "box"}, ["first_layer", "'z_box'"]),
        ("excitation_backprop", {"layer": "nowhere"}, ["nowhere", "1"]),
        ("contrastive_excitation_backprop", {"contrast_layer": "nowhere"}, ["nowhere"]),
    ],
)
def test_wrong_options_are_named(two_layers, method, options, words):
    with pytest.raises(ConfigError) as error:
        build(method, two_layers[0], **options)
    assert all(word in str(error.value) for word in words)


def test_a_map_needs_a_feature_map(two_layers):
    explanandum, image = two_layers
    attributor = build("excitation_backprop", explanandum, layer="1")
    with pytest.raises(UnsupportedLayerError, match="feature map"):
        attributor(image, 0)
    torch.testing.assert_close(attributor.relevance(image, 0), torch.tensor([[1.0, 0.0]], dtype=torch.float64))


def test_contrast_below_the_layer_is_refused(two_layers):
    explanandum, image = two_layers
    attributor = build("contrastive_excitation_backprop", explanandum, contrast_layer="3")
    with pytest.raises(ConfigError, match="does not lie"):
        attributor(image, 0)


def test_one_class_has_no_dual():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False))
    net[1].weight.data = torch.tensor([[1.0, 3.0]])
    actual = build("clrp", wrap(net, 1), first_layer="same")(torch.ones(1, 1, 1, 2, dtype=torch.float64), 0)
    torch.testing.assert_close(actual.flatten(), torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_input_size_maps_return_to_the_image():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    attributor = build("lrp", wrap(net, 2, input_size=8))
    images = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert attributor.relevance(images, 0).shape == (2, 3, 8, 8)
    expected = nn.functional.interpolate(attributor.relevance(images, 0).sum(1, keepdim=True), (12, 10), mode="bilinear")
    torch.testing.assert_close(attributor(images, 0), expected[:, 0])
