"""The words of an evaluation: who is better than whom, by hand, and what is warned of."""

from __future__ import annotations

from explainer.evaluation.conclusions import conclusions
from explainer.evaluation.protocol import parse_protocols
from explainer.evaluation.results import Row

PROTOCOLS = parse_protocols(["segmentation", "inverse_mask"], "corrected")


def rows(method: str, values: list[float], protocol: str = "segmentation", name: str = "iou", scale: str = "raw") -> list[Row]:
    return [Row(method, scale, protocol, f"i{i}", i, None, {name: v}) for i, v in enumerate(values)]


def found(**methods: list[float]) -> dict[tuple[str, str, str], list[Row]]:
    return {(m, "raw", "segmentation"): rows(m, v) for m, v in methods.items()}


def test_better_worse_and_undecided_by_paired_differences() -> None:
    data = found(explainer=[0.5, 0.6, 0.7, 0.8], low=[0.3, 0.4, 0.5, 0.6], high=[0.6, 0.7, 0.8, 0.9], mixed=[0.9, 0.2, 1.1, 0.4])
    # a method with two scales counts with its better one
    data["low", "minmax", "segmentation"] = rows("low", [0.4, 0.5, 0.6, 0.7], scale="minmax")
    said = conclusions(data, PROTOCOLS, ["explainer"], [])
    assert said == [
        "explainer: IoU (segmentation) 65.0 %: better than low; not told apart from mixed; worse than high.",
    ]
    data["low", "minmax", "segmentation"] = rows("low", [0.9, 0.9, 0.9, 0.9], scale="minmax")
    assert "worse than low, high" in conclusions(data, PROTOCOLS, ["explainer"], [])[0]


def test_without_resamples_only_the_number_is_said() -> None:
    data = found(explainer=[0.5, 0.6], low=[0.3, 0.4], one=[0.9, 0.9])
    assert conclusions(data, PROTOCOLS, ["explainer"], ["one"], bootstrap=0) == ["explainer: IoU (segmentation) 55.0 %."]


def test_what_does_not_beat_a_constant_is_warned_of() -> None:
    said = conclusions(
        found(explainer=[0.5, 0.6, 0.7], one=[0.5, 0.7, 0.8], zero=[0.0, 0.1, 0.0]), PROTOCOLS, ["explainer"], ["one", "zero"]
    )
    assert len(said) == 2 and said[1].startswith("WARNING explainer: in IoU (segmentation) no better than one, which know")
    assert len(conclusions(found(explainer=[0.5, 0.6, 0.7], one=[0.1, 0.2, 0.3]), PROTOCOLS, ["explainer"], ["one"])) == 1


def test_less_is_better_where_the_column_says_so_and_grey_is_named() -> None:
    data = {
        ("explainer", "raw", "inverse_mask"): [
            Row("explainer", "raw", "inverse_mask", f"i{i}", i, None, {"left": v, "grey_share": 0.8}) for i, v in enumerate([0.5, 0.4])
        ],
        ("cam", "raw", "inverse_mask"): rows("cam", [0.9, 0.8], "inverse_mask", "left"),
    }
    said = conclusions(data, PROTOCOLS, ["explainer"], [])
    assert said[0] == "explainer: left (inverse_mask) 45.0 %: better than cam."
    assert "grey solution: 80 % of the mask's values" in said[1] and "45 % of the classes" in said[1]


def test_full_masks_are_named() -> None:
    data = {("explainer", "raw", "segmentation"): rows("explainer", [0.99, 0.98], name="area")}
    assert "they cover 98.5 % of an image" in conclusions(data, PROTOCOLS, ["explainer"], [])[0]


def test_masks_that_cover_a_picture_only_together_are_not_called_full() -> None:
    """Streets: every pixel belongs to a class of the picture."""
    together = {("explainer", "raw", "segmentation"): rows("explainer", [0.99, 0.98], name="area")}
    both = parse_protocols(["segmentation", "segmentation_per_class"], "corrected")
    for own, expected in (([0.4, 0.3, 0.6], False), ([0.99, 0.97, 0.98], True)):
        data = together | {("explainer", "raw", "segmentation_per_class"): rows("explainer", own, "segmentation_per_class", "area")}
        said = conclusions(data, both, ["explainer"], [])
        assert any("full masks" in sentence for sentence in said) == expected, own


def test_small_objects_that_together_cover_enough_are_not_called_dead() -> None:
    both = parse_protocols(["segmentation", "segmentation_per_class"], "corrected")
    for merged, expected in (([0.04, 0.05], False), ([0.004, 0.003], True)):
        data = {
            ("explainer", "raw", "segmentation"): rows("explainer", merged, name="area"),
            ("explainer", "raw", "segmentation_per_class"): rows("explainer", [0.004] * 3, "segmentation_per_class", "area"),
        }
        said = conclusions(data, both, ["explainer"], [])
        assert any("dead masks" in sentence for sentence in said) == expected
