"""LRP and excitation backprop against captum, zennit and TorchRay."""

import pytest
import torch
from torch import nn

from explainer import Explanandum
from explainer.baselines import build
from tests.golden.cases import load

LRP = {
    "captum_LRP_epsilon_10": ("lrp", {}),
    "captum_LRP_gamma_12": ("lrp", {"rule": "gamma", "gamma": 0.25}),
    "captum_LRP_zplus_11": ("lrp_zplus", {}),
    "zennit_epsilon_plus_13": ("lrp", {"rule": "epsilon_plus", "start": "one"}),
    "zennit_epsilon_14": ("lrp", {"epsilon": 0.05, "stabilizer": 1e-6, "max_pool": "winner"}),
    "zennit_zplus_zero_bias_15": ("lrp", {"rule": "zplus_zero_bias"}),
}
EXCITATION = {
    "tr_excitation_backprop_4": ("excitation_backprop", {}),
    "tr_excitation_backprop_9": ("excitation_backprop", {"layer": "5"}),
    "tr_excitation_backprop_10": ("excitation_backprop", {"layer": "features.2"}),
    "tr_excitation_backprop_12": ("excitation_backprop", {"layer": "layer1"}),
    "tr_contrastive_excitation_backprop_11": ("contrastive_excitation_backprop", {"layer": "features.5", "contrast_layer": "classifier.4"}),
}
PRECISIONS = [(torch.float64, "suggest_float64"), (torch.float32, "suggest_float32")]


def make(case, method, options, dtype):
    entry, arrays, net = load(case)
    explanandum = Explanandum(net.to(dtype), arrays["mid/logits"].shape[1], mean=0.0, std=1.0)
    images = torch.as_tensor(arrays["in/x"]).to(dtype)
    return build(method, explanandum, **options), images, torch.tensor(entry["args"]["target"]), entry, arrays


def assert_matches(actual, expected, tolerance):
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert float((actual.double() - expected).abs().max()) <= tolerance["atol_rel_to_max"] * float(expected.abs().max())


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("case", LRP)
def test_lrp(case, dtype, precision):
    attributor, images, target, entry, arrays = make(case, *LRP[case], dtype)
    tolerance = entry["tolerance"][precision]
    assert_matches(attributor.relevance(images, target), arrays["out/attr"], tolerance)
    assert_matches(attributor(images, target), arrays["out/attr"].sum(1), tolerance)


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=["float64", "float32"])
@pytest.mark.parametrize("case", EXCITATION)
def test_excitation_backprop(case, dtype, precision):
    attributor, images, target, entry, arrays = make(case, *EXCITATION[case], dtype)
    expected = torch.as_tensor(arrays["out/saliency"])
    if not entry["args"].get("resize"):
        raw = attributor.relevance(images, target).sum(1, keepdim=True)
        assert_matches(raw.clamp(min=0) if "contrastive" in case else raw, expected, entry["tolerance"][precision])
    resized = nn.functional.interpolate(expected, images.shape[-2:], mode="bilinear", align_corners=False)
    assert_matches(attributor(images, target), resized[:, 0], entry["tolerance"][precision])


def test_the_place_of_the_contrast_does_not_change_the_map():
    case = "tr_contrastive_excitation_backprop_11"
    method, options = EXCITATION[case]
    first, images, target, *_ = make(case, method, options, torch.float64)
    second, *_ = make(case, method, {"layer": options["layer"]}, torch.float64)
    torch.testing.assert_close(first(images, target), second(images, target), rtol=1e-10, atol=1e-14)
