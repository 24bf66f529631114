"""A trained Explainer's results in words: what it beats, what beats it, and what its numbers warn of.

Everything is computed from the stored rows. Two methods are compared on the (image, class) pairs that both have; one is better where the
bootstrap interval of the mean difference excludes 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from explainer.evaluation.protocol import Column, Protocol
from explainer.evaluation.results import Row
from explainer.evaluation.statistics import paired_difference, statistic

#: (protocol's name, column): what is said of a method, in this order, as far as it was measured.
SAID: tuple[tuple[str, str], ...] = (
    ("segmentation", "iou"),
    ("segmentation_per_class", "iou"),
    ("pointing_game", "hit"),
    ("insertion_deletion", "insertion_minus_deletion"),
    ("masking_matrix", "own"),
    ("masking_matrix", "foreign"),
    ("inverse_mask", "left"),
)

Found = Mapping[tuple[str, str, str], Sequence[Row]]


def conclusions(
    rows: Found,
    protocols: Mapping[str, Protocol],
    trained: Sequence[str],
    references: Sequence[str],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    bootstrap: int = 1000,
) -> list[str]:
    """One sentence for each number of each trained Explainer, and one for each warning.

    Args:
        rows: rows by (method, scale, protocol's label).
        protocols: protocols by label.
        trained: methods that are trained Explainers.
        references: rows that ask no classifier and read no ground truth (constants, centre, random).
        confidence, seed, bootstrap: level, seed and number of resamples of the intervals, the same as in the tables. Without resamples
            nothing is compared.
    """
    sentences: list[str] = []
    for method in trained:
        for name, column_name in SAID:
            for label, protocol in protocols.items():
                column = protocol.columns().get(column_name)
                own = rows.get((method, "raw", label))
                if protocol.name == name and column is not None and own:
                    others = {(m, s): part for (m, s, where), part in rows.items() if where == label and m != method}
                    sentences += _compared(method, label, column_name, column, own, others, references, confidence, seed, bootstrap)
        sentences += _warnings(method, rows, protocols)
    return sentences


def _compared(
    method: str,
    label: str,
    name: str,
    column: Column,
    own: Sequence[Row],
    others: Mapping[tuple[str, str], Sequence[Row]],
    references: Sequence[str],
    confidence: float,
    seed: int,
    bootstrap: int,
) -> list[str]:
    """What is better and what is worse in one column. A method with two scales counts with its better one."""
    value = statistic(own, name, column, bootstrap=0).value
    if math.isnan(value) or column.higher_is_better is None or column.counts is not None:
        return []
    sign = 1 if column.higher_is_better else -1
    groups: dict[str, list[str]] = {"better than": [], "not told apart from": [], "worse than": []}
    for other in dict.fromkeys(m for m, _ in others) if bootstrap else ():
        differences = [
            paired_difference(own, part, name, column, bootstrap=bootstrap, confidence=confidence, seed=seed)
            for (m, _), part in others.items()
            if m == other
        ]
        bounds = [sorted((sign * d.low, sign * d.high)) for d in differences if not math.isnan(d.low)]
        if not bounds:
            continue
        if all(low > 0 for low, _ in bounds):
            groups["better than"].append(other)
        else:
            groups["worse than" if any(high < 0 for _, high in bounds) else "not told apart from"].append(other)
    number = f"{100 * value:.1f} %" if column.percent else f"{value:.3g}"
    told = "; ".join(f"{words} {', '.join(found)}" for words, found in groups.items() if found)
    sentences = [f"{method}: {column.title} ({label}) {number}{': ' + told if told else ''}."]
    unbeaten = [m for m in references if m in groups["worse than"] + groups["not told apart from"]]
    if unbeaten and name in ("iou", "hit"):
        sentences.append(
            f"WARNING {method}: in {column.title} ({label}) no better than {', '.join(unbeaten)}, which know nothing of the image. "
            "These masks do not show where the evidence is. The guide's page Train says what to try (When masks show nothing)."
        )
    return sentences


def _warnings(method: str, rows: Found, protocols: Mapping[str, Protocol]) -> list[str]:
    """Numbers that are bad whatever the others have."""
    found: dict[str, float] = {}
    for label, protocol in protocols.items():
        part = rows.get((method, "raw", label), ())
        for name in ("area", "grey_share", "left"):
            values = [r.values[name] for r in part if not math.isnan(r.values.get(name, math.nan))]
            if values and protocol.name in ("segmentation", "segmentation_per_class", "inverse_mask"):
                found[f"own_{name}" if protocol.name == "segmentation_per_class" else name] = sum(values) / len(values)
    grey, left = found.get("grey_share", 0.0), found.get("left", 0.0)
    merged = found.get("area", found.get("own_area", 0.5))
    own = found.get("own_area", merged)  # together, the masks of a picture whose every pixel has a label cover all of it
    sentences = []
    if merged < 0.005:
        sentences.append(f"WARNING {method}: dead masks: together they cover {100 * merged:.1f} % of an image on average.")
    if own > 0.95:
        sentences.append(f"WARNING {method}: full masks: they cover {100 * own:.1f} % of an image on average.")
    if grey > 0.5 and left > 0.3:
        sentences.append(
            f"WARNING {method}: grey solution: {100 * grey:.0f} % of the mask's values lie in [0.1, 0.9], and {100 * left:.0f} % of the "
            "classes are still detected without what it shows."
        )
    return sentences
