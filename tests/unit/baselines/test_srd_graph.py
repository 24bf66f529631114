"""SRD's view of a network: shared modules, functional and in-place calls, torchvision families, and what it must refuse."""

from __future__ import annotations

import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as tvm
from torch import nn

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels.srd_graph import record
from explainer.errors import ConfigError, UnsupportedLayerError


def head():
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)


class Style(nn.Module):
    """The same network written in four ways."""

    def __init__(self, style):
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 5, 3, padding=1)
        self.act, self.fc, self.style = nn.ReLU(inplace=style == "inplace module"), nn.Linear(5, 3), style

    def relu(self, x):
        if self.style in ("shared module", "inplace module"):
            return self.act(x)
        if self.style == "functional":
            return F.relu(x)
        if self.style == "inplace functional":
            return F.relu(x, inplace=True)
        x.relu_()  # the result is not used: only the tensor itself is changed
        return x

    def forward(self, x):
        x = F.max_pool2d(self.relu(self.c1(x)), 2)
        y = self.c2(self.relu(self.c3(x)[:, :4]) if self.style == "sliced" else x)
        if self.style in ("inplace module", "method"):
            y += x
        else:
            y = torch.add(y, x)
        x = self.relu(self.c3(self.relu(y)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def explain(net, classes=3, **options):
    return build("srd", Explanandum(net.double(), classes, mean=0.0, std=1.0), **options)


def images(size=8, batch=1):
    return torch.rand(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("style", ["inplace module", "functional", "inplace functional", "method"])
def test_ways_of_writing_a_network_make_no_difference(style):
    expected = explain(Style("shared module"))
    actual = explain(Style(style))
    assert torch.allclose(actual(images(), 1), expected(images(), 1), atol=1e-12)
    assert float(expected(images(), 1).max()) == pytest.approx(1.0)


def test_calls_of_a_shared_module_are_separate_nodes():
    srd = explain(Style("shared module"))
    maps = srd.relevance(images(), 1, ["act#0", "act#1", "act#2", "act"])
    assert maps["act#0"].shape[-1] == 8 and maps["act#1"].shape[-1] == 4
    assert torch.equal(maps["act"], maps["act#2"]) and not torch.equal(maps["act#1"], maps["act#2"])
    assert next(iter(srd.nodes(images()))) == "input" and srd.nodes(images())["act#0"] == (8, 8)
    with pytest.raises(ConfigError, match="act#7"):
        srd.relevance(images(), 1, ["act#7"])


def test_an_unsupported_operation_is_named_with_its_place_and_alternatives():
    srd = explain(Style("sliced"))
    with pytest.raises(UnsupportedLayerError, match=r"srd .*'__getitem__'.*extremal_perturbation"):
        srd(images(), 1)
    assert srd.relevance(images(), 1, ["relu#2"])["relu#2"].shape == (1, 4, 4), "above the operation relevance is defined"

    class Gate(nn.Module):
        def forward(self, x):
            return x * x.sigmoid()

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Gate(), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), *head())
    with pytest.raises(UnsupportedLayerError, match=r"'mul'.*called in '1'"):
        explain(net.eval())(images(), 1)
    assert explain(net.eval(), resolution="low")(images(), 1).shape == (1, 8, 8)


@pytest.mark.parametrize(
    "layer",
    [
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Softmax(1),
        nn.Upsample(scale_factor=2),
    ],
)
def test_layers_without_a_rule_raise(layer):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), *head()).eval()
    with pytest.raises(UnsupportedLayerError, match="called in '1'"):
        explain(net)(images(), 1)


def test_a_scripted_classifier_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head()).double().eval(), images())
    with pytest.raises(UnsupportedLayerError, match=r"plain nn\.Module"):
        explain(net)(images(), 1)


def test_a_sum_before_the_batch_norm_is_not_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(F.relu(self.bn(self.conv(x) + x)).mean((2, 3)))

    graph = record(Explanandum(Net().double(), 2, mean=0.0, std=1.0), images())
    assert graph.folds == {}
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), *head())
    graph = record(Explanandum(chain.double().eval(), 3, mean=0.0, std=1.0), images())
    assert {graph.name(k): graph.name(v) for k, v in graph.folds.items()} == {"1": "0"}


