"""AGF, Attribution Guided Factorization.

Gur, Ali and Wolf, "Visualization of Supervised and Self-Supervised Neural Networks via Attribution Guided Factorization", AAAI 2021.
Attribution runs from the logits to the image; at each convolution it is joined by what the layer's input, its gradient and its
factorization into support and background say (eqs. 9 to 14). The maps are signed: above 0 supports the class, below 0 is background.

The method has constants (gain 10, ridge 1, 1e-9) although the paper calls it free of parameters, and the residual is of order 1
whatever the scale of the logits: rescaling the logits changes the map.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from explainer.attribution import check_class_index, check_images
from explainer.baselines.kernels.agf_rules import Options
from explainer.baselines.kernels.agf_sweep import Record, Sweep
from explainer.baselines.kernels.base import Baseline
from explainer.baselines.kernels.graph import Graph
from explainer.baselines.kernels.graph_calls import Run
from explainer.baselines.kernels.hooks import untouched
from explainer.errors import ConfigError

MODES: dict[str, Options] = {
    "code": Options(),
    "paper": Options(
        gain=1.0, ridge=1e-9, background="nonpositive", mask_gradient=False, shift="everywhere", first_conv="full", flat=False
    ),
}
_CHOICES = {"background": ("negative", "nonpositive"), "shift": ("masked", "everywhere"), "first_conv": ("zb", "full")}


def make_options(mode: str, **changes: Any) -> Options:
    """The options of a mode with those changed that are not None; a wrong value raises :class:`ConfigError`."""
    if mode not in MODES:
        raise ConfigError(f"agf: mode must be 'code' or 'paper', received {mode!r}.")
    options = dataclasses.replace(MODES[mode], **{key: value for key, value in changes.items() if value is not None})
    for key, allowed in _CHOICES.items():
        if getattr(options, key) not in allowed:
            raise ConfigError(f"agf: {key} must be one of {', '.join(allowed)}, received {getattr(options, key)!r}.")
    if options.gain <= 0 or options.ridge < 0:
        raise ConfigError(f"agf: gain must be positive and ridge at least 0, received gain={options.gain}, ridge={options.ridge}.")
    return options


class AGF(Baseline):
    """Attribution Guided Factorization of the class probability.

    Args:
        explanandum: a classifier of Conv2d, Linear, BatchNorm, activations, pooling, flatten, sums,
            concatenations and squeeze-and-excitation gates.
        mode: the differences between the published ``"code"`` (default) and the ``"paper"`` as printed; they correlate weakly. The
            options below change single ones (None: as the mode says; code | paper).
        gain: factor in ``sigmoid(gain * y / max y)`` of eq. 7 (10 | 1).
        ridge: added to the normal equations of eq. 7 (1 | 1e-9); 0 uses the pseudo-inverse.
        background: pixels with attribution ``"negative"`` (code) or ``"nonpositive"`` (paper) form the background.
        mask_gradient: the gradient that is factorized comes only from outputs with attribution (True | False).
        shift: the residual is added and its mean subtracted where attribution is (``"masked"``, code) or ``"everywhere"`` (paper).
        first_conv: ``"zb"``: the rule with the image's bounds and no residual (code); ``"full"``: like any other (paper).
        flat: whether, in residual blocks, 1x1 convolutions and those that feed the sum get no residual (True | False).
        abs_guard: a map whose maximum is not positive is not normalised, instead of changing sign (False | False).
        no_a, no_fx, no_fdx, no_m: leave out one term of the residual, eq. 13 (Table 5).
        no_reg: leave out the gate ``sigmoid(C)`` of eq. 13 (Table 5).
        gradcam: Grad-CAM of the layer, ``relu(mean_c x mean_pixels(G))``, in place of ``F_x + M`` in eq. 13 (Table 5).
    """

    name: ClassVar[str] = "agf"
    passes = "1 forward + a sweep of about 5 (forward + backward)"
    classes_share_work = True
    signed: ClassVar[bool] = True

    def __init__(
        self,
        explanandum: Any,
        mode: Literal["code", "paper"] = "code",
        *,
        gain: float | None = None,
        ridge: float | None = None,
        background: Literal["negative", "nonpositive"] | None = None,
        mask_gradient: bool | None = None,
        shift: Literal["masked", "everywhere"] | None = None,
        first_conv: Literal["zb", "full"] | None = None,
        flat: bool | None = None,
        abs_guard: bool = False,
        no_a: bool = False,
        no_fx: bool = False,
        no_fdx: bool = False,
        no_m: bool = False,
        no_reg: bool = False,
        gradcam: bool = False,
    ) -> None:
        super().__init__(explanandum)
        self.options = make_options(
            mode,
            gain=gain,
            ridge=ridge,
            background=background,
            mask_gradient=mask_gradient,
            shift=shift,
            first_conv=first_conv,
            flat=flat,
            abs_guard=abs_guard,
            no_a=no_a,
            no_fx=no_fx,
            no_fdx=no_fdx,
            no_m=no_m,
            no_reg=no_reg,
            gradcam=gradcam,
        )
        self._graph: Graph | None = None

    def all_classes(
        self, images: Tensor, classes: list[int] | None = None, *, generator: torch.Generator | None = None, masks: Tensor | None = None
    ) -> Tensor:
        """Maps of several classes, ``[B,len(classes),H,W]``, from one forward pass."""
        check_images(images)
        chosen = range(self.num_classes) if classes is None else classes
        targets = [check_class_index(k, images, self.num_classes) for k in chosen]
        with untouched(self.explanandum):
            run = self._forward(images)
            return torch.stack([self._map(run, target, images) for target in targets], dim=1)

    def intermediates(self, images: Tensor, class_index: Tensor | int | list[int]) -> Record:
        """What the sweep computes at each layer, ``{place: {"C" | "A" | "F_x" | "F_dx" | "M" | "r" | "Phi": tensor}}``."""
        check_images(images)
        record: Record = {}
        with untouched(self.explanandum):
            run = self._forward(images)
            self._map(run, check_class_index(class_index, images, self.num_classes), images, record)
        return record

    def _explain(self, images: Tensor, class_index: Tensor, generator: torch.Generator, masks: Tensor | None) -> Tensor:
        return self._map(self._forward(images), class_index, images)

    def _forward(self, images: Tensor) -> Run:
        if self._graph is None:
            self._graph = Graph(self.explanandum.classifier, self.name)
        side = getattr(self.explanandum, "input_size", None)
        with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False):
            x = images.detach().clone()
            if side is not None and x.shape[-2:] != (side, side):
                x = torch.nn.functional.interpolate(x, (side, side), mode="bilinear", align_corners=False)
            return self._graph.run(self.explanandum.normalize(x))

    def _map(self, run: Run, target: Tensor, images: Tensor, record: Record | None = None) -> Tensor:
        if bool((run.output.gather(1, target[:, None]) < 0).any()):
            warnings.warn(
                "agf: the logit of an explained class is negative, which reverses the order of eq. 8 (kept as published).", stacklevel=2
            )
        with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False):
            phi, _ = Sweep(run, self.options, self.name, record).from_class(target.clone())
        maps = to_map(phi)
        if maps.shape[-2:] != images.shape[-2:]:
            maps = torch.nn.functional.interpolate(maps[:, None], images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        return maps.to(images.dtype)


def to_map(phi: Tensor) -> Tensor:
    """Attribution of the image ``[B,C,H,W]`` -> signed map ``[B,H,W]``: divided by its maximum (if that is positive), channels summed."""
    top = phi.amax(dim=(1, 2, 3), keepdim=True)
    return (phi / torch.where(top > 0, top, 1.0)).sum(dim=1)
