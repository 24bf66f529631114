"""Each method has a fragment in configs/baselines that builds it with the options it has anyway."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

from explainer import plugins
from explainer.baselines import build
from tests.contracts.networks import tiny

FOLDER = Path(__file__).parents[2] / "configs" / "baselines"
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


def test_every_method_has_a_fragment_and_no_fragment_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(METHODS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_fragment_builds_and_repeats_the_defaults(path: Path) -> None:
    text = path.read_text()
    fragment = yaml.safe_load(text)
    assert set(fragment) == {"name", "options"}
    assert fragment["name"] == path.stem
    assert text.startswith("# Paper: ")
    assert "\n# Cost per image: " in text
    assert build(fragment["name"], tiny("vgg"), **fragment["options"]).name == path.stem
    defaults = {p.name: p.default for p in inspect.signature(METHODS[path.stem]).parameters.values()}
    for option, value in fragment["options"].items():
        default = list(defaults[option]) if isinstance(defaults[option], tuple) else defaults[option]
        assert value == default, f"{path.name}: {option} is {value}, the method's default is {default}"