def vgg11(batch_norm):
    """torchvision's VGG-11 features with a small head (its own takes seconds to initialise)."""
    head = {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(512, 3)}
    return nn.Sequential(OrderedDict(features=tvm.vgg.make_layers(tvm.vgg.cfgs["A"], batch_norm), **head))


def test_a_convolution_with_two_consumers_is_not_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.bn, self.act, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 3)
            nn.init.normal_(self.bn.bias)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(self.act(self.bn(x) + x).mean((2, 3)))

    srd = explain(Net().eval(), start="constant")
    assert record(srd.explanandum, images()).folds == {}
    maps = srd.relevance(images(), 0, ["input", "conv", "act"])
    totals = [float(m.sum()) for m in maps.values()]
    assert totals == pytest.approx([totals[-1]] * 3, rel=1e-10) and totals[-1] == 36


def random_statistics(net, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.1)
            m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
    return net.eval()


@pytest.mark.parametrize(
    ("make", "encoder", "high"),
    [
        (lambda: vgg11(False), "features.20", "features.14"),
        pytest.param(lambda: vgg11(True), "features.28", "features.20", marks=pytest.mark.slow),
        (lambda: tvm.resnet18(num_classes=3), "layer4", "layer2"),
        pytest.param(lambda: tvm.resnet50(num_classes=3), "layer4", "layer2", marks=pytest.mark.slow),
        (lambda: tvm.mobilenet_v2(num_classes=3), "features", None),
        (lambda: tvm.squeezenet1_1(num_classes=3), "classifier.2", None),
        (lambda: tvm.densenet121(num_classes=3), None, None),
    ],
    ids=["vgg11", "vgg11_bn", "resnet18", "resnet50", "mobilenet_v2", "squeezenet", "densenet"],
)
def test_torchvision_families_conserve_relevance(make, encoder, high):
    torch.manual_seed(0)
    explanandum = Explanandum(random_statistics(make()).double(), 3)
    x = images(64)
    srd = build("srd", explanandum, start="constant", resolution="high")
    account = srd.account(x, 0)
    names = list(account.relevance)
    total = account.relevance[names[-1]].sum()
    assert abs(float(account.relevance["input"].sum() + sum(v.sum() for v in account.leak.values()) - total)) < 1e-8 * float(total)
    graph = record(explanandum, x)
    if encoder:
        assert graph.find(encoder) == graph.encoder_output()
    if high:
        expected = srd.relevance(x, 0, [high])[high]
        raw = build("srd", explanandum, start="constant", resolution="high", normalize=False)(x, 0)
        assert expected.shape == (1, 8, 8)
        assert torch.allclose(raw, F.interpolate(expected[:, None], (64, 64), mode="bilinear")[:, 0], atol=1e-12)


class Branches(nn.Module):
    """Two branches, each pooled by itself, and a long head: no feature map holds all evidence."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 5)
        self.head = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(30)])

    def forward(self, x):
        return self.head(torch.cat([self.left(x).mean((2, 3)), self.right(x).mean((2, 3))], dim=1))


def test_a_refusal_names_maps_and_other_methods_and_stays_short():
    srd = build("srd", Explanandum(Branches(), 4))
    with pytest.raises(ConfigError, match=r"encoder_output=, for example right, left, input\. Use a method without layer rules: ") as error:
        srd(torch.rand(1, 3, 8, 8), 0)
    assert len(str(error.value)) < 400
    with pytest.raises(ConfigError, match=r"name another, for example head, head\.29, .* more \(path#0") as error:
        srd.vectors(torch.rand(1, 3, 8, 8), "head.7.8")
    assert len(str(error.value)) < 400


class Joined(nn.Module):
    def __init__(self, keyword):
        super().__init__()
        torch.manual_seed(0)
        self.keyword = keyword
        self.first, self.second, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x).relu()
        both = [x, self.second(x).relu()]
        return self.fc((torch.cat(tensors=both, dim=1) if self.keyword else torch.cat(both, 1)).mean((2, 3)))


@pytest.mark.parametrize("method", ["srd", "agf", "lrp", "lrp_alpha_beta", "rap", "clrp", "excitation_backprop", "deeplift_shap"])
@pytest.mark.filterwarnings("ignore:agf. the logit")
def test_tensors_to_join_may_be_given_by_keyword(method):
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = [build(method, Explanandum(Joined(k).double().eval(), 3, mean=0.0, std=1.0))(images, [0, 1]) for k in (False, True)]
    torch.testing.assert_close(*maps)
