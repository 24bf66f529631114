"""APOP: hand-worked numbers, invariants T1-T3, shared and functional ReLUs, refusals, accuracies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tvm
from torch import nn

from explainer import Explanandum
from explainer.errors import ConfigError, ShapeError, UnsupportedLayerError
from explainer.metrics.apop import COLUMNS, apop, apop_logits, binarized_call_logits, binarized_logits, make_substitute, top_k_hits
from explainer.metrics.base import PerImageMetric


def network(bias=True, relu=nn.ReLU):
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=bias),
            relu(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 5, 3, bias=bias),
            relu(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(5, 6, bias=bias),
            relu(),
            nn.Dropout(),
            nn.Linear(6, 3),
        )
        .double()
        .eval()
    )


def images(batch=2, seed=0, size=8):
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_by_hand():
    """Two pixels, weights 1 and -1, bias 2: on x=(3,1) unit a=3-1+2=4 is open, b=-3+1-2=-4 shut; on x'=(0,5): a=-3 (kept), b=3 (masked)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False)).double().eval()
    net[1].weight.data, net[1].bias.data = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double(), torch.tensor([2.0, -2.0]).double()
    net[3].weight.data = torch.eye(2).double()
    x, other = torch.tensor([3.0, 1.0]).double().view(1, 1, 1, 2), torch.tensor([0.0, 5.0]).double().view(1, 1, 1, 2)
    original, imposed = apop_logits(net, x, other)
    assert original.tolist() == [[4.0, 0.0]] and imposed.tolist() == [[-3.0, 0.0]]
    assert apop_logits(net, x, other, "apop_relu")[1].tolist() == [[0.0, 0.0]]
    assert apop_logits(net, x, "zeros")[1].tolist() == [[2.0, 0.0]]
    assert apop_logits(net, x, "ones")[1].tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("mode", ["apop", "apop_relu"])
@pytest.mark.parametrize("inplace", [False, True])
def test_own_image_reproduces_the_logits(mode, inplace):
    """T1, also through torchvision's shared in-place ReLUs."""
    x = images()
    net = network(relu=lambda: nn.ReLU(inplace))
    original, imposed = apop_logits(net, x, x, mode)
    assert torch.equal(original, net(x)) and torch.allclose(imposed, original, atol=1e-12)
    resnet = tvm.ResNet(tvm.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).double().eval()
    big = images(1, size=32)
    original, imposed = apop_logits(resnet, big, big, mode)
    assert torch.equal(original, resnet(big)) and torch.allclose(imposed, original, atol=1e-12)
    assert not torch.allclose(apop_logits(resnet, big, images(1, 7, 32), mode)[1], original)


def test_zero_image_without_biases_gives_the_last_bias():
    """T2."""
    net = network(bias=False)
    assert torch.allclose(apop_logits(net, images())[1], net[-1].bias.expand(2, 3), atol=1e-15)


def test_second_pass_is_affine_only_in_mode_apop():
    """T3."""
    net, x, a, b = network(), images(), images(seed=1), images(seed=2)
    for mode, affine in (("apop", True), ("apop_relu", False)):
        mixed = apop_logits(net, x, 0.3 * a + 0.7 * b, mode)[1]
        expected = 0.3 * apop_logits(net, x, a, mode)[1] + 0.7 * apop_logits(net, x, b, mode)[1]
        assert torch.allclose(mixed, expected, atol=1e-10) is affine


def test_masks_and_winners_come_from_the_image():
    """Against a second pass written out with explicit masks and indices."""
    net, x, other = network(), images(), images(seed=3)
    v1 = net[0](x)
    _, winners = F.max_pool2d(v1.relu(), 2, return_indices=True)
    v2 = net[3](net[2](v1.relu()))
    v3 = net[7](net[6](net[5](v2.relu())))
    u = net[0](other) * (v1 > 0)
    u = net[3](u.flatten(2).gather(2, winners.flatten(2)).view(winners.shape)) * (v2 > 0)
    expected = net[10](net[7](net[6](net[5](u))) * (v3 > 0))
    assert torch.allclose(apop_logits(net, x, other)[1], expected, atol=1e-12)


def test_functional_and_statement_style_relus_are_caught():
    class Functional(nn.Module):
        def __init__(self, style):
            super().__init__()
            self.net, self.style = network(), style

        def relu(self, x):
            if self.style == "statement":
                x.relu_()
                return x
            return {"F": F.relu, "torch": torch.relu, "method": lambda t: t.relu()}[self.style](x)

        def forward(self, x):
            n = self.net
            x = F.max_pool2d(self.relu(n[0](x)), 2)
            return n[10](self.relu(n[7](n[6](n[5](self.relu(n[3](x)))))))

    x, other = images(), images(seed=1)
    expected = apop_logits(network(), x, other)[1]
    for style in ("F", "torch", "method", "statement"):
        assert torch.allclose(apop_logits(Functional(style).eval(), x, other)[1], expected, atol=1e-12)


