"""A network whose filters are known: activations of 32 x 32 images with 6 x 6 patches, 16 filters, no downsampling.

f0 fires on red and yellow, f1 on green and yellow, f2 on blue, f3 to f15 on 2 % of the pixels each, at random. Concepts:

- blue: a blue patch. f2 is it exactly.
- pair: an object whose left half is red and right half green. f0 and f1 see one half each: no single filter passes IoU 1/2;
  "f0 or f1" is it.
- red: a red patch in images that also hold a yellow one. f0 sees both: IoU 1/2; "f0 and not f1" is it.
- yellow: a yellow patch. f1 is it exactly (there is no pair in its images); f0 sees the red one as well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from explainer.concepts.store import Activations, ConceptMasks

NAMES = ("blue", "pair", "red", "yellow")
K, SIDE, PATCH = 16, 32, 6


def planted(number: int, seed: int, noise: float = 0.02) -> tuple[Activations, ConceptMasks]:
    """Activations and truth of ``number`` images: a third shows a pair, the others red and yellow or yellow alone; half show blue."""
    rng = np.random.default_rng(seed)
    colors = np.zeros((number, SIDE, SIDE), np.int64)  # 0 nothing, 1 red, 2 green, 3 yellow, 4 blue
    masks = np.zeros((number, len(NAMES), SIDE, SIDE), bool)
    for i in range(number):
        kind = i % 3
        patches = [("pair",)] if kind == 0 else [("red",), ("yellow",)] if kind == 1 else [("yellow",)]
        if rng.random() < 0.5:
            patches.append(("blue",))
        taken = np.zeros((SIDE, SIDE), bool)
        for (name,) in patches:
            while True:
                y, x = rng.integers(0, SIDE - PATCH + 1, 2)
                place = np.s_[y : y + PATCH, x : x + PATCH]
                if not taken[place].any():
                    break
            taken[place] = True
            masks[i, NAMES.index(name)][place] = True
            if name == "pair":
                colors[i, y : y + PATCH, x : x + PATCH // 2] = 1
                colors[i, y : y + PATCH, x + PATCH // 2 : x + PATCH] = 2
            else:
                colors[i][place] = {"red": 1, "yellow": 3, "blue": 4}[name]
    on = np.zeros((number, K, SIDE, SIDE), np.float32)
    on[:, 0], on[:, 1], on[:, 2] = np.isin(colors, (1, 3)), np.isin(colors, (2, 3)), colors == 4
    on[:, 3:] = rng.random((number, K - 3, SIDE, SIDE)) < noise
    maps = torch.from_numpy(on * rng.uniform(1, 1.1, on.shape).astype(np.float32))
    return activations(maps), truth(torch.from_numpy(masks))


def activations(maps: Tensor) -> Activations:
    return Activations(maps, maps.mean((2, 3)), maps.amax((2, 3)))


def truth(masks: Tensor, void: Tensor | None = None) -> ConceptMasks:
    """``[N,C,H,W]`` bool -> what a store holds."""
    rows = torch.full(masks.shape[:2], -1)
    present = masks.flatten(2).any(2)
    rows[present] = torch.arange(int(present.sum()))
    bits = torch.from_numpy(np.packbits(masks[present].flatten(1).numpy(), axis=1))
    packed = None if void is None else torch.from_numpy(np.packbits(void.flatten(1).numpy(), axis=1))
    side = (masks.shape[2], masks.shape[3])
    return ConceptMasks([f"val/{i}" for i in range(len(masks))], present, rows, bits, packed, side)
