"""Every row of a table averages the same images: whether a number is defined depends on the image, never on the mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from explainer.evaluation.protocols.segmentation import Segmentation


def cases() -> tuple[Tensor, Tensor]:
    """Truth and void ``[5,6,6]``: an object, none, an object beside void, nothing but void, an object of one pixel."""
    truth, void = torch.zeros(5, 6, 6), torch.zeros(5, 6, 6, dtype=torch.bool)
    truth[0, 1:4, 1:4] = truth[2, :2] = 1
    truth[4, 5, 5] = 1
    void[2, 4:] = True
    void[3] = True
    return truth, void


@pytest.mark.parametrize("mode", ["corrected", "paper", "code"])
@pytest.mark.parametrize("with_void", [True, False])
def test_the_mask_does_not_decide_which_images_count(mode: str, with_void: bool) -> None:
    truth, void = cases()
    random = torch.rand(5, 6, 6, generator=torch.Generator().manual_seed(0))
    masks = {"zero": torch.zeros(5, 6, 6), "one": torch.ones(5, 6, 6), "half": torch.full((5, 6, 6), 0.5), "truth": truth, "random": random}
    found = {name: Segmentation(mode).compare(m, truth, void if with_void else None) for name, m in masks.items()}  # type: ignore[arg-type]
    for column in found["random"]:
        defined = {name: values[column].isfinite().tolist() for name, values in found.items()}
        assert all(pattern == defined["random"] for pattern in defined.values()), (column, defined)