def test_refusals():
    x = images()
    with pytest.raises(UnsupportedLayerError, match="gelu"):
        apop_logits(network(relu=nn.GELU), x)
    with pytest.raises(UnsupportedLayerError, match="hardtanh"):
        apop_logits(network(relu=nn.ReLU6), x)

    class GlobalMaximum(nn.Module):
        def forward(self, u):
            return u.relu().amax((2, 3))

    with pytest.raises(UnsupportedLayerError, match="amax"):  # its winners would be the substitute's
        apop_logits(GlobalMaximum().eval(), x)
    with pytest.raises(ConfigError, match="eval mode"):
        apop_logits(network().train(), x)
    with pytest.raises(ConfigError, match="'apop' or 'apop_relu'"):
        apop_logits(network(), x, mode="relu")
    with pytest.raises(ConfigError, match="'zeros', 'ones', 'noise'"):
        make_substitute(x, "mean")
    with pytest.raises(ShapeError, match="substitute"):
        make_substitute(x, x[:1])

    class Fickle(nn.Module):
        def forward(self, u):
            return (u.relu() if bool(u.sum() != 0) else u.relu().relu()).mean((2, 3))

    with pytest.raises(UnsupportedLayerError, match="control flow"):
        apop_logits(Fickle().eval(), torch.ones(1, 3, 2, 2))


def test_noise_is_drawn_from_the_generator():
    x = images()
    first, second = (make_substitute(x, "noise", torch.Generator().manual_seed(3)) for _ in range(2))
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(first, second) and torch.equal(first, torch.randn(x.shape, generator=generator, dtype=x.dtype))
    net = network()
    before = torch.get_rng_state()
    apop_logits(net, x, "noise")
    assert torch.equal(before, torch.get_rng_state())


def test_binarised_layer():
    net, x = network(), images()
    u = (net[1](net[0](x)) > 0).double()
    assert torch.equal(binarized_logits(net, x, "1"), net[2:](u)) and len(net[1]._forward_hooks) == 0
    with pytest.raises(ConfigError, match="'relu' is not a module"):
        binarized_logits(net, x, "relu")


@pytest.mark.parametrize("inplace", [False, True])
def test_binarised_calls_are_counted_one_by_one(inplace):
    net, x = network(relu=lambda: nn.ReLU(inplace)), images()
    for call, layer in enumerate(("1", "4", "8")):
        torch.testing.assert_close(binarized_call_logits(net, x.clone(), call), binarized_logits(net, x.clone(), layer))
    shared = tvm.ResNet(tvm.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3).double().eval()
    big = images(1, size=32)
    found = [binarized_call_logits(shared, big, call) for call in range(9)]
    assert all(not torch.allclose(a, shared(big)) for a in found)
    assert not torch.allclose(found[1], found[2]), "two calls of one ReLU"
    for wrong in (9, -1):
        with pytest.raises(ConfigError, match=f"9 activation calls, numbered 0 to 8; received {wrong}"):
            binarized_call_logits(shared, big, wrong)


def test_top_k_and_ties():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [float("nan"), 1.0, 2.0]])
    labels = torch.tensor([1, 0, 2])
    assert top_k_hits(logits, labels, 1).tolist() == [False, False, False]
    assert top_k_hits(logits, labels, 2).tolist() == [True, True, False]


def test_metric_counts_and_merges():
    net = network()
    explanandum = Explanandum(net, 3, mean=0.5, std=0.25)
    x = images(6).sigmoid()
    labels = net(explanandum.normalize(x)).argmax(1)
    labels[0] = (labels[0] + 1) % 3
    metric, first, second = PerImageMetric(apop), PerImageMetric(apop), PerImageMetric(apop)
    metric.update(x, labels, explanandum)
    first.update(x[:2], labels[:2], explanandum)
    second.update(x[2:], labels[2:], explanandum)
    imposed = apop_logits(net, explanandum.normalize(x))[1]
    expected = {
        "original_top1": 5 / 6,
        "original_top5": 1.0,
        "apop_top1": float((imposed.argmax(1) == labels).double().mean()),
        "apop_top5": 1.0,
    }
    assert metric.labels == COLUMNS and dict(zip(metric.labels, metric.compute().tolist(), strict=True)) == pytest.approx(expected)
    assert torch.allclose((first.total + second.total) / (first.used + second.used), metric.compute())
    resized = PerImageMetric("apop")
    resized.update(F.interpolate(x, (12, 12)), labels, Explanandum(net, 3, mean=0.5, std=0.25, input_size=8))
    assert int(resized.used[0]) == 6
