"""The frozen classifier with its batch norms folded into the convolutions before them: the same function, in fewer passes over memory."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from explainer.attribution.rest import at_rest
from explainer.models.explanandum import Explanandum

log = logging.getLogger(__name__)
#: Largest difference of the logits, as a share of the largest logit, at which the folded classifier counts as the same.
TOLERANCE = 1e-5


@torch.no_grad()
def folded(explanandum: Explanandum, images: Tensor) -> Explanandum:
    """A copy whose batch norms, in eval mode an affine map of each channel, are part of the convolution's weights.

    A batch norm is folded where it is given exactly what one convolution returned. Pairs are found by running the classifier, so that any
    control flow will do. Where something else reads a convolution's output as well, the answers differ, and nothing is folded. Masked
    images pass through it in training; methods that read layers by name are given the classifier as it is.

    Args:
        explanandum: stays as it is.
        images: ``[B,3,H,W]`` in [0,1], B >= 1; on them the copy's logits must be equal to :data:`TOLERANCE`.

    Returns:
        The copy, or ``explanandum`` itself where there is nothing to fold, it is compiled (then the compiler does it), it cannot be copied,
        or the answers differ.
    """
    classifier = explanandum.classifier
    if not explanandum.differentiable or any(getattr(m, "_compiled_call_impl", None) is not None for m in classifier.modules()):
        return explanandum
    if not any(isinstance(m, nn.BatchNorm2d) for m in classifier.modules()):
        return explanandum
    with torch.autocast(images.device.type, enabled=False):
        expected = explanandum(images[:2])
        pairs = _pairs(explanandum, images[:1])
        if not pairs:
            return explanandum
        try:
            other = copy.deepcopy(explanandum)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            log.debug("the classifier cannot be copied, so its batch norms are not folded: %s", error)
            return explanandum
        for convolution, norm in pairs:
            _fold(other.classifier, convolution, norm)
        found = other(images[:2])
    difference = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
    if not difference <= TOLERANCE:  # NaN is no equality either
        log.debug("folding batch norms would change logits by %.1e of the largest: they stay", difference)
        return explanandum
    log.debug("%d batch norms are folded into convolutions; logits differ by %.1e of the largest", len(pairs), difference)
    return other


def _pairs(explanandum: Explanandum, images: Tensor) -> list[tuple[str, str]]:
    """Paths of convolutions and of the batch norms that are given what they return, each called once."""
    convolutions: dict[int, str] = {}
    pairs: list[tuple[str, str]] = []
    calls: Counter[str] = Counter()
    seen: list[Tensor] = []  # kept alive, so that no other tensor gets its id

    def record(path: str) -> object:
        def hook(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
            calls[path] += 1
            seen.extend((inputs[0], output))
            if isinstance(module, nn.Conv2d):
                convolutions[id(output)] = path
            elif id(inputs[0]) in convolutions:
                pairs.append((convolutions[id(inputs[0])], path))

        return hook

    watched = [(path, m) for path, m in explanandum.classifier.named_modules() if isinstance(m, nn.Conv2d) or _is_foldable(m)]
    handles = [m.register_forward_hook(record(path)) for path, m in watched]
    try:
        with at_rest(explanandum):
            explanandum(images)
    finally:
        for handle in handles:
            handle.remove()
    once = [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]
    users = Counter(convolution for convolution, _ in once)
    return [pair for pair in once if users[pair[0]] == 1]


def _is_foldable(module: nn.Module) -> bool:
    """A batch norm with statistics of its own; timm's, which activates as well, too."""
    if not isinstance(module, nn.BatchNorm2d) or module.running_mean is None:
        return False
    return type(module) is nn.BatchNorm2d or all(isinstance(getattr(module, name, None), nn.Module) for name in ("drop", "act"))


def _fold(classifier: nn.Module, convolution: str, norm: str) -> None:
    conv, bn = classifier.get_submodule(convolution), classifier.get_submodule(norm)
    assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    parent, _, name = norm.rpartition(".")
    left = [] if type(bn) is nn.BatchNorm2d else [bn.get_submodule("drop"), bn.get_submodule("act")]
    rest = nn.Sequential(*left) if left else nn.Identity()
    setattr(classifier.get_submodule(parent), name, rest)
