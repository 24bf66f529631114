"""COCO's encodings against slow or hand-worked masks."""

from __future__ import annotations

import numpy as np
import pytest

from explainer.data.run_length import decode_runs, encode_runs, fill_polygon


def inside(x: float, y: float, points: np.ndarray) -> bool:
    """The textbook ray test for one point."""
    count = False
    for (xa, ya), (xb, yb) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if (ya <= y) != (yb <= y) and x >= xa + (y - ya) * (xb - xa) / (yb - ya):
            count = not count
    return count


@pytest.mark.parametrize("seed", range(8))
def test_polygons_agree_with_a_ray_test_per_pixel(seed: int) -> None:
    points = np.random.default_rng(seed).uniform(-4, 16, (3 + seed, 2))
    expected = np.array([[inside(x + 0.5, y + 0.5, points) for x in range(13)] for y in range(11)])
    assert np.array_equal(fill_polygon(points, 11, 13), expected)


def test_a_rectangle_on_pixel_borders_is_exact_and_its_direction_does_not_matter() -> None:
    points = np.array([[2, 1], [5, 1], [5, 4], [2, 4]], dtype=float)
    expected = np.zeros((6, 7), dtype=bool)
    expected[1:4, 2:5] = True
    assert np.array_equal(fill_polygon(points, 6, 7), expected)
    assert np.array_equal(fill_polygon(points[::-1], 6, 7), expected)


def test_runs_go_down_the_columns_and_begin_with_zero() -> None:
    mask = decode_runs({"size": [2, 3], "counts": [1, 2, 3]}, 2, 3)
    assert mask.astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert decode_runs({"size": [1, 2], "counts": [0, 2]}, 1, 2).tolist() == [[True, True]]


def test_compressed_strings() -> None:
    # "6" = 6 zeros; "2" = 2 ones; "=" = 13: hand-worked single characters (value + 48)
    mask = np.array([0] * 6 + [1] * 2 + [0] * 13, dtype=bool).reshape(3, 7).T
    assert np.array_equal(decode_runs({"size": [7, 3], "counts": "62="}, 7, 3), mask)
    assert encode_runs(mask) == {"size": [7, 3], "counts": "62="}
    # 16 needs two characters, its bit 4 being the sign: 16 = 0b10000 -> (16 | 32) + 48 = "`", then "0"; no zeros before it: "0".
    assert encode_runs(np.ones((4, 4), bool)) == {"size": [4, 4], "counts": "0`0"}
    # The fourth run is written as its difference to the second: runs 1 4 2 3 -> 1 4 2 -1, and -1 is 31 + 48 = "O".
    mask = np.array([0, 1, 1, 1, 1, 0, 0, 1, 1, 1], dtype=bool).reshape(2, 5).T
    assert encode_runs(mask)["counts"] == "142O"
    random = np.random.default_rng(0)
    for shape in [(30, 40)] * 20 + [(1, 1), (1, 5), (300, 200)]:
        mask = random.random(shape) < random.random()
        assert np.array_equal(decode_runs(encode_runs(mask), *shape), mask)
    assert encode_runs(np.zeros((2, 3), bool))["counts"] == "6"


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [3, 2], "counts": [6]}, "is not the image's"),
        ({"size": [2, 3], "counts": [5]}, "add up to 5"),
        ({"size": [2, 3], "counts": [-1, 7]}, "whole numbers"),
        ({"size": [2, 3], "counts": [10**12]}, "whole numbers"),
        ({"size": [2, 3], "counts": None}, "whole numbers"),
        ({"size": [2, 3], "counts": "\x01"}, "not a run-length string"),
        ({"size": [2, 3], "counts": "P"}, "ends in the middle"),
        ({"size": [2, 3], "counts": "o" * 50}, "not a run-length string"),
    ],
)
def test_damaged_runs_are_refused(segmentation: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_runs(segmentation, 2, 3)
