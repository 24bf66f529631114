"""The cost model's formula, by hand."""

from __future__ import annotations

import pytest

from tests.benchmarks.bench_plan import cost, images_per_second

CONSTANTS = {"a": 0.02, "c": 0.01, "g": 0.001, "P": 5.0}


def test_cost_and_speed_by_hand() -> None:
    # 20 ms + 8 x 10 ms = 100 ms alone; with others each also averages 5 MB at 1 ms.
    assert cost(1, 8, CONSTANTS) == pytest.approx(0.1) and cost(2, 8, CONSTANTS) == pytest.approx(0.21)
    assert images_per_second(1, 8, CONSTANTS, 2) == pytest.approx(80)
    assert images_per_second(2, 8, CONSTANTS, 2) == pytest.approx(2 * 8 * 2 / 0.21)
    assert images_per_second(4, 8, CONSTANTS, 2) == images_per_second(2, 8, CONSTANTS, 2), "two cores are two cores"
