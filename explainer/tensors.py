"""Shape letters and the one batch type.

Shape letters used in every signature: ``B`` images, ``K`` classes, ``C`` channels, ``H`` x ``W`` pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Batch", "min_max", "state_digest"]


@dataclass(frozen=True)
class Batch:
    """Images with their labels, and with masks where the data set has them.

    Attributes:
        images: ``[B,3,H,W]`` float, RGB in [0,1], not normalised (the Explanandum and the Explainer normalise).
        targets: ``[B,K]`` float, multi-hot in {0,1}; single-label data sets are one-hot.
        masks: ``[B,K,H,W]`` float in {0,1}, the object pixels of each class, or None.
        void: ``[B,H,W]`` bool, True where the ground truth is undefined, or None.
        ids: one stable string per image.
        cues: ``[B,K,H,W]`` float in {0,1}, pixels of a planted shortcut cue (``shapes`` only), or None.
        epochs: the epoch of each image's augmentation, to move other maps as the image was moved; () counts as 0 everywhere.
    """

    images: Tensor
    targets: Tensor
    masks: Tensor | None = None
    void: Tensor | None = None
    ids: tuple[str, ...] = ()
    cues: Tensor | None = None
    epochs: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.images.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply ``function`` to every tensor (``ids`` and ``epochs`` stay)."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {k: function(v) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by ``DataLoader(pin_memory=True)``)."""
        return self.map(lambda t: t.pin_memory())

    def __getitem__(self, index: slice) -> Batch:
        """A contiguous part of the batch."""
        part = self.map(lambda t: t[index])
        return replace(part, ids=self.ids[index], epochs=self.epochs[index])


def state_digest(state: Mapping[str, Tensor], start: str = "") -> str:
    """SHA-256 (first 16 hex digits) over the names, types, shapes and values of tensors, after the text ``start``.

    The same on every device and memory layout, and in any order of the entries.
    """
    digest = hashlib.sha256(start.encode())
    for key in sorted(state):
        value = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]


def min_max(maps: Tensor, epsilon: float = 0.0) -> Tensor:
    """``(m - min) / (max - min + epsilon)`` of each map, in [0,1]; a constant map becomes 0 (it ranks no pixel above another).

    Args:
        maps: ``[...,H,W]``.
        epsilon: 0, or what published code adds to the range, so that its maps end below 1.
    """
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    spread = high - low + epsilon
    return (maps - low) / torch.where(spread == 0, torch.ones_like(spread), spread)
