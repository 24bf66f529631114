"""AGF: invariants, options, classifier families, refusals and the self-supervised procedure."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torchvision
from torch import nn

from explainer.baselines import build
from explainer.baselines.agf import AGF, to_map
from explainer.baselines.agf_self_supervised import explain_self_supervised
from explainer.baselines.kernels import agf_sweep
from explainer.baselines.kernels.agf_rules import Options, class_distribution, factorize, normalize_max, sdiv, shift
from explainer.baselines.kernels.graph import Graph
from explainer.errors import ConfigError, ShapeError, UnsupportedLayerError
from explainer.models.explanandum import Explanandum

pytestmark = pytest.mark.filterwarnings("ignore:agf. the logit")


def small_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(8, 4),
    ).double()


def wrap(net: nn.Module, classes: int = 4) -> Explanandum:
    return Explanandum(net, classes, mean=0.4, std=0.3)


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("options", [{"mode": "code"}, {"mode": "paper"}, {"ridge": 0.0}], ids=str)
def test_nan_in_one_image_fails_that_image_only(options: dict[str, object]) -> None:
    """Half precision or a damaged weight may overflow for one image of a batch."""
    net, images = small_net().eval(), pictures(3, 3, 12, 12)
    method = AGF(wrap(net), **options)  # type: ignore[arg-type]
    sound = method(images, 1)
    net[0].register_forward_hook(lambda module, inputs, output: output.index_fill(0, torch.tensor(1), torch.nan))
    maps = method(images, 1)
    assert torch.equal(maps[[0, 2]], sound[[0, 2]]) and maps[1].isnan().any()


def test_safe_division_by_hand() -> None:
    out = sdiv(torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([2.0, 0.0, -1e-9, -4.0], dtype=torch.float64))
    assert torch.allclose(out, torch.tensor([0.5, 0.0, 3e9, -1.0]).double(), rtol=1e-8)


def test_signed_maximum_flips_unless_guarded() -> None:
    a = torch.tensor([[[[-4.0, -2.0]]], [[[1.0, 4.0]]], [[[0.0, 0.0]]]])
    assert torch.allclose(normalize_max(a), torch.tensor([[[[2.0, 1.0]]], [[[0.25, 1.0]]], [[[0.0, 0.0]]]]))
    assert torch.allclose(normalize_max(a, guard=True)[0], a[0])


def test_shift_by_hand() -> None:
    c, r = torch.tensor([[[[3.0, 0.0, -1.0]]]]), torch.tensor([[[[2.0, 5.0, 4.0]]]])
    assert shift(c, r, Options()).tolist() == [[[[2.0, 0.0, 0.0]]]]  # mean of 2 and 4 taken off
    assert shift(c, r, Options(shift="everywhere")).tolist() == [[[[-0.5, -0.5, -2.5]]]]  # 11 / 2 taken off everywhere
    assert shift(0 * c, r, Options()).tolist() == [[[[0.0, 0.0, 0.0]]]]


def test_distribution_by_hand_and_ties() -> None:
    # y = (2, 0), t = 0: sigma 2, z = (2, 2 exp(-1/2))
    expected = 1 / (1 + torch.exp(torch.tensor(2 * 0.6065306597 - 2)))
    assert torch.allclose(class_distribution(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))[0, 0], expected)
    equal = torch.ones(1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(class_distribution(equal, torch.tensor([1]))[0, 1], equal)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("ridge", [1.0, 0.0, 1e-9])
def test_factorization_solves_the_least_squares(ridge: float) -> None:
    y, phi = pictures(1, 6, 4, 3) - 0.5, pictures(1, 1, 4, 3) - 0.5
    h = torch.sigmoid(3.0 * y / y.max()).flatten(2)[0]
    r = torch.stack([h[:, (phi < 0).flatten()].mean(1), h[:, (phi > 0).flatten()].mean(1)], dim=1)
    stacked = torch.cat([r, ridge**0.5 * torch.eye(2).double()]), torch.cat([h, torch.zeros(2, 12).double()])
    weights = torch.linalg.lstsq(*stacked).solution.relu()
    found = factorize(y, phi, Options(gain=3.0, ridge=ridge))[0, 0].flatten()
    assert torch.allclose(found, weights[1] - weights[0], atol=1e-6)


def test_zero_logits_gap_gives_a_zero_map() -> None:
    net = small_net()
    nn.init.zeros_(net[-1].weight), nn.init.ones_(net[-1].bias)
    assert float(AGF(wrap(net))(pictures(2, 3, 12, 12), 1).abs().max()) == 0


def test_sum_is_conserved_layer_by_layer() -> None:
    record = AGF(wrap(small_net())).intermediates(pictures(2, 3, 12, 10), 2)
    dims = {name: q["Phi"].flatten(1).sum(1) for name, q in record.items()}
    start = dims["13"]
    for name, total in dims.items():
        scale = record[name]["Phi"].abs().flatten(1).sum(1)
        assert ((total - start).abs() <= 1e-6 * scale).all(), name
    for name in ("3", "6"):
        q = record[name]
        assert all(float(q[key].min()) >= 0 and q[key].shape[1] == 1 for key in ("F_x", "F_dx", "M"))
        assert float(q["r"].abs().max()) > 0 and float(q["M"].max()) == pytest.approx(1, abs=1e-3)


CHANGES = {
    "gain": 1.0,
    "ridge": 1e-3,
    "shift": "everywhere",
    "first_conv": "full",
    "no_a": True,
    "no_fx": True,
    "no_fdx": True,
    "no_m": True,
    "no_reg": True,
    "gradcam": True,
}


@pytest.mark.parametrize("option", CHANGES)
def test_each_option_changes_the_map_and_its_own_term(option: str) -> None:
    explanandum, images = wrap(small_net()), pictures(1, 3, 12, 12)
    plain, changed = AGF(explanandum), AGF(explanandum, **{option: CHANGES[option]})
    assert not torch.allclose(plain(images, 1), changed(images, 1), atol=1e-6)
    before, after = plain.intermediates(images, 1)["6"], changed.intermediates(images, 1)["6"]
    term = {"no_a": "A", "no_fx": "F_x", "no_fdx": "F_dx", "no_m": "M"}.get(option)
    if term:
        assert float(after[term].abs().max()) == 0 < float(before[term].abs().max())
        gate = 1 if term in ("A", "F_dx") else torch.sigmoid(before["C"])
        live = before["C"] != 0
        assert torch.allclose(before["r"] - after["r"], before[term] * gate * live, atol=1e-7)
    if option == "no_reg":
        terms = before["A"] + before["F_dx"] + before["F_x"] + before["M"]
        assert torch.allclose(after["r"], terms * (before["C"] != 0))


def test_flat_follows_the_published_resnets() -> None:
    torch.manual_seed(0)
    images = torch.rand(1, 3, 40, 33)
    for make, full in ((torchvision.models.resnet50, "conv2"), (torchvision.models.resnet18, "conv1")):
        explanandum = wrap(make(num_classes=4))
        record = AGF(explanandum).intermediates(images, 0)
        residual = {name for name, q in record.items() if "r" in q}
        blocks = {name.rsplit(".", 1)[0] for name in record if ".conv" in name}
        assert residual == {f"{block}.{full}" for block in blocks}
        everywhere = AGF(explanandum, flat=False).intermediates(images, 0)
        assert {name for name, q in everywhere.items() if "r" in q} == {n for n in record if "layer" in n}


def vgg(batch_norm: bool) -> nn.Module:
    """torchvision's VGG-11 with a small head in place of the 120 million weights."""
    with torch.device("meta"):
        net = torchvision.models.vgg11_bn() if batch_norm else torchvision.models.vgg11()
    net.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 4))
    net.features.to_empty(device="cpu")
    for module in net.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net


