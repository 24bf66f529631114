"""AGF for self-supervised encoders (Gur et al. 2021, section 4.4 and Algorithm 2): what sets an image apart from its nearest neighbour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from explainer.attribution import check_class_index, check_images
from explainer.baselines.agf import make_options, to_map
from explainer.baselines.kernels.agf_sweep import Sweep
from explainer.baselines.kernels.graph import Graph
from explainer.baselines.kernels.graph_calls import Run
from explainer.baselines.kernels.hooks import untouched
from explainer.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class SelfSupervisedExplanation:
    """Signed maps ``[B,H,W]``; explained classes, their logits and the neighbours' indices, each per image."""

    maps: Tensor
    class_index: Tensor
    logits: Tensor
    neighbor: Tensor


def explain_self_supervised(
    encoder: nn.Module,
    head: nn.Module,
    images: Tensor,
    candidates: Tensor,
    *,
    latent: Literal["difference", "sum", "none"] = "difference",
    exclude: Tensor | None = None,
    class_index: Tensor | None = None,
    mode: Literal["code", "paper"] = "code",
    **options: Any,
) -> SelfSupervisedExplanation:
    """Explain the encoder's latent code relative to that of the nearest other image.

    With ``L_I`` the flattened latent of an image and ``N`` the candidate with the nearest latent (Euclidean), the head is evaluated at
    ``S = L_I - L_N``, its strongest class ``t`` is explained there, and the attribution continues through the encoder as run on the
    image; ``dS/dL_I = 1`` because ``L_N`` is constant. (Algorithm 2 subtracts latents; section 4.4 says logits, which for a linear head
    differ by its bias.)

    Args:
        encoder: network inputs -> latent ``[B,D]`` or ``[B,C,H,W]``.
        head: flattened latent ``[B,D]`` -> logits ``[B,K]`` of the self-supervised task, or of a linear probe.
        images: network inputs ``[B,C,H,W]``, normalised as the encoder wants them.
        candidates: the set S: network inputs ``[N,C,H,W]``, or their latents ``[N,D]``.
        latent: ``"difference"`` ``L_I - L_N``; ``"sum"`` ``L_I + L_N`` and ``"none"`` ``L_I`` are the rows of Table 4.
        exclude: index in ``candidates`` of each image itself, ``[B]`` (-1: it is not among them). Candidates whose latent equals the
            image's (to 1e-6 of its norm) are never taken: ``S`` would be 0.
        class_index: class per image; None takes the head's strongest class at ``S``.
        mode, options: as for :class:`~explainer.baselines.agf.AGF`.

    Raises:
        ConfigError: an option is wrong, or no candidate differs from an image.
        ShapeError: the latents of images and candidates differ in length.
        UnsupportedLayerError: the encoder or head has a layer without a rule.
    """
    if latent not in ("difference", "sum", "none"):
        raise ConfigError(f"latent must be 'difference', 'sum' or 'none', received {latent!r}.")
    check_images(images)
    chosen = make_options(mode, **options)
    with untouched(encoder), untouched(head), torch.inference_mode(False), torch.autocast(images.device.type, enabled=False):
        encoder.eval(), head.eval()
        images = images.detach().clone()
        run = Graph(encoder, "agf").run(images)
        code = run.output.detach()
        own = code.flatten(1)
        others = _latents(encoder, candidates, own)
        neighbor = _nearest(own, others, exclude)
        point = {"difference": own - others[neighbor], "sum": own + others[neighbor], "none": own}[latent]
        top = Graph(head, "agf").run(point)
        logits = top.output.detach()
        index = logits.argmax(dim=1) if class_index is None else check_class_index(class_index, images, logits.shape[1])
        phi, gradient = Sweep(top, chosen, map_shape=_latent_shape(run)).from_class(index)
        phi = Sweep(run, chosen).from_output(phi.view(code.shape), gradient.view(code.shape))
    return SelfSupervisedExplanation(to_map(phi).to(images.dtype), index, logits, neighbor)


def _latents(encoder: nn.Module, candidates: Tensor, own: Tensor) -> Tensor:
    with torch.no_grad():
        others = candidates.detach() if candidates.ndim == 2 else torch.cat([encoder(c).flatten(1) for c in candidates.split(32)])
    if others.shape[1] != own.shape[1]:
        raise ShapeError(f"candidates have latents of length {others.shape[1]}, the images {own.shape[1]}; use the same encoder for both.")
    return others


def _nearest(own: Tensor, others: Tensor, exclude: Tensor | None) -> Tensor:
    distance = torch.stack([(others - one).norm(dim=1) for one in own])
    distance = distance.masked_fill(distance <= 1e-6 * own.norm(dim=1, keepdim=True), torch.inf)
    if exclude is not None:
        given = exclude.to(own.device)
        rows = (given >= 0).nonzero()[:, 0]
        distance[rows, given[rows]] = torch.inf
    if not bool(distance.isfinite().any(dim=1).all()):
        raise ConfigError("candidates hold no image that differs from one of the images; add others, or check exclude.")
    return distance.argmin(dim=1)


def _latent_shape(run: Run) -> tuple[int, ...] | None:
    """``(C,H,W)`` if the encoder returns a map or a flattened map."""
    if run.output.ndim == 4:
        return tuple(run.output.shape[1:])
    last = run.behind(run.last)
    return tuple(last.inputs[0].shape[1:]) if last.kind == "reshape" and last.inputs[0].ndim == 4 else None
