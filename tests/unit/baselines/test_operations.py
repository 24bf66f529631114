"""One table of operations for every watcher, ReLU6, gates, and forward passes that symbolic tracing cannot follow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainer.baselines import build
from explainer.baselines.kernels.graph import Graph
from explainer.baselines.kernels.graph_calls import function_kind
from explainer.baselines.kernels.graph_watch import watch_run
from explainer.baselines.kernels.operations import ACTIVATIONS, bounds, plain_name, signal_and_gate
from explainer.metrics import apop
from explainer.models.explanandum import Explanandum

CALLS = {
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2], dtype=x.dtype)),
}


class Squeeze(nn.Module):
    """A convolutional network with squeeze-and-excitation; ``frozen`` cuts the gate off the graph, which makes it the constant it is taken
    for. ``branches`` adds control flow that symbolic tracing refuses.
    """

    def __init__(self, frozen: bool = False, branches: bool = False, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.down, self.up = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.two = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.head = nn.Linear(5, 3, bias=False)
        self.activation = activation or nn.ReLU()
        self.frozen, self.branches = frozen, branches
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.branches and float(x.sum()) > 1e9:
            return self.head(x)
        x = self.activation(self.one(x))
        gate = F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = x * (gate.detach() if self.frozen else gate)
        x = self.activation(self.two(x))
        return self.head(x.mean((2, 3)))


def explained(net: nn.Module) -> Explanandum:
    return Explanandum(net, num_classes=3, task="multiclass", mean=0.0, std=1.0)


def pictures() -> Tensor:
    return torch.rand(2, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_names_and_bounds_by_hand() -> None:
    assert [plain_name(n) for n in ("relu_", "__iadd__", "__rsub__", "add", "__init__")] == [
        ("relu", True),
        ("add", True),
        ("rsub", False),
        ("add", False),
        ("init", False),
    ]
    x, infinite = torch.zeros(1), float("inf")
    assert bounds("relu", (x,), {}) == (0, infinite)
    assert bounds("hardtanh", (x, 0.0, 6.0), {}) == bounds("relu6", (x,), {}) == (0, 6)
    assert bounds("hardtanh", (x,), {}) is None
    assert bounds("clamp", (x,), {"min": 0}) == (0, infinite)
    assert bounds("clamp", (x, -1), {}) is None


def test_a_gate_is_the_smaller_operand_of_a_product() -> None:
    signal, gate = torch.ones(2, 4, 3, 3), torch.ones(2, 4, 1, 1)
    for operands in ((signal, gate), (gate, signal)):
        found = signal_and_gate("mul", operands)
        assert found is not None and found[0] is signal and found[1] is gate
    assert signal_and_gate("mul", (signal, signal)) is None  # neither is the gate
    assert signal_and_gate("add", (signal, gate)) is None
    assert signal_and_gate("mul", (signal, torch.ones(2, 3))) is None


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_known_to_every_watcher(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            function = CALLS.get(name) or getattr(F, name)
            return self.head(function(self.conv(x)).mean((2, 3)))

    explanandum, images = explained(Net()), pictures()
    for method in ("lrp", "srd", "agf", "deeplift_shap", "excitation_backprop"):
        assert build(method, explanandum).all_classes(images).abs().sum() > 0, method
    assert function_kind(name, 1) == ("relu" if name == "relu" else "activation")
    if name != "relu":
        with pytest.raises(Exception, match="apop is defined for ReLU"):
            apop.apop_logits(explanandum.classifier.eval(), images)


def test_relu6_lets_guided_gradients_through_between_its_bounds() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU6(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(10 * x - 1)  # -1 .. 9 at pixels 0 .. 1
            return torch.stack([y.sum((1, 2, 3)), -y.sum((1, 2, 3))], 1)

    explanandum = Explanandum(Net(), num_classes=2, mean=0.0, std=1.0)
    row = torch.tensor([0.0, 0.1, 0.4, 0.7, 0.9], dtype=torch.float64).expand(1, 1, 1, 5)  # before the bound: -1, 0, 3, 6, 8
    images = row.expand(1, 3, 5, 5)
    assert build("guided_backprop", explanandum)(images, 0)[0, 0].tolist() == [0, 10, 10, 0, 0]
    assert build("guided_backprop", explanandum, convention="captum")(images, 0)[0, 0].tolist() == [0, 0, 10, 0, 0]
    assert build("guided_backprop", explanandum)(images, 1).abs().sum() == 0  # its gradients are negative
    assert build("deconvnet", explanandum)(images, 0)[0, 0].tolist() == [10] * 5


def test_lrp_through_a_gate_is_input_times_gradient_with_the_gate_held() -> None:
    """Without biases, ReLUs and a tiny epsilon: R = x df/dx of the network whose gate is a constant, and its sum is the logit."""
    images, frozen = pictures(), Squeeze(frozen=True)
    leaf = images.clone().requires_grad_()
    logits = frozen(leaf)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), leaf)
    relevance = build("lrp", explained(Squeeze())).relevance(images, 1)
    torch.testing.assert_close(relevance, leaf.detach() * gradient, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(relevance.sum((1, 2, 3)), logits[:, 1].detach(), rtol=1e-5, atol=1e-8)


def test_z_plus_through_a_gate_conserves_the_logit() -> None:
    images, net = pictures(), Squeeze()
    for rule in ("zplus_zero_bias", "epsilon"):
        relevance = build("lrp", explained(net), rule=rule).relevance(images, 0)
        torch.testing.assert_close(relevance.sum((1, 2, 3)), net(images)[:, 0].detach(), rtol=1e-4, atol=1e-6)


def test_srd_through_a_gate_equals_restarted_gradients_with_the_gate_held() -> None:
    """Without biases R_i = <x_i, VJP(v R / ||v||^2)> (specification, I7), from activation to activation by autograd."""
    images, net = pictures(), Squeeze(frozen=True)
    x0 = images.clone().requires_grad_()
    v1 = net.one(x0)
    x1 = v1.relu().detach().requires_grad_()
    gate = F.hardsigmoid(net.up(F.relu(net.down(x1.mean((2, 3), keepdim=True))))).detach()
    v2 = net.two(x1 * gate)

    def back(v: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
        square = v.detach().square().sum(1, keepdim=True)
        start = torch.where(square > 1e-20, v.detach() * relevance[:, None] / square.clamp(min=1e-20), 0.0)
        return (x.detach() * torch.autograd.grad(v, x, start)[0]).sum(1)

    method = build("srd", explained(Squeeze()))
    start = torch.rand(2, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = method.relevance(images, 1, ["activation#0", "input"], initial=start)
    first = back(v2, x1, start)
    torch.testing.assert_close(found["activation#0"], first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["input"], back(v1, x0, first), rtol=1e-9, atol=1e-12)
    account = method.account(images, 1)
    lost = sum(account.leak.values())
    torch.testing.assert_close(account.relevance["input"].sum((1, 2)) + lost, account.relevance["activation#1"].sum((1, 2)))


def test_agf_conserves_its_sum_through_a_gate() -> None:
    images, net = pictures(), Squeeze()
    quantities = build("agf", explained(net), first_conv="full").intermediates(images, 2)
    sums = [q["Phi"].flatten(1).sum(1) for place, q in quantities.items() if place in ("one", "two")]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-6)


def test_a_watched_pass_lists_what_a_traced_one_does() -> None:
    images, plain, branching = pictures(), Squeeze(), Squeeze(branches=True)
    assert Graph(plain, "agf").graph is not None
    assert Graph(branching, "agf").graph is None
    traced, watched = Graph(plain, "agf").run(images), watch_run(branching, images.clone().requires_grad_(), "agf")
    layers = [[(c.kind, c.output.shape) for c in run.calls if c.kind not in ("unknown", "reshape")] for run in (traced, watched)]
    assert layers[0] == layers[1]
    assert [c.kind for c in traced.calls].count("gate") == 1
    torch.testing.assert_close(build("agf", explained(branching))(images, 2), build("agf", explained(plain))(images, 2))


def test_a_bounded_efficientnet_is_explained_by_every_layer_rule() -> None:
    timm = pytest.importorskip("timm")  # ReLU6, convolutions padded as the image's size asks, no squeeze-and-excitation
    torch.manual_seed(0)
    net = timm.create_model("tf_efficientnet_lite0", num_classes=4)
    explanandum = Explanandum(net, num_classes=4, task="multiclass")
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for method in ("srd", "agf", "guided_backprop", "lrp", "lrp_zplus", "lrp_alpha_beta", "excitation_backprop"):
        maps = build(method, explanandum)(images, 1)
        assert maps.shape == (1, 32, 32) and bool(maps.isfinite().all()) and maps.abs().sum() > 0, method
