"""Adversarial manipulation of explanations: can an invisible change of the image turn its map into another image's map?

Dombrowski et al., "Explanations can be manipulated and geometry is to blame", NeurIPS 2019; protocol of SRD (Han et al., ICLR 2024),
section 4.3: minimise ``lam1 d(h(x_adv), h(x_target)) + lam2 d(F(x_adv), F(x_org))`` (eq. 10) and score the maps of the *original* model
before and after. Higher similarity is more robust, but only at equal perturbation, and a method with useless gradients looks robust:
read the MSE reached, the iterations and the loss curve with the score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from explainer.attribution import check_class_index, check_images
from explainer.errors import ConfigError, NumericalError, ShapeError
from explainer.metrics.correlation import pearson

MapFunction = Callable[[Tensor, Tensor], Tensor]
"""Images ``[B,3,H,W]`` in [0,1] and class ``[B]`` -> raw maps ``[B,h,w]`` or ``[B,C,h,w]``, differentiable to the images for an attack.
SRD: ``build("srd", explanandum, start="constant").differentiable_map``; gradients: :func:`gradient_map`."""


@dataclass(frozen=True)
class AttackSettings:
    """The protocol's numbers.

    Attributes:
        map_weight, output_weight: lam1 and lam2.
        learning_rate: step size of Adam, in normalised units.
        max_iterations: at most that many steps.
        stop_mse: stop an image at the first step with MSE(x_adv, x_org) >= this, in normalised units (in [0,1] units 8/255 caps the MSE
            below the paper's 0.001, so the stop could never fire).
        epsilon: largest change of a pixel, in units of [0,1] images.
        output: distance of ``logits`` (paper) or ``softmax`` outputs (public code).
        distance: ``mean`` of squares (public code, from which the weights are taken) or their ``sum``, the squared norms of eq. 10
            (paper). Maps have H*W values and outputs K, so the two balance the terms differently, by H*W/K.
        softplus: (first, last) beta of the surrogate that replaces ReLU during the attack, growing geometrically over the iterations:
            gradient maps of ReLU networks have no useful derivative otherwise. None: the network as it is (SRD needs none).
    """

    map_weight: float = 1e11
    output_weight: float = 1e6
    learning_rate: float = 1e-3
    max_iterations: int = 1500
    stop_mse: float = 1e-3
    epsilon: float = 8 / 255
    output: Literal["logits", "softmax"] = "logits"
    distance: Literal["mean", "sum"] = "mean"
    softplus: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for key, allowed in (("output", ("logits", "softmax")), ("distance", ("mean", "sum"))):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"{key} must be one of {', '.join(allowed)}, received {getattr(self, key)!r}.")
        if self.max_iterations < 1 or self.epsilon <= 0 or self.learning_rate <= 0:
            raise ConfigError(
                "max_iterations, epsilon and learning_rate must be positive, received "
                f"{self.max_iterations}, {self.epsilon}, {self.learning_rate}."
            )
        if self.softplus is not None and (len(self.softplus) != 2 or min(self.softplus) <= 0):
            raise ConfigError(f"softplus must be two positive betas (first, last) or None, received {self.softplus}.")


@dataclass(frozen=True)
class Attack:
    """What the optimisation did.

    Attributes:
        images: ``[B,3,H,W]`` in [0,1].
        iterations: ``[B]`` steps taken by each image.
        mse: ``[B]`` MSE(x_adv, x_org) in normalised units.
        map_loss, output_loss: ``[T,B]`` unweighted distances before each step (NaN once an image has stopped).
        target_map: ``[B,h,w]`` h(x_target).
        class_index: ``[B]`` explained class, the prediction for the original image.
    """

    images: Tensor
    iterations: Tensor
    mse: Tensor
    map_loss: Tensor
    output_loss: Tensor
    target_map: Tensor
    class_index: Tensor


class softplus_surrogate(TorchFunctionMode):  # noqa: N801 - a context manager, used like a function
    """Inside, every ReLU (module, functional, in-place) is ``softplus_beta(x) = log(1 + exp(beta x)) / beta``; the model is not changed."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace ReLU, run everything else."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in ("relu", "relu_"):
            return func(*args, **kwargs)
        value = args[0] if args else kwargs["input"]
        in_place = name == "relu_" or kwargs.get("inplace", args[1] if len(args) > 1 else False)
        # threshold: above it torch continues linearly, with a second derivative of 0
        return value.copy_(F.softplus(value.clone(), self.beta)) if in_place else F.softplus(value, self.beta)


def gradient_map(
    explanandum: Any, kind: Literal["gradient", "input_x_gradient", "integrated_gradients"] = "gradient", steps: int = 20
) -> MapFunction:
    """Gradient-type maps ``[B,3,H,W]`` of the logit in normalised units, differentiable to the images.

    Args:
        kind: ``integrated_gradients`` integrates from the zero (mean-colour) image by the midpoint rule with ``steps`` steps.
    """
    if kind not in ("gradient", "input_x_gradient", "integrated_gradients"):
        raise ConfigError(f"kind must be 'gradient', 'input_x_gradient' or 'integrated_gradients', received {kind!r}.")
    mean, std = _channel_view(explanandum)

    def gradient(images: Tensor, class_index: Tensor) -> Tensor:
        scores = explanandum(images).gather(1, class_index[:, None]).sum()
        return torch.autograd.grad(scores, images, create_graph=True)[0] * std

    def maps(images: Tensor, class_index: Tensor) -> Tensor:
        with torch.enable_grad():
            images = images if images.requires_grad else images.detach().requires_grad_()
            if kind == "gradient":
                return gradient(images, class_index)
            if kind == "input_x_gradient":
                products: Tensor = explanandum.normalize(images) * gradient(images, class_index)
                return products
            positions = [(i + 0.5) / steps for i in range(steps)]
            total = sum(gradient(mean + a * (images - mean), class_index) for a in positions)
            integrated: Tensor = explanandum.normalize(images) * total / steps
            return integrated

    return maps


def normalized_magnitude(maps: Tensor) -> Tensor:
    """H of the attack: ``|.|`` summed over channels, divided by its sum over pixels; ``[B,h,w]``. A zero map stays zero."""
    magnitude = maps.abs().sum(1) if maps.ndim == 4 else maps.abs()
    total = magnitude.sum((1, 2), keepdim=True)
    return magnitude / torch.where(total > 0, total, torch.ones_like(total))


def manipulate(explanandum: Any, explain: MapFunction, images: Tensor, targets: Tensor, settings: AttackSettings | None = None) -> Attack:
    """Change ``images`` until their maps resemble those of ``targets`` while the logits stay.

    Images are attacked independently (each stops by itself), in normalised space, by Adam; after each step the image is clamped to valid
    colours and to within epsilon of the original.

    Args:
        explanandum: images in [0,1] -> logits ``[B,K]``; not changed.
        explain: the map that is attacked; see :data:`MapFunction`. The class is the prediction for the original image throughout; the
            target map explains the target image's own prediction.
        images, targets: ``[B,3,H,W]`` in [0,1].

    Raises:
        NumericalError: the attack's gradient is not finite.
    """
    settings = settings or AttackSettings()
    check_images(images)
    if images.shape != targets.shape:
        raise ShapeError(f"images and targets must have one shape, received {tuple(images.shape)} and {tuple(targets.shape)}.")
    std = _channel_view(explanandum)[1]
    images, targets = images.detach(), targets.detach()
    with torch.no_grad():
        logits, index = explanandum(images), explanandum(targets).argmax(1)
    target_map = normalized_magnitude(explain(targets, index)).detach()
    reference, index = _output(logits, settings), logits.argmax(1)
    # What is optimised is the change in normalised units, so that the first step starts exactly at the image: Adam would amplify the
    # rounding of a conversion there and back.
    lowest = torch.maximum(-images / std, -settings.epsilon / std)
    highest = torch.minimum((1 - images) / std, settings.epsilon / std)

    batch = len(images)
    moments = torch.zeros_like(images), torch.zeros_like(images)
    delta, mse = torch.zeros_like(images), images.new_zeros(batch)
    iterations = torch.zeros(batch, dtype=torch.long, device=images.device)
    active = torch.ones(batch, dtype=torch.bool, device=images.device)
    curves: list[Tensor] = []
    for step in range(1, settings.max_iterations + 1):
        delta.requires_grad_()
        map_loss, output_loss = _losses(explanandum, explain, images + delta * std, index, target_map, reference, settings, step)
        loss = settings.map_weight * map_loss + settings.output_weight * output_loss
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        if not bool(gradient[active].isfinite().all()):
            raise NumericalError(f"the explanation's gradient became NaN or infinite at step {step}: use float64, or softplus=(10, 100).")
        gone = torch.full_like(map_loss, torch.nan)
        curves.append(torch.stack([torch.where(active, c.detach(), gone) for c in (map_loss, output_loss)]))
        moved = _adam(delta.detach(), gradient, moments, step, settings.learning_rate)
        moved = torch.minimum(torch.maximum(moved, lowest), highest)
        delta = torch.where(active[:, None, None, None], moved, delta.detach())
        iterations += active
        mse = delta.square().mean((1, 2, 3))
        active = active & (mse < settings.stop_mse)
        if not bool(active.any()):
            break
    map_curve, output_curve = torch.stack(curves).unbind(1)
    adversarial = (images + delta * std).clamp(0, 1)
    return Attack(adversarial, iterations, mse, map_curve, output_curve, target_map, index)


def _losses(
    explanandum: Any,
    explain: MapFunction,
    images: Tensor,
    index: Tensor,
    target_map: Tensor,
    reference: Tensor,
    settings: AttackSettings,
    step: int,
) -> tuple[Tensor, Tensor]:
    def measure() -> tuple[Tensor, Tensor]:
        maps = normalized_magnitude(explain(images, index))
        return _distance(maps, target_map, settings), _distance(_output(explanandum(images), settings), reference, settings)

    if settings.softplus is None:
        return measure()
    first, last = settings.softplus
    with softplus_surrogate(first * (last / first) ** ((step - 1) / max(settings.max_iterations - 1, 1))):
        return measure()


def _output(logits: Tensor, settings: AttackSettings) -> Tensor:
    return logits if settings.output == "logits" else logits.softmax(1)


def _distance(a: Tensor, b: Tensor, settings: AttackSettings) -> Tensor:
    squares = (a - b).square().flatten(1)
    return squares.mean(1) if settings.distance == "mean" else squares.sum(1)


def _adam(delta: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], step: int, rate: float) -> Tensor:
    """One step of Adam (0.9, 0.999, 1e-8); written out so that each image of a batch can stop by itself."""
    moments[0].mul_(0.9).add_(gradient, alpha=0.1)
    moments[1].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    first, second = moments[0] / (1 - 0.9**step), moments[1] / (1 - 0.999**step)
    return delta - rate * first / (second.sqrt() + 1e-8)


