"""Feature inversion: the image that a layer's features, or a part of them, stand for.

R. Fong, M. Patrick, A. Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks", ICCV 2019, section 5.1, eq. 12:

    I* = argmax_I < d, Phi_l(I) >,      d = m (x) Phi_l(x)

The sum runs over channels and positions. The paper names no constants and refers to C. Olah, A. Mordvintsev, L. Schubert, "Feature
visualization", Distill 2017, whose published defaults ``prior="fourier"`` takes. ``prior="pixel"`` is in the manner of A. Mahendran,
A. Vedaldi, "Visualizing deep convolutional neural networks using natural pre-images", IJCV 2016.

The inner product has no bound, so that its value says nothing by itself: the cosine between d and Phi_l(I*) is given beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer.attribution.layouts import Known
from explainer.baselines.kernels.features import forward_features
from explainer.baselines.kernels.hooks import find_layer, untouched
from explainer.errors import ConfigError, ShapeError
from explainer.geometry import Size, height_width

Prior = Literal["fourier", "pixel"]
Objective = Literal["dot", "match"]

_FOURIER_RATE = 0.05
_FOURIER_NOISE = 0.01
_CONTRAST, _MOST_CONTRAST = 1.5, 100.0  # factor of a step, and at most, while the start has no slope
_SCALES = tuple(0.90 + 0.02 * i for i in range(11))
_DEGREES = 10
_JITTERS = (8, 4)  # pixels of an image of 224 px, before and after scale and rotation
_PIXEL_RATE, _PIXEL_MOMENTUM, _PIXEL_NOISE, _PIXEL_WEIGHT = 100.0, 0.9, 1e-3, 1e-5
_PIXEL_DROP = 100  # iterations after which the rate is a tenth
_STEPS: dict[str, int] = {"fourier": 512, "pixel": 200}


@dataclass(frozen=True)
class Inversion:
    """Images that features stand for.

    Attributes:
        images: ``[N,3,H,W]`` in [0,1].
        objective: ``[T,N]``, at every step (under that step's shift, scale and rotation).
        cosine: ``[N]`` in [-1,1], between the direction and the features of the final image.
    """

    images: Tensor
    objective: Tensor
    cosine: Tensor

    @property
    def stuck(self) -> Tensor:
        """``[N]`` bool: whether the objective never changed.

        The start then lies where the features have no slope (a ReLU below 0, a ReLU6 at its bound), with ``fourier`` at every contrast, and
        the image says nothing: it is the grey start.
        """
        return (self.objective == self.objective[0]).all(0)


def color_matrix(images: Tensor) -> Tensor:
    """The square root of the images' pixel covariance, divided by its largest column norm, ``[3,3]``.

    Args:
        images: ``[B,3,H,W]`` in [0,1]. Without any variance the answer is the identity.
    """
    pixels = images.double().transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(pixels))
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    largest = torch.linalg.vector_norm(root, dim=0).max()
    return (root / largest if float(largest) > 1e-6 else torch.eye(3, dtype=torch.float64, device=images.device)).to(images)


def invert(
    explanandum: Any,
    layer: str,
    directions: Tensor,
    size: Size,
    *,
    prior: Prior = "fourier",
    objective: Objective = "dot",
    steps: int | None = None,
    colors: Tensor | None = None,
    seed: int = 0,
) -> Inversion:
    """Search the images whose features agree with the directions the most. The same seed gives the same images.

    All rows start at the same noise and see the same shifts, so that a row does not depend on the others.

    Args:
        explanandum: the classifier.
        layer: module path of a layer that runs once and returns a feature map.
        directions: d of N images, ``[N,C,h,w]``, in the shape of the layer's map at ``size``.
        size: side of the images in pixels, or (height, width).
        prior: ``fourier`` (a spectrum that falls with the frequency, decorrelated colours, and random shifts, scales and rotations before
            each pass; Adam, rate 0.05) or ``pixel`` (bounded and smooth pixels; SGD, rate 100).
        objective: ``dot`` (eq. 12) or ``match`` (minus the squared distance to d over the square of d).
        steps: None: 512 with ``fourier``, 200 with ``pixel``.
        colors: ``[3,3]`` of :func:`color_matrix`; None: the identity. For ``fourier``.
        seed: random seed of the noise and the shifts.

    Raises:
        ConfigError: an unknown option or layer.
        UnsupportedLayerError: the layer returns no feature map, or runs several times.
        ShapeError: the directions are of another shape.
    """
    for option, received, known in (("prior", prior, Prior), ("objective", objective, Objective)):
        if received not in get_args(known):
            raise ConfigError(f"{option} must be one of {', '.join(get_args(known))}, received {received!r}.")
    if (number := _STEPS[prior] if steps is None else steps) < 1:
        raise ConfigError(f"steps must be at least 1, received {steps}.")
    module = find_layer(explanandum.classifier, layer)
    known_layouts: Known = {}

    def features(images: Tensor) -> Tensor:
        _, (found,) = forward_features(explanandum, {layer: module}, images, known_layouts)
        return found.layout.spatial(found.output)

    def gain(images: Tensor) -> Tensor:
        seen = features(images)
        if seen.shape != directions.shape:
            raise ShapeError(f"directions must be {list(seen.shape)} for layer {layer!r} at this size, received {list(directions.shape)}.")
        if objective == "dot":
            return (directions * seen).flatten(1).sum(1)
        return -(seen - directions).square().flatten(1).sum(1) / directions.square().flatten(1).sum(1).clamp(min=1e-12)

    generator = torch.Generator().manual_seed(seed)

    pixels = height_width(size)
    picture: _Fourier | _Pixels
    if prior == "fourier":
        picture = _Fourier(len(directions), pixels, directions, colors, generator)
    else:
        picture = _Pixels(len(directions), pixels, explanandum, generator)
    history = []
    with untouched(explanandum), torch.enable_grad():
        for step in range(number):
            value = gain(picture.shown(generator))
            history.append(value.detach())
            picture.climb(value.sum(), step)
        with torch.no_grad():
            picture.finish()
            images = picture.images()
            cosine = F.cosine_similarity(features(images).flatten(1), directions.flatten(1), dim=1, eps=1e-12)
    return Inversion(images, torch.stack(history), cosine)


class _Fourier:
    """Images as spectra: ``sigmoid(D irfft2(z s))`` with ``s`` falling as one over the frequency, so that no frequency is preferred."""

    def __init__(self, number: int, size: tuple[int, int], like: Tensor, colors: Tensor | None, generator: torch.Generator) -> None:
        height, width = self.size = size
        frequencies = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
        self.scale = (math.sqrt(height * width) / frequencies.clamp(min=1 / max(size))).to(like)
        noise = torch.randn(3, height, width // 2 + 1, 2, generator=generator, dtype=torch.float64) * _FOURIER_NOISE
        self.start = noise.to(like)
        self.spectrum = self.start.expand(number, -1, -1, -1, -1).clone().requires_grad_()
        self.moved, self.contrast = torch.zeros(number, dtype=torch.bool, device=like.device), 1.0
        self.colors = torch.eye(3).to(like) if colors is None else colors.to(like)
        self.optimizer = torch.optim.Adam([self.spectrum], lr=_FOURIER_RATE)

    def images(self) -> Tensor:
        """``[N,3,H,W]`` in (0,1)."""
        pixels = torch.fft.irfft2(torch.view_as_complex(self.spectrum) * self.scale, s=self.size)
        return torch.einsum("cd,ndhw->nchw", self.colors, pixels).sigmoid()

    def shown(self, generator: torch.Generator) -> Tensor:
        """The images shifted, scaled and rotated at random, grey around them."""
        height, width = self.size
        jitters = [round(j * min(self.size) / 224) for j in _JITTERS]
        before, after = ((torch.rand(2, generator=generator) * (j + 1)).floor() - j // 2 for j in jitters)
        scale = _SCALES[int(torch.randint(len(_SCALES), (), generator=generator))]
        angle = math.radians(int(torch.randint(-_DEGREES, _DEGREES + 1, (), generator=generator)))
        images = self.images()
        # Where each output pixel is read, in coordinates from -1 to 1 of a picture that need not be square.
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        turn = torch.tensor([[cos, sin * height / width], [-sin * width / height, cos]])
        to_unit = 2 / torch.tensor([width, height])
        move = -turn @ (after * to_unit) - before * to_unit
        theta = torch.cat([turn, move[:, None]], dim=1).to(images).expand(len(images), -1, -1)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images - 0.5, grid, align_corners=False) + 0.5

    def climb(self, value: Tensor, _step: int) -> None:
        """One step of Adam uphill. An image that has not met a slope yet gets more contrast instead."""
        (slope,) = torch.autograd.grad(-value, [self.spectrum])
        self.moved |= slope.flatten(1).any(1)
        self.spectrum.grad = slope
        self.optimizer.step()
        self.contrast = min(self.contrast * _CONTRAST, _MOST_CONTRAST)
        with torch.no_grad():
            self.spectrum[~self.moved] = self.start * self.contrast

    def finish(self) -> None:
        """Images that never met a slope become the start again."""
        with torch.no_grad():
            self.spectrum[~self.moved] = self.start


class _Pixels:
    """Images as normalised pixels that stay in range, small and smooth."""

    def __init__(self, number: int, size: tuple[int, int], explanandum: Any, generator: torch.Generator) -> None:
        self.mean: Tensor = explanandum.mean.reshape(1, -1, 1, 1)
        self.std: Tensor = explanandum.std.reshape(1, -1, 1, 1)
        noise = torch.randn(3, *size, generator=generator, dtype=torch.float64) * _PIXEL_NOISE
        self.values = noise.to(self.mean).expand(number, -1, -1, -1).clone().requires_grad_()
        self.optimizer = torch.optim.SGD([self.values], lr=_PIXEL_RATE, momentum=_PIXEL_MOMENTUM)

    def images(self) -> Tensor:
        """``[N,3,H,W]`` in [0,1]."""
        return (self.values * self.std + self.mean).clamp(0, 1)

    def shown(self, _generator: torch.Generator) -> Tensor:
        """The images as they are."""
        return self.values * self.std + self.mean

    def climb(self, value: Tensor, step: int) -> None:
        """One step of SGD uphill, back into the valid range."""
        steep = self.values.diff(dim=2).square().sum() + self.values.diff(dim=3).square().sum()
        cost = _PIXEL_WEIGHT * (self.values.abs().pow(6).sum() + steep) - value
        (slope,) = torch.autograd.grad(cost, [self.values])
        self.values.grad = slope
        for group in self.optimizer.param_groups:
            group["lr"] = _PIXEL_RATE * (0.1 if step >= _PIXEL_DROP else 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.values.copy_((self.images() - self.mean) / self.std)

    def finish(self) -> None:
        """Nothing: the images are what the last step left."""
