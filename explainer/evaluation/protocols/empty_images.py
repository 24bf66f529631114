"""What masks show where there is nothing to show: images of classes that no pixel belongs to (no defect, background)."""

from __future__ import annotations

from torch import Tensor

from explainer.errors import ConfigError
from explainer.evaluation.protocol import Column, Mode, Protocol, Score, scores
from explainer.evaluation.scene import Maps, Scene


class EmptyImages(Protocol):
    """One row per image all of whose labels are classes without a region (``data.options.no_region``): the masks of all other classes,
    merged by their maximum, should be empty. ``area`` is the merged mask's mean, ``area_at_half`` the share of pixels of at least 0.5,
    ``marked`` whether there is any such pixel. An inspector looks at every marked one in vain.

    A map that is rescaled to [0,1] is never empty, so that methods without a scale of their own fail here by design: read the raw rows.

    Args:
        mode: no differences.
    """

    name = "empty_images"
    heading = "Where nothing is to be seen"
    question = "How much do the masks mark in images of classes that no pixel belongs to?"
    source = "this project"
    uses_scale = True

    def __init__(self, mode: Mode = "corrected") -> None:
        super().__init__(mode)

    def columns(self) -> dict[str, Column]:
        """area, area at 0.5, marked."""
        return {
            "area": Column("area", False, percent=True),
            "area_at_half": Column("area at 0.5", False, percent=True),
            "marked": Column("marked", False, percent=True),
        }

    def wanted(self, scene: Scene) -> Tensor:
        """The classes with a region, of the images without one."""
        region = ~scene.without_region
        return _empty(scene)[:, None] & region

    def score(self, scene: Scene, maps: Maps | None) -> list[Score]:
        """Merge the masks of the classes with a region and measure their area on the empty images."""
        assert maps is not None
        rows = _empty(scene).nonzero()[:, 0]
        if not len(rows):
            return []
        merged = maps.as_mask(maps.raw[rows][:, ~scene.without_region]).amax(dim=1).flatten(1)
        half = (merged >= 0.5).double().mean(dim=1)
        return scores(rows, None, {"area": merged.mean(dim=1), "area_at_half": half, "marked": (half > 0).double()})


def _empty(scene: Scene) -> Tensor:
    """Images with labels, all of which are classes without a region, bool ``[B]``."""
    without = scene.without_region
    if not bool(without.any()):
        raise ConfigError(
            "the protocol empty_images looks at images of classes that no pixel belongs to, and the data set names none: "
            "set data.options.no_region (no_region: [free]), or leave the protocol out."
        )
    return scene.labels.any(dim=1) & ~(scene.labels & ~without).any(dim=1)