def _channel_view(explanandum: Any) -> tuple[Tensor, Tensor]:
    return explanandum.mean.view(1, -1, 1, 1), explanandum.std.view(1, -1, 1, 1)


def uniform_ssim(first: Tensor, second: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity ``[B]`` of maps ``[B,H,W]`` with scikit-image's defaults: 7x7 uniform window, sample covariance, border of 3
    pixels left out. Maps smaller than 7 pixels raise :class:`ShapeError`.
    """
    if first.shape != second.shape or first.ndim != 3 or min(first.shape[-2:]) < 7:
        raise ShapeError(f"SSIM needs two maps [B,H,W] of at least 7x7 pixels, received {tuple(first.shape)} and {tuple(second.shape)}.")
    x, y = first.double().unsqueeze(1), second.double().unsqueeze(1)

    def window(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, 7, stride=1)

    sample = 49 / 48
    mx, my = window(x), window(y)
    vx, vy, cov = (sample * (window(a * b) - window(a) * window(b)) for a, b in ((x, x), (y, y), (x, y)))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    value = ((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3))


def _displayed(maps: Tensor, size: torch.Size) -> Tensor:
    """``|.|`` (summed over channels) divided by its maximum, at the image's size: what is compared."""
    magnitude = (maps.abs().sum(1) if maps.ndim == 4 else maps.abs()).detach()
    top = magnitude.amax((1, 2), keepdim=True)
    magnitude = magnitude / torch.where(top > 0, top, torch.ones_like(top))
    if magnitude.shape[-2:] == size:
        return magnitude
    return F.interpolate(magnitude.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)


def score(explanandum: Any, explain: MapFunction, images: Tensor, attack: Attack) -> list[dict[str, float]]:
    """One row per image, everything measured on the original model (ReLU) and the class of the attack.

    Columns: ``ssim`` and ``pearson`` of the maps before and after (higher: more robust; Pearson is NaN for a constant map),
    ``target_ssim`` and ``target_pearson`` of the map after and the target's (lower: more robust), ``mse`` and ``iterations`` of the attack,
    ``output_change`` (mean |difference of logits|), ``prediction_unchanged`` (0 or 1), ``map_loss_first`` and ``map_loss_last``.
    """
    size = images.shape[-2:]
    index = check_class_index(attack.class_index, images, explanandum.num_classes)
    before, after = (_displayed(explain(x, index), size) for x in (images, attack.images))
    target = _displayed(attack.target_map, size)
    with torch.no_grad():
        logits, changed = explanandum(images), explanandum(attack.images)
    taken = (attack.iterations - 1).unsqueeze(0)
    columns = {
        "ssim": uniform_ssim(before, after),
        "pearson": pearson(before.flatten(1), after.flatten(1)),
        "target_ssim": uniform_ssim(target, after),
        "target_pearson": pearson(target.flatten(1), after.flatten(1)),
        "mse": attack.mse,
        "iterations": attack.iterations,
        "output_change": (changed - logits).abs().mean(1),
        "prediction_unchanged": (changed.argmax(1) == logits.argmax(1)).double(),
        "map_loss_first": attack.map_loss[0],
        "map_loss_last": attack.map_loss.gather(0, taken)[0],
    }
    return [{key: float(value[i]) for key, value in columns.items()} for i in range(len(images))]
