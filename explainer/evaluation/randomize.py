"""Classifiers with random parameters, in copies: the whole network at once, or layer by layer from the head down.

Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018. A map that stays the same when the parameters are replaced by noise does
not depend on what the classifier has learned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explainer.errors import CheckpointError, ConfigError
from explainer.files import replacing
from explainer.models.checkpoints import hyper_parameters, load_explanandum, read_weights


def scores_only(explanandum: Any) -> str | None:
    """Why a classifier cannot be randomised, or None."""
    return None if getattr(explanandum, "differentiable", True) else "the classifier gives scores only: nothing to randomise"


def layer_order(explanandum: nn.Module, images: Tensor) -> list[str]:
    """Paths of the modules that own parameters, in the order in which a forward pass first calls them.

    Modules that no call reaches (their parent uses their parameters, as in ``nn.MultiheadAttention``) stand before all others, so that a
    cascade from the head down reaches them last.
    """
    owners = {name: m for name, m in explanandum.named_modules() if next(m.parameters(recurse=False), None) is not None}
    called: dict[str, None] = {}
    handles = [m.register_forward_pre_hook(lambda _m, _i, name=name: called.setdefault(name)) for name, m in owners.items()]
    try:
        with torch.no_grad():
            explanandum(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in owners if name not in called] + list(called)


@torch.no_grad()
def randomize_layers(explanandum: nn.Module, paths: Sequence[str], generator: torch.Generator) -> None:
    """Replace the parameters of the modules by noise, **in place**: call it on a copy.

    Weights (two or more axes) are drawn from a normal distribution with mean 0 and the standard deviation of the trained weights; biases
    and norm layers with the mean and standard deviation of their trained values. So magnitudes stay those of the trained network and only
    what was learned is lost. A weight without spread is drawn with He's standard deviation.
    """
    for path in paths:
        for parameter in explanandum.get_submodule(path).parameters(recurse=False):
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            spread = float(parameter.double().std(unbiased=False))
            if parameter.ndim >= 2:
                center, scale = 0.0, spread or (2 * parameter.shape[0] / parameter.numel()) ** 0.5
            else:
                center, scale = float(parameter.double().mean()), spread
            parameter.copy_((center + scale * noise).to(parameter))


def randomized(explanandum: Any, seed: int = 0, images: Tensor | None = None) -> Any:
    """A copy of the classifier in which every parameter is noise; the original is untouched.

    Args:
        explanandum: :class:`explainer.Explanandum` or any module that maps images to logits.
        seed: random seed of the noise.
        images: ``[B,3,H,W]``; if given, the running statistics of batch norms are measured again on them, as trained statistics do not fit
            random weights.
    """
    twin = copy.deepcopy(explanandum)
    owners = [name for name, m in twin.named_modules() if next(m.parameters(recurse=False), None) is not None]
    if not owners:
        raise ConfigError(f"{type(explanandum).__name__} has no parameters that could be randomised.")
    randomize_layers(twin, owners, torch.Generator().manual_seed(seed))
    if images is not None:
        measure_norms(twin, images)
    return twin


@torch.no_grad()
def measure_norms(explanandum: nn.Module, images: Tensor) -> None:
    """Set the running statistics of every batch norm to those of one forward pass over ``images``."""
    norms = [m for m in explanandum.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None
    try:
        if norms:
            # Not through the Explanandum, whose calls are in eval mode.
            explanandum.classifier(explanandum.normalize(images))  # type: ignore[operator]
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()


def cloud_images(like: Tensor, number: int = 8, seed: int = 0) -> Tensor:
    """Smooth coloured noise ``[number,3,H,W]`` in [0,1]: something that norms can be measured on without depending on the batch at hand."""
    coarse = torch.rand(number, like.shape[1], 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.interpolate(coarse, like.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1).to(like)


def randomize_checkpoint(checkpoint: str | Path, out: str | Path, seed: int = 0, size: int | None = None) -> Path:
    """Write a copy of a classifier's checkpoint in which every parameter is noise: ``classifier.checkpoint`` of a training configuration
    takes it, to train an Explainer that has nothing to explain (see :mod:`explainer.evaluation.protocols.implausible`).

    Args:
        checkpoint: file of a classifier that this project has trained.
        out: the copy.
        seed: random seed of the noise.
        size: side of the images on which batch norms are measured again; None: the classifier's input size, or 64.

    Raises:
        CheckpointError: it is missing, damaged or no classifier of this project.
    """
    content = read_weights(checkpoint)
    saved = hyper_parameters(content, "classifier", checkpoint)
    if saved is None:
        raise CheckpointError(
            f"{checkpoint} was not written by train.py and does not say which network it holds. Randomise it in Python: "
            "explainer.evaluation.randomize.randomized(explanandum), then save the copy's classifier.state_dict()."
        )
    explanandum = load_explanandum(checkpoint)
    side = size or explanandum.input_size or 64
    twin = randomized(explanandum, seed, cloud_images(torch.zeros(1, 3, side, side)))
    state = {f"classifier.{name}": value.detach().clone() for name, value in twin.classifier.state_dict().items()}
    path = Path(out)
    with replacing(path) as stream:
        torch.save({"state_dict": state, "hyper_parameters": {**saved, "randomised": seed}}, stream)
    return path


def levels(order: Sequence[str], count: int) -> list[list[str]]:
    """Layers to randomise at each step of a cascade from the head down: the head alone first, everything at the end.

    Args:
        order: layers from input to head.
        count: number of steps, at most one per layer.
    """
    if count < 2:
        raise ConfigError(f"a cascade needs at least 2 steps, received {count}.")
    downwards = list(reversed(order))
    n = len(downwards)
    # Of the n layers the head takes the first step; the others are shared as evenly as possible between the remaining steps.
    ends = [1] + [1 + round((n - 1) * i / (count - 1)) for i in range(1, count)]
    starts = [0, *ends[:-1]]
    return [downwards[a:b] for a, b in zip(starts, ends, strict=True)]


def cascade(
    attributor: Any,
    images: Tensor,
    class_index: Tensor,
    *,
    steps: int = 5,
    seed: int = 0,
    method_seed: int = 0,
    masks: Tensor | None = None,
) -> Tensor:
    """Maps of a per-image method while its classifier is randomised from the head down.

    The method is copied together with its classifier; both are left as they were.

    Args:
        attributor: an :class:`~explainer.attribution.Attributor` that holds its classifier as ``explanandum``.
        images: ``[B,3,H,W]``.
        class_index: ``[B]``.
        steps: number of steps of the cascade.
        seed: random seed of the noise.
        method_seed: random seed of a random method; the same at every step, so that only the classifier differs.
        masks: ground truth, for methods that read it.

    Returns:
        ``[steps,B,H,W]``.
    """
    if not isinstance(getattr(attributor, "explanandum", None), nn.Module):
        raise ConfigError(
            f"{getattr(attributor, 'name', attributor)} does not hold its classifier as `explanandum`: it cannot be randomised."
        )
    twin = copy.deepcopy(attributor)
    network: nn.Module = twin.explanandum
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for paths in levels(layer_order(network, images), steps):
        randomize_layers(network, paths, generator)
        measure_norms(network, cloud_images(images))
        maps.append(twin(images, class_index, generator=torch.Generator().manual_seed(method_seed), masks=masks))
    return torch.stack(maps)
