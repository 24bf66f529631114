"""Outputs of every form, one class, one logit, and inputs that do not fit: a right answer or an error that says what to do."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import explainer
from explainer.baselines import build
from explainer.errors import ConfigError, ExplainerError, ShapeError
from explainer.models.scores import TwoClasses, auxiliary_logits, logits_of

GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])


@dataclass
class ModelOutput:
    """As Hugging Face's: attributes, some None."""

    loss: Any = None
    logits: Any = None


def net(channels: int = 3, classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


class Returning(nn.Module):
    def __init__(self, form: Any, classes: int = 3) -> None:
        super().__init__()
        self.net, self.form = net(classes=classes), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.net(x))


def images(channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, channels, 10, 10, generator=torch.Generator().manual_seed(3)).to(dtype)


FORMS = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y * 2),
    "features first": lambda y: [torch.zeros(len(y), 7), y],
    "dict": lambda y: {"features": torch.zeros(len(y), 4), "logits": y},
    "dict without a usual name": lambda y: OrderedDict(embedding=torch.zeros(len(y), 4), classes=y),
    "named": lambda y: GoogLeNetOutputs(y, y * 2, None),
    "model output": lambda y: ModelOutput(None, y),
}


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_found_in(form: str) -> None:
    e = explainer.Explanandum(Returning(FORMS[form]), 3, mean=0.4, std=0.3)
    assert torch.equal(e(images()), net()((images() - 0.4) / 0.3))
    torch.testing.assert_close(
        build("grad_cam", e)(images(), 1), build("grad_cam", explainer.Explanandum(net(), 3, mean=0.4, std=0.3))(images(), 1)
    )


def test_what_holds_no_logits_is_described() -> None:
    for form, words in ((lambda y: {"boxes": 1}, "dict with boxes"), (lambda y: None, "NoneType"), (lambda y: (y[:, :2],), "tuple")):
        with pytest.raises(ShapeError, match=rf"{words}.*expected logits \(B,3\)"):
            explainer.Explanandum(Returning(form), 3)(images())


def test_auxiliary_heads() -> None:
    y = torch.rand(2, 3)
    assert len(auxiliary_logits(GoogLeNetOutputs(y, y * 2, None), 3)) == 1 and auxiliary_logits((y, y), 3) == []
    assert torch.equal(logits_of(y, 3), y)


def test_one_class_with_one_logit() -> None:
    for form in (lambda y: y, lambda y: y[:, 0]):
        e = explainer.Explanandum(Returning(form, 1), 1, mean=0.4, std=0.3)
        assert e(images()).shape == (2, 1)
        assert build("gradient", e)(images(), 0).abs().max() > 0 and build("rise", e, n_masks=8, grid=3)(images(), 0).shape == (2, 10, 10)
    with pytest.raises(ConfigError, match=r"probability 1 whatever.*multilabel"):
        explainer.Explanandum(net(classes=1), 1, task="multiclass")


def test_one_logit_for_two_classes() -> None:
    with pytest.raises(ShapeError, match=r"num_classes=1.*multilabel.*TwoClasses"):
        explainer.Explanandum(net(classes=1), 2, task="multiclass")(images())
    single = explainer.Explanandum(net(classes=1), 1, mean=0.4, std=0.3)
    two = explainer.Explanandum(TwoClasses(net(classes=1)), 2, task="multiclass", mean=0.4, std=0.3)
    probability = single(images()).sigmoid()[:, 0]
    torch.testing.assert_close(two.probabilities(two(images())), torch.stack([1 - probability, probability], 1))
    torch.testing.assert_close(build("gradient", two)(images(), 1), build("gradient", single)(images(), 0) / 2)


@pytest.mark.parametrize("model", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["gradient", "grad_cam", "score_cam", "integrated_gradients", "rise", "occlusion", "lrp", "srd", "agf"])
def test_any_precision(name: str, given: torch.dtype, model: torch.dtype) -> None:
    e = explainer.Explanandum(net().to(model), 3, mean=(0.4, 0.5, 0.45), std=(0.25, 0.2, 0.3))
    reference = explainer.Explanandum(net().double(), 3, mean=(0.4, 0.5, 0.45), std=(0.25, 0.2, 0.3))
    options = {"rise": {"n_masks": 8, "grid": 3}, "occlusion": {"window": 5, "stride": 5}}.get(name, {})
    logits = e(images(dtype=given))
    assert logits.dtype == given
    torch.testing.assert_close(logits.double(), reference(images(dtype=torch.float64)), rtol=0.1, atol=0.03)
    try:
        maps = build(name, e, **options)(images(dtype=given), 1)
    except ExplainerError as error:
        assert model in (torch.bfloat16, torch.float16), error
        return
    expected = build(name, reference, **options)(images(dtype=torch.float64), 1)
    assert maps.dtype == given
    correlation = np.corrcoef(maps.double().flatten().numpy(), expected.flatten().numpy())[0, 1]
    assert correlation > (0.9 if model in (torch.bfloat16, torch.float16) else 0.999)


@pytest.mark.parametrize("channels", [1, 4, 10])
def test_other_numbers_of_channels(channels: int) -> None:
    with pytest.raises(ShapeError, match=rf"images have {channels} channel\(s\) and mean has 3 values"):
        explainer.Explanandum(net(channels), 3)(images(channels))
    with pytest.raises(ShapeError, match=rf"cannot take images of {channels} channel"):
        explainer.Explanandum(net(), 3, mean=0.4, std=0.3)(images(channels))
    for mean in (0.4, [0.4] * channels):
        e = explainer.Explanandum(net(channels), 3, mean=mean, std=0.3)
        assert build("grad_cam", e)(images(channels), 1).shape == build("gradient", e)(images(channels), 1).shape == (2, 10, 10)


@pytest.mark.parametrize("index", [None, "cat", -1, 3, [0, 3], 1.0, True, [0, 1, 2]])
def test_classes_that_do_not_exist(index: Any) -> None:
    e = explainer.Explanandum(net(), 3)
    for name in ("gradient", "grad_cam", "rise"):
        with pytest.raises(ConfigError, match="class_index must"):
            build(name, e)(images(), index)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_models(how: str) -> None:
    plain = net().eval()
    made = torch.jit.script(net().eval()) if how == "script" else torch.jit.trace(net().eval(), images())
    e, reference = (explainer.Explanandum(m, 3, mean=0.4, std=0.3) for m in (made, plain))
    torch.testing.assert_close(e(images()), reference(images()))
    torch.testing.assert_close(build("gradient", e)(images(), 1), build("gradient", reference)(images(), 1))
    torch.testing.assert_close(
        build("occlusion", e, window=5, stride=5)(images(), 1), build("occlusion", reference, window=5, stride=5)(images(), 1)
    )
    for name in ("grad_cam", "lrp", "srd", "agf", "guided_backprop", "deeplift_shap"):
        with pytest.raises(ExplainerError, match=r"script|look inside|compiled|cannot follow"):
            build(name, e)(images(), 1)
