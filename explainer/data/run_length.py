"""COCO's two mask encodings, polygons and run lengths, as boolean arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["decode_runs", "encode_runs", "fill_polygon"]


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Even-odd filling: a pixel belongs to the polygon if its centre does.

    Every edge toggles, in each row whose centre line it crosses, the pixels to the right of the crossing; the parity of the
    toggles up to a pixel says whether it lies inside.

    Args:
        points: ``[N,2]`` corners (x, y) in pixels, the closing edge implied.
        height: height of the image.
        width: width of the image; parts outside the image are cut off.
    """
    toggles = np.zeros((height, width + 1), dtype=bool)
    x0, y0 = points[:, 0], points[:, 1]
    for xa, ya, xb, yb in zip(x0, y0, np.roll(x0, -1), np.roll(y0, -1), strict=True):
        low, high = min(ya, yb), max(ya, yb)
        # centre lines y + 0.5 in [low, high): half-open, so that a corner on a line counts for one of its two edges
        first, last = max(0, int(np.ceil(low - 0.5))), min(height, int(np.ceil(high - 0.5)))
        if first >= last:
            continue
        rows = np.arange(first, last)
        crossing = xa + (rows + 0.5 - ya) * (xb - xa) / (yb - ya)
        # Every row occurs once an edge, so that no toggle is lost to a repeated index.
        toggles[rows, np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)] ^= True
    return np.logical_xor.accumulate(toggles[:, :width], axis=1)


def decode_runs(segmentation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """``{"size": [h, w], "counts": ...}``, a list of runs or COCO's compressed string, to a mask ``[height, width]``.

    Runs alternate between 0 and 1, beginning with 0, down the columns.

    Raises:
        ValueError: the size is not the image's, or the runs do not add up to it.
    """
    if list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(f"run-length size {segmentation.get('size')} is not the image's [{height}, {width}]")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = _inflate(counts)
    if not isinstance(counts, list) or not all(isinstance(c, int) and 0 <= c <= height * width for c in counts):
        raise ValueError("run lengths must be whole numbers within the image")
    if sum(counts) != height * width:
        raise ValueError(f"run lengths add up to {sum(counts)}, not to {height} x {width}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def encode_runs(mask: np.ndarray) -> dict[str, Any]:
    """A boolean mask ``[H,W]`` as ``{"size": [H, W], "counts": string}``, which pycocotools and :func:`decode_runs` read."""
    values = mask.T.ravel()
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    # The first run is of zeros: it is empty where the first pixel is one.
    borders = [0, *([0] if len(values) and values[0] else []), *changes.tolist(), len(values)]
    return {"size": list(mask.shape), "counts": _deflate(np.diff(borders).tolist())}


def _deflate(runs: list[int]) -> str:
    """The compressed string of run lengths; see :func:`_inflate`."""
    text = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            last = value == (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + (0 if last else 32)))
            if last:
                break
    return "".join(text)


def _inflate(text: str) -> list[int]:
    """The compressed string: characters carry 5 bits each, least first, bit 5 says that more follow, the last one's bit 4 is the sign;
    from the fourth number on, a number is the difference to the one two places before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("not a run-length string")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the run-length string ends in the middle of a number")
    return runs
