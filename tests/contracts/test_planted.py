"""Planted evidence in one trained network of each kind: what the matrix says works also points at the evidence, or is named here."""

from __future__ import annotations

import pytest
import torch

from explainer import baselines, plugins
from explainer.commands.matrix import NOT_FOUND
from explainer.errors import ExplainerError
from tests.contracts.planted import MARGIN, NETWORKS, OPTIONS, SANITY, found, held_out, rivals, scenes, trained
from tests.unit.commands.test_matrix import printed

METHODS = plugins.discover("explainer.baselines")
_CONTRAST = "LayerNorm divides by a place's contrast: scores change most where the image is flat, not where the evidence is"
_CANCEL = "features have both signs: what a whole channel is worth at the evidence cancels with what it is worth elsewhere"
#: Honestly no better than the centre or a random map, and why; docs/results/planted.md has the numbers.
WEAK = {
    ("gradient", "ConvNeXt (torchvision)"): _CONTRAST,
    ("gradient", "Swin (torchvision)"): _CONTRAST,
    ("meta_saliency", "ConvNeXt (torchvision)"): _CONTRAST,
    ("meta_saliency", "Swin (torchvision)"): _CONTRAST,
    ("smooth_grad", "ConvNeXt (torchvision)"): _CONTRAST,
    ("smooth_grad", "Swin (torchvision)"): _CONTRAST,
    ("competition_cam", "Swin (torchvision)"): "its foreground is a mean over channels, of which LayerNorm leaves nothing",
    ("norm_grad", "Swin (torchvision)"): "the gradient is the same at every place of the last layer, so the map is the features' length",
    ("ablation_cam", "Swin (torchvision)"): _CANCEL,
    ("ablation_cam", "ViT (timm)"): _CANCEL,
    ("attention_grad_cam", "ViT (timm)"): "one weight a head, the mean over all patches: most are background, and its sign is theirs",
    ("full_grad", "ResNet (torchvision)"): "its map of scenes without evidence is as large in the middle: divided by that, nothing is left",
}
#: The default suite's sample.
SAMPLE = {
    "ResNet (torchvision)": (
        "agf",
        "clrp",
        "excitation_backprop",
        "full_grad",
        "grad_cam",
        "guided_backprop",
        "integrated_gradients",
        "srd",
    ),
    "ViT (timm)": (*(n for n, c in METHODS.items() if c.needs_attention), "ablation_cam", "grad_cam", "guided_filter"),
    "ConvNeXt (torchvision)": ("gradient", "grad_cam", "layer_cam", "occlusion"),
}
CASES = [
    pytest.param(family, name, marks=() if name in SAMPLE.get(family, ()) else pytest.mark.slow, id=f"{family.split()[0]}-{name}")
    for family in NETWORKS
    for name in sorted(METHODS)
    if name not in SANITY
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_points_at_the_planted_evidence(family: str, name: str) -> None:
    if printed()[family][name].status == "refused":
        with pytest.raises(ExplainerError):
            baselines.build(name, trained(family), **OPTIONS.get(name, {}))(held_out(2)[0], 0)
        return
    own, others = found(name, family), rivals(name, family)
    if (name, family) in WEAK:
        assert not own.beats(others, 0.4), f"{own} is much better than {others}: take it off the list"
    else:
        assert own.beats(others, MARGIN), f"{own}, rivals {others}"


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in SAMPLE else pytest.mark.slow, id=f.split()[0]) for f in NETWORKS])
def test_the_networks_have_learned(family: str) -> None:
    images, labels, _ = scenes(128, torch.Generator().manual_seed(5))
    assert ((trained(family)(images) > 0) == (labels > 0)).double().mean() > 0.97


def test_the_list_names_what_there_is() -> None:
    assert all(name in METHODS and family in NETWORKS for name, family in WEAK)
    assert {(name, family) for family, names in NOT_FOUND.items() for name in names} == set(WEAK)
