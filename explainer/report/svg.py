"""Curves as inline SVG: no script is needed to see them, no library to draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

#: Distinguishable on white and on near-black; further curves repeat the colours with another dash.
COLORS = ("#2f6fde", "#e0572b", "#2a9d5c", "#b04ad0", "#c79a00", "#00a3b4", "#d6336c", "#7a6a58", "#6677cc", "#5f8f1f")
DASHES = ("", "7 4", "2 3", "10 3 2 3")
_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 330, 48, 12, 10, 40


def style(number: int) -> tuple[str, str]:
    """Colour and dash of the curve with this number."""
    return COLORS[number % len(COLORS)], DASHES[number // len(COLORS) % len(DASHES)]


def curves(x: Sequence[float], lines: Sequence[tuple[str, Sequence[float], int]], x_title: str, y_title: str) -> str:
    """A chart.

    Args:
        x: positions.
        lines: ``(label, values, style number)``; NaN breaks a line.
        x_title, y_title: titles of the axes.

    Returns:
        ``<svg>`` with one ``<polyline class="curve" data-label=...>`` per unbroken piece.
    """
    numbers = [v for _, values, _ in lines for v in values if math.isfinite(v)]
    low, high = min([0.0, *numbers]), max([1e-9, *numbers])
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    left, right = (min(x), max(x)) if max(x) > min(x) else (min(x) - 0.5, min(x) + 0.5)

    def at(px: float, py: float) -> tuple[float, float]:
        return (
            _LEFT + (px - left) / (right - left) * (_W - _LEFT - _RIGHT),
            _TOP + (high - py) / (high - low) * (_H - _TOP - _BOTTOM),
        )

    parts = [f'<svg class="chart" viewBox="0 0 {_W} {_H}" role="img" aria-label="{escape(y_title)} over {escape(x_title)}">']
    for tick in ticks:
        y = at(left, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(left, right):
        if left <= tick <= right:
            parts.append(f'<text x="{at(tick, low)[0]:.1f}" y="{_H - _BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(_LEFT + _W - _RIGHT) / 2}" y="{_H - 4}" text-anchor="middle">{escape(x_title)}</text>')
    for label, values, number in lines:
        color, dash = style(number)
        for piece in _pieces(x, values):
            points = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*p) for p in piece))
            dashed = f' stroke-dasharray="{dash}"' if dash else ""
            parts.append(
                f'<polyline class="curve" data-label="{escape(label)}" points="{points}" stroke="{color}"{dashed}>'
                f"<title>{escape(label)}</title></polyline>"
            )
    return "".join([*parts, "</svg>"])


def swatch(number: int) -> str:
    """A short piece of the line, for legends."""
    color, dash = style(number)
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<svg class="swatch" viewBox="0 0 24 8" aria-hidden="true"><line x1="0" x2="24" y1="4" y2="4" stroke="{color}"{dashed}/></svg>'


def _pieces(x: Sequence[float], values: Sequence[float]) -> list[list[tuple[float, float]]]:
    found: list[list[tuple[float, float]]] = [[]]
    for px, py in zip(x, values, strict=False):
        if math.isfinite(py):
            found[-1].append((px, py))
        elif found[-1]:
            found.append([])
    return [piece for piece in found if piece]


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span ``[low, high]``."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step = next(step * f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
