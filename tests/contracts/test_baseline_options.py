"""The public names exist, and `explainer methods --options NAME` prints what a configuration can take over."""

from __future__ import annotations

import inspect

import pytest
import torch
import yaml

from explainer import plugins
from explainer.baselines import build
from explainer.baselines.overview import options_as_yaml
from explainer.inference.refinement import quality
from tests.contracts.networks import tiny

METHODS = plugins.discover("explainer.baselines")
PUBLIC = [
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "guided_backprop",
    "deconvnet",
    "linear_approx",
    "full_grad",
    "grad_cam",
    "grad_cam_pp",
    "score_cam",
    "ablation_cam",
    "x_grad_cam",
    "layer_cam",
    "lrp",
    "lrp_alpha_beta",
    "lrp_zplus",
    "clrp",
    "sglrp",
    "rap",
    "excitation_backprop",
    "contrastive_excitation_backprop",
    "rise",
    "occlusion",
    "meaningful_perturbation",
    "extremal_perturbation",
    "igos_pp",
    "agf",
    "srd",
    "norm_grad",
    "attention_rollout",
    "transformer_attribution",
    "generic_attention",
    "attn_lrp",
    "cp_lrp",
    "constant",
    "centre",
    "random",
    "edges",
    "ground_truth",
]


def test_every_public_name_exists() -> None:
    assert set(PUBLIC) <= set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_printed_options_build_the_method_as_it_is_by_default(name: str) -> None:
    text = options_as_yaml(name)
    entry = yaml.safe_load(text)
    assert set(entry) == {"name", "options"} and entry["name"] == name
    assert text.startswith("# ") and "\n# Cost per image: " in text
    assert build(name, tiny("vit" if METHODS[name].needs_attention else "vgg"), **entry["options"]).name == name
    defaults = {p.name: p.default for p in inspect.signature(METHODS[name]).parameters.values() if p.default is not p.empty}
    for option, default in defaults.items():
        if default is None:
            assert option not in entry["options"] and option in text
        else:
            assert entry["options"][option] == (list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rise", {"fill": "noise", "n_masks": 8, "grid": 3}),
        ("occlusion", {"fill": "noise", "window": 4, "stride": 4}),
        ("score_cam", {"fill": "noise"}),
        ("integrated_gradients", {"baseline": "noise", "steps": 3}),
        ("igos", {"fill": "noise", "size": 4, "iterations": 2, "points": 2}),
        ("igos_pp", {"fill": "noise", "size": 4, "iterations": 2, "points": 2}),
    ],
)
def test_noise_as_a_fill_does_not_depend_on_the_batch(name, options):
    """An image's map is the same alone and beside others: the noise that hides its pixels is one draw for all images."""
    method = build(name, tiny("vgg"), **options)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = method(images, [0, 1, 2])
    for i in range(3):
        torch.testing.assert_close(together[i], method(images[i : i + 1], i)[0])


def test_a_masks_quality_under_noise_does_not_depend_on_the_batch():
    e = tiny("vgg")
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masks = torch.rand(2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([0, 1])
    with torch.no_grad():
        both, second = quality(e, images, masks, index, fill="noise"), quality(e, images[1:], masks[1:], index[1:], fill="noise")
    torch.testing.assert_close(both.score[1], second.score[0])
