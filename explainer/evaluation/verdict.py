"""Checks that end in pass or fail: what a verdict is, and how protocols that give verdicts find them in their rows.

A check is a protocol: its rows are stored, merged and resumed like all others, and its verdict is computed from the rows alone.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from explainer.evaluation.protocol import Protocol
from explainer.evaluation.results import Row, encode

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """One line of the table of checks.

    Attributes:
        check: plain words, e.g. "class readable from where the mask lies".
        method, scale: whose maps.
        value: what was measured; NaN where nothing could be.
        threshold: what it is compared with.
        rule: "at most" or "at least": how value and threshold must stand for a pass.
        passed: None where the check cannot decide (the sentence says why).
        sentence: the finding in plain words.
        details: further numbers by name.
    """

    check: str
    method: str
    scale: str
    value: float
    threshold: float
    rule: str
    passed: bool | None
    sentence: str
    details: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        numbers = {"value": encode(self.value), "threshold": encode(self.threshold)}
        return {**asdict(self), **numbers, "details": {k: encode(float(v)) for k, v in self.details.items()}}


def decide(
    check: str,
    method: str,
    scale: str,
    *,
    value: float,
    threshold: float,
    rule: str,
    sentence: str,
    details: Mapping[str, float] | None = None,
) -> Verdict:
    """A verdict by comparison; an undefined value cannot decide."""
    assert rule in ("at most", "at least")
    passed = None if math.isnan(value) or math.isnan(threshold) else value <= threshold if rule == "at most" else value >= threshold
    return Verdict(check, method, scale, value, threshold, rule, passed, sentence, dict(details or {}))


def undecided(
    check: str, method: str, scale: str, *, threshold: float, rule: str, why: str, details: Mapping[str, float] | None = None
) -> Verdict:
    """A verdict that says why there is none."""
    return Verdict(check, method, scale, math.nan, threshold, rule, None, why, dict(details or {}))


class Check(Protocol):
    """A protocol whose rows end in verdicts."""

    #: Heading of the check in the report.
    title: ClassVar[str] = ""

    @abc.abstractmethod
    def verdicts(self, rows: Sequence[Row]) -> list[Verdict]:
        """The verdicts about one method at one scale (all ``rows`` are theirs)."""


def verdicts_of(checks: Mapping[str, Protocol], rows: Iterable[Row]) -> list[tuple[str, Verdict]]:
    """``(label, verdict)`` of the protocols that are checks, in the order of the rows' first appearance."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if isinstance(checks.get(row.protocol), Check):
            groups.setdefault((row.protocol, row.method, row.scale), []).append(row)
    found: list[tuple[str, Verdict]] = []
    for (label, _, _), members in groups.items():
        check = checks[label]
        assert isinstance(check, Check)
        found += [(label, verdict) for verdict in check.verdicts(members)]
    return found


def column(rows: Sequence[Row], name: str) -> Array:
    """One value of every row ``[N]``."""
    return np.array([row.values.get(name, math.nan) for row in rows], dtype=np.float64)


def bootstrap(values: Array, images: Sequence[int], resamples: int = 1000, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean of ``values`` ``[N]`` when images are drawn again with replacement.

    Rows of one image stay together: they are not independent. NaN values are left out; NaN bounds with fewer than two images.
    """
    sound = ~np.isnan(values)
    groups, member = np.unique(np.asarray(images)[sound], return_inverse=True)
    if len(groups) < 2:
        return math.nan, math.nan
    total = np.bincount(member, values[sound], len(groups))
    count = np.bincount(member, minlength=len(groups))
    draws = np.random.default_rng(seed).multinomial(len(groups), np.full(len(groups), 1 / len(groups)), size=resamples)
    means = (draws @ total) / (draws @ count)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean(values: Array) -> float:
    """Mean without NaN; NaN of nothing."""
    sound = values[~np.isnan(values)]
    return float(sound.mean()) if len(sound) else math.nan
