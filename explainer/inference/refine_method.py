"""What can refine a mask: the one list for configurations, the command line and :func:`explainer.inference.refinement.refine`. No torch."""

from __future__ import annotations

from typing import Literal

RefineMethod = Literal["extremal_perturbation", "igos_pp", "guided_filter"]
SEARCHES: tuple[RefineMethod, ...] = ("extremal_perturbation", "igos_pp")  # the others do no iterations and need no gradients
