"""One step of gradient descent on an image and class: the inner step of meta-saliency (Rebuffi et al., CVPR 2020, section 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional


def stepped_parameters(explanandum: Any, image: Tensor, class_index: Tensor, rate: float) -> dict[str, Tensor]:
    """``theta - rate * d loss(theta) / d theta`` by name; the classifier stays as it is.

    Args:
        explanandum: the classifier.
        image: ``[1,C,H,W]`` in [0,1].
        class_index: ``[1]``; the loss is the cross-entropy (multi-class) or the binary cross-entropy of this class (multi-label).
        rate: length of the step; negative climbs.
    """
    with torch.enable_grad():
        start = {n: p.detach().clone().requires_grad_() for n, p in explanandum.named_parameters() if p.is_floating_point()}
        logits = functional_call(explanandum, start, (image,))
        if explanandum.task == "multilabel":
            loss = -functional.logsigmoid(logits.gather(1, class_index[:, None])).sum()
        else:
            loss = functional.cross_entropy(logits, class_index)
        slopes = torch.autograd.grad(loss, list(start.values()), allow_unused=True)
    return {n: (p if g is None else p - rate * g).detach() for (n, p), g in zip(start.items(), slopes, strict=True)}