FAMILIES = {"vgg11": lambda: vgg(False), "vgg11_bn": lambda: vgg(True), "resnet18": lambda: torchvision.models.resnet18(num_classes=4)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["code", "paper"])
def test_torchvision_families_on_rectangles(family: str, mode: str) -> None:
    torch.manual_seed(0)
    explanandum = wrap(FAMILIES[family]())
    state = {k: v.clone() for k, v in explanandum.state_dict().items()}
    flags = [(m.training, getattr(m, "inplace", None)) for m in explanandum.modules()]
    method, images = build("agf", explanandum, mode=mode), torch.rand(1, 3, 64, 45)
    first, other, again = method(images, 0), method(images, 1), method(images, 0)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    assert first.isfinite().all() and float(first.std()) > 0
    assert all(torch.equal(v, state[k]) for k, v in explanandum.state_dict().items())
    assert flags == [(m.training, getattr(m, "inplace", None)) for m in explanandum.modules()]
    both = method.all_classes(images, [1, 0])
    assert torch.allclose(both[:, 0], other, atol=1e-5) and torch.allclose(both[:, 1], first, atol=1e-5)


def test_batch_equals_singles_and_input_size_is_resized_back() -> None:
    images = pictures(2, 3, 12, 12)
    method = AGF(wrap(small_net()))
    singles = torch.cat([method(images[:1], 2), method(images[1:], 0)])
    assert torch.allclose(method(images, [2, 0]), singles, atol=1e-9)
    resized = AGF(Explanandum(small_net(), 4, input_size=16))(images, 1)
    assert resized.shape == (2, 12, 12) and resized.dtype == torch.float64


