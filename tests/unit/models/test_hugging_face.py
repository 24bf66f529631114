"""Hugging Face classifiers: the convention (``pixel_values`` in, ``.logits`` out) without the package, and real ones where it is there."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import explainer
from explainer.baselines import build
from explainer.errors import ConfigError
from explainer.models.classifiers import build_classifier
from explainer.models.hugging_face import HuggingFaceClassifier
from tests.contracts.networks import TinyViT, randomize

NORMAL = {"mean": (0.4, 0.5, 0.45), "std": (0.25, 0.2, 0.3)}


@dataclass
class Output:
    """What such a model returns."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class Model(nn.Module):
    """Called by keyword only, as those of transformers mostly are."""

    def __init__(self, inner: nn.Module, mapping: bool) -> None:
        super().__init__()
        self.inner, self.mapping = inner, mapping

    def forward(self, *, pixel_values: Tensor, labels: Tensor | None = None) -> Output | dict[str, Tensor]:
        logits = self.inner(pixel_values)
        return {"logits": logits} if self.mapping else Output(logits)


@pytest.mark.parametrize("mapping", [False, True])
@pytest.mark.parametrize("name", ["attention_rollout", "transformer_attribution", "generic_attention", "attn_lrp", "gradient"])
def test_maps_are_those_of_the_network_inside(name: str, mapping: bool) -> None:
    net = randomize(TinyViT(), 0).double()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = explainer.Explanandum(net, 3, **NORMAL)
    wrapped = explainer.Explanandum(HuggingFaceClassifier(Model(net, mapping)), 3, **NORMAL)
    torch.testing.assert_close(wrapped(images), plain(images))
    torch.testing.assert_close(build(name, wrapped)(images, [0, 2]), build(name, plain)(images, [0, 2]))


class Backbone(nn.Module):
    """Features and no classes."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.mean((2, 3))


def test_an_output_without_logits_is_refused() -> None:
    with pytest.raises(ConfigError, match="Backbone returned Tensor without logits"):
        HuggingFaceClassifier(Backbone())(torch.rand(1, 3, 8, 8))


def test_without_the_package_the_builder_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        build_classifier("explainer.models.hugging_face:from_pretrained", 3, path="nowhere")


def test_real_models(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for kind, prefix in (("ViT", 1), ("DeiT", 2), ("Beit", 1), ("Dinov2", 1)):
        config = getattr(transformers, f"{kind}Config")(**sizes, num_labels=3)
        torch.manual_seed(0)
        getattr(transformers, f"{kind}ForImageClassification")(config).save_pretrained(tmp_path / kind)
        net = build_classifier("explainer.models.hugging_face:from_pretrained", 3, path=str(tmp_path / kind))
        explanandum = explainer.Explanandum(net, 3, mean=0.5, std=0.5)
        rollout = build("attention_rollout", explanandum, row="all")
        mass = rollout.tokens(images, 0).sum((1, 2))  # of 16 patches; what prefix tokens hold is missing
        assert ((mass < 1) == (prefix > 0)).all()
        for name in ("generic_attention", "attn_lrp", "cp_lrp"):
            assert build(name, explanandum)(images, 1).abs().max() > 0, (kind, name)
    with pytest.raises(ConfigError, match="has 3 classes"):
        build_classifier("explainer.models.hugging_face:from_pretrained", 4, path=str(tmp_path / "ViT"))
