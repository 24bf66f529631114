"""What ``explainer explain`` does to each chosen mask on request: refine it, or give, refine and withhold it by a selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from explainer.errors import ConfigError
from explainer.fills import FillKind
from explainer.inference.formats import Array
from explainer.inference.refinement import check_method, quality, refine
from explainer.inference.selection import Selector, explain_selectively


@dataclass
class Treatment:
    """Refinement and selection of the masks of one image at a time.

    Attributes:
        explanandum: the classifier.
        method: refine every chosen mask with it, or None.
        iterations: number of iterations of the method.
        budget_s: seconds per image for refinement, or None.
        selector: accepts or withholds masks (:mod:`explainer.inference.selection`), or None. Its own fallback is applied to masks that it
            does not accept.
        fill: fill by which quality is judged without a selector (which has its own): the training's.

    Raises:
        ConfigError: without classifier, with both, or with a method that needs gradients where there are none.
    """

    explanandum: Any
    method: str | None = None
    iterations: int = 24
    budget_s: float | None = None
    selector: Selector | None = None
    fill: FillKind = "mean"

    def __post_init__(self) -> None:
        if self.explanandum is None:
            raise ConfigError("refinement and selection ask the classifier: name its checkpoint with --classifier.")
        if self.method is not None and self.selector is not None:
            raise ConfigError(
                "--refine refines every mask and --selector decides itself which to refine (calibrate with fallback: refine): choose one."
            )
        method = self.method
        if self.selector is not None and self.selector.fallback == "refine":
            method = (self.selector.refinement or {}).get("method", "extremal_perturbation")
        if method is not None:
            check_method(method, self.explanandum)

    def __call__(self, image: Array, masks: Array, chosen: Sequence[int]) -> tuple[Array, dict[int, dict[str, Any]]]:
        """Treat the chosen classes of one image.

        Args:
            image: ``[3,h,w]`` in [0,1], at the network's size.
            masks: ``[K,h,w]``.
            chosen: class numbers.

        Returns:
            The masks, and per chosen class ``quality``, ``refined`` and ``accepted`` (None without selector).
        """
        if not len(chosen):
            return masks, {}
        index = torch.tensor(list(chosen))
        images = torch.from_numpy(image)[None].expand(len(index), -1, -1, -1).contiguous()
        start = torch.from_numpy(masks[list(chosen)]).float()
        accepted: list[bool | None] = [None] * len(index)
        if self.selector is not None:
            result = explain_selectively(None, self.explanandum, images, index, self.selector, start=start)
            final, scores, refined, accepted = result.masks, result.scores, result.refined, list(result.accepted.tolist())
        elif self.method is not None:
            better = refine(
                None,
                self.explanandum,
                images,
                index,
                self.method,  # type: ignore[arg-type]
                iterations=self.iterations,
                budget_s=self.budget_s,
                start=start,
                fill=self.fill,
            )
            final, scores, refined = better.masks, better.after.score, better.improved
        else:
            final, scores = start, quality(self.explanandum, images, start, index, fill=self.fill).score
            refined = torch.zeros(len(index), dtype=torch.bool)
        out = masks.copy()
        out[list(chosen)] = final.detach().cpu().numpy()
        facts = {
            int(k): {"quality": round(float(s), 6), "refined": bool(r), "accepted": a}
            for k, s, r, a in zip(chosen, scores, refined, accepted, strict=True)
        }
        return out, facts