class Shared(nn.Module):
    """One convolution called twice, functions, an in-place sum and arithmetic before the first layer."""

    def __init__(self, twin: bool) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.stem, self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=not twin)
        self.fc = nn.Linear(4, 4)
        self.twin = nn.Conv2d(4, 4, 3, padding=1) if twin else self.conv
        self.twin.load_state_dict(self.conv.state_dict())
        self.separate = twin

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem((x - 0.5) / 0.2)
        if self.separate:
            x = self.act(x)
            y = torch.relu(self.conv(x))
            y = self.twin(y) + x
            y = torch.relu(y)
        else:
            self.act(x)  # in place, result dropped
            y = self.conv(x)
            nn.functional.relu(y, inplace=True)
            y = self.conv(y)
            y += x
            y.relu_()
        return self.fc(y.mean((2, 3)))


def test_shared_module_and_in_place_writes_equal_the_separate_form() -> None:
    images = pictures(1, 3, 9, 8)
    maps = [AGF(wrap(Shared(twin).double()))(images, 3) for twin in (True, False)]
    assert torch.allclose(*maps, atol=1e-12) and float(maps[0].std()) > 0


class Padded(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.how = how
        self.first, self.second, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1 if how == "conv" else 0), nn.Linear(6, 4)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        if self.how != "conv":
            x = self.pad(x) if self.how == "module" else nn.functional.pad(x, (1, 1, 1, 1))
        return self.fc(self.second(x).relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["module", "function"])
def test_padding_before_a_convolution_is_the_convolutions_own(how: str) -> None:
    images = pictures(2, 3, 9, 8)
    # but for A, in which an input of ones (eq. 9) reaches into a padding that is a layer of its own
    maps = [AGF(wrap(Padded(h).double()), no_a=True)(images, [0, 2]) for h in (how, "conv")]
    assert torch.allclose(*maps, atol=1e-12) and float(maps[0].std()) > 0
    assert torch.isfinite(AGF(wrap(Padded(how).double()))(images, [0, 2])).all()


def test_refusals_name_layer_place_method_and_alternatives() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.GroupNorm(2, 4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    with pytest.raises(UnsupportedLayerError, match=r"agf has no rule for GroupNorm at '1.0'.*grad_cam"):
        AGF(wrap(net))(torch.rand(1, 3, 8, 8), 0)

    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3))

    with pytest.raises(UnsupportedLayerError, match="no single last linear or convolutional layer"):
        AGF(wrap(Branching(), 3))(torch.rand(1, 3, 8, 8), 0)
    with pytest.raises(ConfigError, match="mode must be 'code' or 'paper'"):
        AGF(wrap(small_net()), mode="book")
    with pytest.raises(ConfigError, match="shift must be one of masked, everywhere"):
        AGF(wrap(small_net()), shift="none")


