"""AGF for self-supervised encoders as an attributor: Table 4 of Gur et al., AAAI 2021.

The method itself is in :mod:`explainer.baselines.agf_self_supervised`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from explainer.attribution import Attributor
from explainer.baselines.agf_self_supervised import explain_self_supervised
from explainer.errors import ConfigError


def split_classifier(classifier: nn.Module, head: Sequence[str] | None = None) -> tuple[nn.Sequential, nn.Sequential]:
    """``(encoder, head)``: the classifier's top-level modules in order, cut before the head.

    Args:
        classifier: a chain of top-level modules (VGG, ResNet), a flatten between encoder and head.
        head: names of the modules that form the head; None: the last one.
    """
    names = [name for name, _ in classifier.named_children()]
    chosen = names[-1:] if head is None else list(head)
    if len(names) < 2 or not chosen or names[-len(chosen) :] != chosen or len(chosen) == len(names):
        raise ConfigError(
            f"agf_self_supervised: head must name the last top-level modules, received {chosen}; they are {', '.join(names)}."
        )
    modules = [classifier.get_submodule(name) for name in names]
    cut = len(names) - len(chosen)
    return nn.Sequential(*modules[:cut]).eval(), nn.Sequential(*modules[cut:]).eval()


class AGFNeighbor(Attributor):
    """What sets an image apart from its nearest neighbour among given images, as seen by the encoder.

    It is no plug-in, because it needs images to choose neighbours from; the evaluation builds it as ``agf_self_supervised``.

    Args:
        explanandum: an encoder with a linear probe (or a supervised classifier).
        candidates: ``[N,3,H,W]`` in [0,1].
        latent: ``difference`` (the method), ``sum`` or ``none`` (the rows of Table 4).
        head: the layers after the features; see :func:`split_classifier`.
        options: keyword options of AGF (mode, gain, ...).
    """

    signed = True

    def __init__(
        self,
        explanandum: Any,
        candidates: Tensor,
        latent: Literal["difference", "sum", "none"] = "difference",
        head: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        self.explanandum, self.latent, self.options = explanandum, latent, options
        self.num_classes: int = explanandum.num_classes
        self.encoder, self.head = split_classifier(explanandum.classifier, head)
        self.inputs = explanandum.normalize(candidates)
        with torch.no_grad():
            self.latents = torch.cat([self.encoder(part).flatten(1) for part in self.inputs.split(32)])

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in configurations."""
        return "agf_self_supervised"

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        found = explain_self_supervised(
            self.encoder,
            self.head,
            self.explanandum.normalize(images),
            self.latents.to(images),
            latent=self.latent,
            class_index=class_index,
            **self.options,
        )
        return found.maps
