"""SRD: invariants I1-I12 of the specification, options, the differentiable sweep, and that the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels import srd_graph, srd_rules, srd_sweep
from explainer.errors import ConfigError
from tests.unit.baselines.test_srd_derivation import tiny


def chain(seed=15, activation=nn.ReLU, classes=3):
    torch.manual_seed(seed)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            activation(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, padding=1),
            activation(),
            nn.Conv2d(5, 4, 3, padding=1),
            activation(),
            nn.AvgPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1),
            activation(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(6, 5),
            nn.Tanh(),
            nn.Linear(5, classes),
        )
        .double()
        .eval()
    )


def explain(net, classes=3, **options):
    return build("srd", Explanandum(net, classes, mean=0.0, std=1.0), **options)


def images(batch=2, size=8, seed=1):
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


OPTIONS = {"encoder_output": "9"}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Tanh])
def test_relevance_is_conserved_along_a_chain(activation):
    """I2, for every supported activation."""
    srd = explain(chain(activation=activation), **OPTIONS)
    initial = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = srd.relevance(images(), 1, initial=initial)
    totals = torch.stack([m.sum((1, 2)) for m in maps.values()])
    assert len(maps) == 5 and float(maps["9"].sum()) > 0.01
    assert torch.allclose(totals, totals[-1].expand_as(totals), atol=1e-10)


def test_residual_block_conserves_at_its_ends_and_splits_inside():
    """I2: a branch's activation holds part of the relevance, the shortcut the rest."""
    net, x = tiny(0)
    maps = explain(net).relevance(x, 0, ["input", "r1", "p1", "t", "r3"])
    totals = {k: float(m.sum()) for k, m in maps.items()}
    assert max(totals.values()) - min(totals.values()) < 1e-10 and totals["r3"] > 1e-3


def test_equal_class_rows_give_no_relevance():
    """I4: also in float32, where the difference of equal maps is rounding noise."""
    net = chain()
    net[-1].weight.data[:] = net[-1].weight.data[0]
    for dtype in (torch.float64, torch.float32):
        maps = explain(net.to(dtype), **OPTIONS)(images().to(dtype), 2)
        assert torch.equal(maps, torch.zeros_like(maps))