def test_trace_is_compared_with_the_network() -> None:
    net, images = small_net().eval(), pictures(1, 3, 8, 8)
    plain = net(images)
    net[3].register_forward_hook(lambda module, args, out: out * 2)
    assert torch.allclose(Graph(net, "agf").run(images).output, net(images)) and not torch.allclose(plain, net(images))

    class WritesThroughView(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x - 0.5
            x.flatten(1).relu_()  # changes x, which no list of operations shows
            return x.mean((2, 3))

    with pytest.raises(UnsupportedLayerError, match="do not reproduce its output"):
        Graph(WritesThroughView(), "agf").run(images)


def test_negative_logit_warns() -> None:
    net = small_net()
    nn.init.constant_(net[-1].bias, -50.0)
    with pytest.warns(UserWarning, match="logit of an explained class is negative"):
        AGF(wrap(net))(pictures(1, 3, 12, 12), 0)


def test_map_without_positive_values_is_not_scaled() -> None:
    phi = torch.tensor([[[[-2.0, -4.0]], [[-1.0, 0.0]]], [[[2.0, -4.0]], [[1.0, 0.0]]]])
    assert to_map(phi).tolist() == [[[-3.0, -4.0]], [[1.5, -2.0]]]


def _encoder() -> nn.Sequential:
    return nn.Sequential(*list(small_net())[:9])  # a map 6 x 2 x 2


def test_self_supervised_equals_the_plain_sweep_without_a_neighbour() -> None:
    """With ``latent="none"`` the head runs at the image's own latent, so the result is that of the joined network."""
    net, images = small_net().eval(), pictures(2, 3, 12, 12)
    encoder, head = nn.Sequential(*list(net)[:9]), nn.Sequential(*list(net)[10:])
    found = explain_self_supervised(encoder, head, images, pictures(5, 3, 12, 12)[2:], latent="none", class_index=torch.tensor([1, 3]))
    joined = AGF(Explanandum(net, 4, mean=0.0, std=1.0))(images, [1, 3])
    assert torch.allclose(found.maps, joined, atol=1e-9)


def test_self_supervised_neighbour_and_variants() -> None:
    torch.manual_seed(5)
    encoder, head, images = _encoder().eval(), nn.Linear(24, 4).double(), pictures(6, 3, 12, 12)
    with torch.no_grad():
        codes = encoder(images).flatten(1)
    distance = torch.cdist(codes[:2], codes) + torch.eye(6).double()[:2] * 1e9
    nearest = distance.argmin(1)
    found = explain_self_supervised(encoder, head, images[:2], images)  # the images themselves are left out
    assert torch.equal(found.neighbor, nearest)
    assert torch.allclose(found.logits, head(codes[:2] - codes[nearest]))
    assert torch.equal(found.class_index, found.logits.argmax(1))
    given = explain_self_supervised(encoder, head, images[:2], codes, exclude=torch.tensor([int(nearest[0]), -1]))
    assert given.neighbor[0] != nearest[0] and given.neighbor[1] == nearest[1]
    maps = [explain_self_supervised(encoder, head, images[:1], codes, latent=kind).maps for kind in ("difference", "sum", "none")]
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in ((maps[0], maps[1]), (maps[1], maps[2]), (maps[0], maps[2])))
    with pytest.raises(ConfigError, match="no image that differs"):
        explain_self_supervised(encoder, head, images[:1], images[:1])
    with pytest.raises(ShapeError, match="length 3"):
        explain_self_supervised(encoder, head, images[:1], codes[:, :3])
    assert {f.name for f in dataclasses.fields(found)} == {"maps", "class_index", "logits", "neighbor"}


@pytest.mark.parametrize("block", [1, 7, 30, 2**20])
def test_a_linear_layer_in_blocks_is_the_layer(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, phi = torch.randn(2, 6), torch.randn(5, 6), torch.randn(2, 5)
    phi[0, 1] = 0
    monkeypatch.setattr(agf_sweep, "_LINEAR_BLOCK", block)
    z = x.abs() @ weight.abs().T
    expected = x.abs() * (torch.where(phi != 0, phi / z, 0) @ weight.abs())
    torch.testing.assert_close(agf_sweep._influence_of_linear(x, weight, phi), expected)
