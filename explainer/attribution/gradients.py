"""Whether a classifier's gradients can be believed: asked once before a method or a training relies on them.

Some classifiers run without an error and have no gradient, or a wrong one: features under ``no_grad`` or ``inference_mode``, rounded
(quantised) values, a branch that is detached. Methods would return maps that ignore the class, a training would learn from area and
smoothness alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from explainer.errors import NotDifferentiableError

WITHOUT_GRADIENTS = (
    "Use a method without gradients (rise, occlusion, score_cam, ablation_cam) or train with losses.coalition or losses.distillation, "
    "which need scores only; or let gradients through the classifier (no no_grad, inference_mode, detach or rounding in its forward)."
)
_SEED = 2711_7919  # no user's random image is the other one
_STEP, _AGREE, _WRONG = 1e-2, 0.1, 0.5
_DIRECTIONS = 4


def require_gradients(explanandum: Any, images: Tensor, who: str) -> None:
    """Raise unless the class scores' gradients exist, are finite, belong to the class, and predict how the scores change.

    One image and a random one are looked at. Two classes are compared; a gradient of exactly 0 is wrong only where the scores do change.
    The last test compares slopes along random directions with the scores' own differences; it speaks only in float32 and above, and where
    two step sizes agree (no kinks in between) that the gradient misses more than half.

    Args:
        explanandum: the classifier.
        images: ``[B,C,H,W]`` of which the first is used.
        who: the method or loss that needs them.

    Raises:
        NotDifferentiableError: with what is wrong and what to use instead.
    """
    if not getattr(explanandum, "differentiable", True):
        return  # the classifier itself refuses, with its own name
    generator = torch.Generator().manual_seed(_SEED)
    first = images[:1].detach()
    random = torch.rand(first.shape, generator=generator, dtype=torch.float32).to(first)
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.cat([first, random]).clone().requires_grad_()
        logits = explanandum(x)
        scale = float(logits.detach().abs().max())
        rounding = 1e3 * torch.finfo(logits.dtype).eps * scale
        if not float((logits[0] - logits[1]).detach().abs().max()) > rounding:
            return  # the same scores for both images: nothing to judge by
        if not logits.requires_grad:
            raise _refusal(who, "its scores carry no gradient")
        classes = sorted({0, logits.shape[1] - 1, int(logits[0].argmax())})
        slopes = [torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True, allow_unused=True)[0] for k in classes]
    if any(s is None for s in slopes):
        raise _refusal(who, "the image has no way to some class's score in the graph")
    gradients = torch.stack([s for s in slopes if s is not None])  # [n,2,C,H,W]
    scores = logits.detach()[:, classes].T  # [n,2]
    if not bool(gradients.isfinite().all()) and bool(scores.isfinite().all()):
        raise _refusal(who, "its gradients are NaN or infinite")
    changed = (scores[:, 0] - scores[:, 1]).abs() > rounding
    if bool((changed & (gradients.flatten(1) == 0).all(1)).any()):
        raise _refusal(who, "its scores depend on the image and their gradient is 0 everywhere (rounded values?)")
    if len(classes) > 1:
        apart = (scores - scores[:1])[1:]
        if bool(((apart[:, 0] - apart[:, 1]).abs() > rounding).any()) and bool((gradients[1:] == gradients[:1]).all()):
            raise _refusal(who, "the gradient is the same for every class although the scores are not")
    _check_slopes(explanandum, random, gradients[:, 1], classes, generator, who)


def _check_slopes(explanandum: Any, image: Tensor, gradients: Tensor, classes: list[int], generator: torch.Generator, who: str) -> None:
    """Directional derivatives at a random image, predicted by ``gradients`` ``[n,C,H,W]`` and measured by central differences."""
    if image.dtype not in (torch.float32, torch.float64):
        return
    directions = torch.randn((_DIRECTIONS, *image.shape[1:]), generator=generator, dtype=torch.float32).to(image)
    directions = directions / directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * image[0].numel() ** 0.5
    with torch.no_grad():
        steps = torch.cat([image + s * directions for s in (_STEP, -_STEP, _STEP / 2, -_STEP / 2)])
        plus, minus, near_plus, near_minus = explanandum(steps)[:, classes].double().chunk(4)
    far, near = (plus - minus) / (2 * _STEP), (near_plus - near_minus) / _STEP
    predicted = torch.einsum("dchw,nchw->dn", directions.double(), gradients.double())
    scale = near.norm()
    noise = 1e4 * torch.finfo(torch.float32).eps * float(plus.abs().max()) / _STEP
    if scale > noise and (far - near).norm() < _AGREE * scale and (predicted - near).norm() > _WRONG * scale:
        share = float((predicted - near).norm() / scale)
        raise _refusal(who, f"the gradient misses {share:.0%} of how the scores change (a detached branch?)")


def _refusal(who: str, why: str) -> NotDifferentiableError:
    return NotDifferentiableError(f"{who} needs gradients of the classifier, but {why}. {WITHOUT_GRADIENTS}")
