"""Means, excluded rows and intervals, against numbers worked by hand and a slow bootstrap."""

from __future__ import annotations

import math

import numpy as np
import pytest

from explainer.evaluation.protocol import Column
from explainer.evaluation.protocols.classification_kept import ClassificationKept
from explainer.evaluation.results import Row
from explainer.evaluation.statistics import mean_vector, paired_difference, resamples, statistic


def rows(*entries: tuple[int, int | None, float], method: str = "m") -> list[Row]:
    return [Row(method, "raw", "p", str(i), i, k, {"a": v}) for i, k, v in entries]


def test_mean_over_rows_and_over_classes():
    part = rows((0, 0, 1.0), (0, 1, 0.0), (1, 0, 0.5), (2, 0, math.nan))
    assert statistic(part, "a", Column("a")).value == pytest.approx(0.5)
    by_class = statistic(part, "a", Column("a", average="classes"))
    assert by_class.value == pytest.approx((0.75 + 0.0) / 2)
    assert by_class.per_class == {0: 0.75, 1: 0.0}
    assert (by_class.used, by_class.excluded, by_class.images) == (3, 1, 2)


def test_a_column_may_read_another_value_and_rows_without_it_are_not_excluded():
    part = [*rows((0, 0, 1.0)), Row("m", "raw", "p", "0", 0, None, {"b": 5.0})]
    s = statistic(part, "mean_a", Column("x", value="a"))
    assert (s.value, s.used, s.excluded) == (1.0, 1, 0)


def test_nothing_defined_is_nan():
    s = statistic(rows((0, 0, math.nan)), "a", Column("a"))
    assert math.isnan(s.value) and math.isnan(s.low) and (s.used, s.excluded, s.images) == (0, 1, 0)
    assert math.isnan(statistic([], "a", Column("a")).value)


def test_one_image_has_no_interval():
    """Every resample is that image: an interval without width would tell apart whatever is not equal."""
    s = statistic(rows((0, 0, 0.2), (0, 1, 0.4)), "a", Column("a"))
    assert s.value == pytest.approx(0.3) and math.isnan(s.low) and math.isnan(s.high)


def test_interval_is_the_bootstrap_over_images_with_all_their_rows():
    rng = np.random.default_rng(1)
    part = rows(*((i, k, float(rng.random() + i / 10)) for i in range(8) for k in range(1 + i % 3)))
    s = statistic(part, "a", Column("a"), bootstrap=400, confidence=0.9, seed=3)
    weights = resamples(8, 400, 3)
    means = []
    for draw in weights:
        values = [r.values["a"] for r in part for _ in range(int(draw[r.index]))]
        means.append(sum(values) / len(values))
    assert (s.low, s.high) == pytest.approx(tuple(np.percentile(means, [5, 95])))
    assert s.low < s.value < s.high
    assert (weights.sum(1) == 8).all()


def test_micro_scores_come_from_summed_counts():
    protocol = ClassificationKept(sweep=[])
    counts = [[2, 0, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 2, 1, 0, 0]]
    part = [Row("m", "raw", "p", str(i), i, None, {}, {"counts": [float(c) for c in line]}) for i, line in enumerate(counts)]
    columns = protocol.columns()
    value = {name: statistic(part, name, c, protocol=protocol, bootstrap=0).value for name, c in columns.items()}
    assert value["original/precision"] == pytest.approx(2 / 3) and value["original/recall"] == pytest.approx(2 / 3)
    assert value["masked/precision"] == pytest.approx(3 / 4) and value["masked/recall"] == pytest.approx(3 / 4)
    assert value["masked/accuracy"] == pytest.approx(4 / 6)
    assert math.isnan(statistic(part, "masked/f1", columns["masked/f1"], protocol=protocol, bootstrap=0).low)


def test_paired_difference_pairs_by_image_and_class():
    first = rows((0, 0, 0.9), (1, 0, 0.5), (2, 0, 0.8))
    second = rows((1, 0, 0.1), (0, 0, 0.6), (3, 0, 0.0))
    s = paired_difference(first, second, "a", Column("a"))
    assert s.value == pytest.approx((0.3 + 0.4) / 2) and s.used == 2
    assert 0.3 <= s.low <= s.high <= 0.4 + 1e-12


def test_mean_vector_leaves_nan_entries_out():
    part = [Row("m", "raw", "p", "0", 0, 0, {}, {"v": [1.0, math.nan]}), Row("m", "raw", "p", "1", 1, 0, {}, {"v": [3.0, math.nan]})]
    mean = mean_vector(part, "v")
    assert mean[0] == 2.0 and math.isnan(mean[1])
    assert mean_vector(part, "w") == []