def test_linear_in_the_initial_relevance_and_independent_over_the_batch():
    """I5."""
    srd, x = explain(chain(), **OPTIONS), images()
    generator = torch.Generator().manual_seed(5)
    r1, r2 = (torch.randn(2, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    both = srd.relevance(x, 0, ["input"], initial=2 * r1 - 3 * r2)["input"]
    apart = 2 * srd.relevance(x, 0, ["input"], initial=r1)["input"] - 3 * srd.relevance(x, 0, ["input"], initial=r2)["input"]
    assert torch.allclose(both, apart, atol=1e-10)
    batch = srd(x, [0, 1])
    assert torch.allclose(batch, torch.cat([srd(x[:1], 0), srd(x[1:], 1)]), atol=1e-10)


def test_rescaling_neighbouring_layers_changes_nothing():
    """I6."""
    net = chain()
    scaled = copy.deepcopy(net)
    scaled[3].weight.data *= 3.0
    scaled[3].bias.data *= 3.0
    scaled[5].weight.data /= 3.0
    assert torch.allclose(explain(net, **OPTIONS)(images(), 1), explain(scaled, **OPTIONS)(images(), 1), atol=1e-10)


def test_channel_order_and_rotation_of_the_input_do_not_matter():
    """I8."""
    net, x = chain(), images()
    expected = explain(net, **OPTIONS)(x, 1)
    permuted = copy.deepcopy(net)
    order = torch.tensor([2, 0, 4, 1, 3])
    permuted[3].weight.data, permuted[3].bias.data = net[3].weight.data[order], net[3].bias.data[order]
    permuted[5].weight.data = net[5].weight.data[:, order]
    assert torch.allclose(explain(permuted, **OPTIONS)(x, 1), expected, atol=1e-10)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    rotated = copy.deepcopy(net)
    rotated[0].weight.data = torch.einsum("ocyx,dc->odyx", net[0].weight.data, rotation)
    assert torch.allclose(explain(rotated, **OPTIONS)(torch.einsum("dc,bcyx->bdyx", rotation, x), 1), expected, atol=1e-10)


def test_zero_patch_gets_nothing_and_the_leak_accounts_for_it():
    """I9."""
    x = images(1)
    x[:, :, :6, :6] = 0
    srd = explain(chain(), **OPTIONS)
    account = srd.account(x, 0)
    assert torch.equal(account.relevance["input"][:, :6, :6], torch.zeros(1, 6, 6).double())
    assert float(account.leak["1"].abs()) > 1e-6, "conv1's bias over black pixels has no owner"
    total = account.relevance["input"].sum() + sum(v.sum() for v in account.leak.values())
    assert abs(float(total - account.relevance["9"].sum())) < 1e-12


def test_leak_is_found_behind_a_pool_and_a_batch_norm():
    """What has no owner is carried through the linear maps to the next activation."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.AvgPool2d(2, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ]
    net = nn.Sequential(*layers).double().eval()
    for norm in (net[1], net[5]):
        norm.bias.data.normal_()
        norm.running_mean.normal_()
    x = images(1)
    x[:, :, :5, :5] = 0
    account = explain(net).account(x, 0)
    assert float((account.mu_sum["6"] - 1).abs().max()) > 1e-3
    total = account.relevance["input"].sum() + account.leak["6"].sum()
    assert abs(float(total - account.relevance["6"].sum())) < 1e-12 and abs(float(account.leak["6"])) > 1e-6


def test_batch_norm_equals_the_network_folded_by_hand():
    """I10."""
    net, x = tiny(4)
    folded = copy.deepcopy(net)
    for conv, norm in ((folded.c1, "b1"), (folded.c2, "b2")):
        bn = getattr(folded, norm)
        s = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).detach()
        bias = torch.zeros_like(s) if conv.bias is None else conv.bias.detach()
        conv.bias = nn.Parameter(s * bias + bn.bias.detach() - s * bn.running_mean)
        conv.weight = nn.Parameter(conv.weight.detach() * s[:, None, None, None])
        setattr(folded, norm, nn.Identity())
    assert torch.allclose(explain(net)(x, 1), explain(folded)(x, 1), atol=1e-10)


def test_resolutions_of_one_sweep_equal_separate_sweeps():
    """I11, and low is R^L itself."""
    net, x = chain(), images()
    plain = {**OPTIONS, "normalize": False}
    together = explain(net, **OPTIONS).relevance(x, 1, ["input", "4", "2", "9"])
    for name, resolution in (("input", "input"), ("4", "4"), ("2", "2"), ("9", "low")):
        expected = together[name]
        if expected.shape[-1] != 8:
            expected = nn.functional.interpolate(expected[:, None], (8, 8), mode="bilinear", align_corners=False)[:, 0]
        assert torch.allclose(explain(net, **plain, resolution=resolution)(x, 1), expected, atol=1e-12)


def test_high_is_the_deepest_cut_of_stride_eight():
    layers = []
    for i in range(5):
        layers += [nn.Conv2d(3 if i == 0 else 2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).double().eval()
    srd, x = explain(net, resolution="high", normalize=False), images(1, 64)
    expected = srd.relevance(x, 0, ["18"])["18"]
    assert expected.shape == (1, 8, 8)
    assert torch.allclose(srd(x, 0), nn.functional.interpolate(expected[:, None], (64, 64), mode="bilinear")[:, 0], atol=1e-12)


@pytest.mark.parametrize(("make", "options"), [(lambda: tiny(5), {}), (lambda: (chain(15, nn.SiLU), images(1)), OPTIONS)])
@pytest.mark.parametrize("start", ["paper", "constant"])
def test_gradient_of_the_explanation_matches_finite_differences(make, options, start):
    """I12."""
    net, x = make()
    srd = explain(net, start=start, **options)
    weights = torch.randn(x.shape[0], *x.shape[-2:], dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad((srd.differentiable_map(x, 1) * weights).sum(), x)
    direction = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    step = 1e-6
    with torch.no_grad():
        ends = [(srd.differentiable_map(x + s * step * direction, 1) * weights).sum().detach() for s in (1, -1)]
    numeric = float((ends[0] - ends[1]) / (2 * step))
    assert abs(numeric) > 1e-4
    assert float((gradient * direction).sum()) == pytest.approx(numeric, rel=2e-6)


def test_differentiable_sweep_is_finite_at_zero_vectors():
    x = images(1)
    x[:, :, :6, :6] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(explain(chain(), start="constant", **OPTIONS).differentiable_map(x).square().sum(), x)
    assert bool(gradient.isfinite().all()) and float(gradient.abs().max()) > 0


def test_start_code_is_relu_grad_cam_minus_its_spatial_mean():
    net, x = chain(), images(1)
    srd = explain(net, start="code", **OPTIONS)
    u = net[:10](x).detach().requires_grad_()
    alpha = torch.autograd.grad(net[10:](u)[0, 1], u)[0].mean((2, 3), keepdim=True)
    cam = (alpha * u).sum(1).relu().detach()
    assert float(cam.max()) > 0
    assert torch.allclose(srd.relevance(x, 1, ["9"])["9"], cam - cam.mean(), atol=1e-12)


def test_all_classes_equals_one_by_one_with_one_forward():
    net, x = chain(), images()
    srd, calls = explain(net, **OPTIONS), []
    expected = torch.stack([srd(x, k) for k in range(3)], 1)
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    maps = srd.all_classes(x)
    handle.remove()
    assert torch.allclose(maps, expected, atol=1e-12) and len(calls) == 1
    assert torch.equal(srd.all_classes(x, [2, 0]), maps[:, [2, 0]])
    assert float((maps[:, 0] - maps[:, 2]).abs().max()) > 0.01


def test_normalisation():
    net, x = chain(), images()
    raw = explain(net, normalize=False, **OPTIONS)(x, 1)
    assert torch.allclose(explain(net, **OPTIONS)(x, 1), raw / raw.amax((1, 2), keepdim=True))
    assert torch.allclose(explain(net, by_max_abs=True, **OPTIONS)(x, 1), raw / raw.abs().amax((1, 2), keepdim=True))


def test_half_precision_regions_do_not_reach_the_sweep():
    net, x = chain().float(), images().float()
    srd = explain(net, **OPTIONS)
    expected = srd(x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = srd(x, 1)
    assert inside.dtype == torch.float32 and torch.equal(inside, expected)
    with torch.inference_mode():
        assert torch.equal(srd(x, 1), expected)


def count_hooks(net):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]


def test_the_model_is_left_as_it_was():
    net, x = chain(), images()
    net[1].inplace = True
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    srd = explain(net, **OPTIONS)
    before = (copy.deepcopy(net.state_dict()), torch.get_rng_state(), count_hooks(net))
    for call in (
        lambda: srd(x, 0),
        lambda: srd.all_classes(x),
        lambda: srd.account(x, 0),
        lambda: srd.erf(x, "1", (0, 0)),
        lambda: srd.differentiable_map(x.clone().requires_grad_(), 0),
        lambda: srd.relevance(x, 0),
    ):
        call()
    with pytest.raises(ConfigError):
        srd.relevance(x, 0, ["nowhere"])
    assert net[1].inplace and not net.training and x.requires_grad is False and len(seen) >= 7
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), before[1])
    assert count_hooks(net) == before[2]
    assert all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())


def test_wrong_arguments_are_answered():
    net, x = chain(), images()
    with pytest.raises(ConfigError, match="start must be one of paper, code, constant"):
        explain(net, start="eq4")
    with pytest.raises(ConfigError, match="is not a module"):
        explain(net, resolution="middle")
    with pytest.raises(ConfigError, match="no node 'conv1'"):
        explain(net).relevance(x, 0, ["conv1"])
    with pytest.raises(ConfigError, match="must lie inside layer '4' of 4x4"):
        explain(net).erf(x, "4", (4, 0))
    with pytest.raises(ConfigError, match="encoder"):
        explain(net).relevance(x, 0, ["12"])
    with pytest.raises(ConfigError, match="two logits"):
        explain(chain(classes=1), 1, **OPTIONS)(x, 0)


def test_the_input_node_is_the_normalised_image():
    net, x = chain(), images().sigmoid()
    plain = explain(net, **OPTIONS)((x - 0.4) / 0.2, 1)
    inside = build("srd", Explanandum(net, 3, mean=0.4, std=0.2), **OPTIONS)(x, 1)
    assert torch.allclose(plain, inside, atol=1e-10)
    resized = build("srd", Explanandum(net, 3, mean=0.4, std=0.2, input_size=8), **OPTIONS)
    big = nn.functional.interpolate(x, (12, 12), mode="bilinear")
    assert resized(big, 1).shape == (2, 12, 12) and resized.relevance(big, 1, ["input"])["input"].shape == (2, 8, 8)


def test_one_pass_through_the_head_gives_what_two_give() -> None:
    graph = srd_graph.record(explain(chain()).explanandum, images())
    encoder, index = graph.find("9"), torch.tensor([0, 1])
    short = srd_sweep.initial_relevance(graph, encoder, index, "paper")
    given = srd_sweep.initial_relevance(graph, encoder, index, "paper", mean=srd_sweep.mean_class_map(graph, encoder))
    own = nn.functional.one_hot(index, graph.logits.shape[1]).to(graph.logits)
    assert srd_sweep._clear_difference(graph, encoder, own) is not None and given.abs().max() > 0
    torch.testing.assert_close(short, given, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 2, 2), (1, 1, 1, 1)]
)
def test_sums_over_receptive_fields_and_their_transpose(kernel: int, stride: int, padding: int, dilation: int) -> None:
    weight = torch.rand(4, 3, kernel, kernel, dtype=torch.float64)
    rule = srd_rules.Conv(weight, None, (stride, stride), (padding, padding), (dilation, dilation), 1)
    values = torch.rand(2, 1, 9, 8, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.conv2d(values, torch.ones(1, 1, kernel, kernel).double(), None, stride, padding, dilation)
    torch.testing.assert_close(rule._sum_field(values), expected)
    back = torch.rand_like(expected)
    (slope,) = torch.autograd.grad(expected, values, back)
    torch.testing.assert_close(rule._spread_field(back, values), slope)


def test_products_over_channels_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.rand(2, 2, 7, 5, 6, dtype=torch.float64)
    expected = (a * b).sum(1, keepdim=True)
    monkeypatch.setattr(srd_rules, "_BLOCK", 2 * 2 * 5 * 6)
    with torch.no_grad():
        torch.testing.assert_close(srd_rules.inner(a, b), expected)
        torch.testing.assert_close(srd_rules.norms(a), torch.linalg.vector_norm(a, dim=1, keepdim=True))
