"""Tables: numbers as in the summary, the best marked, paired differences by hand, and every output form escaped."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from explainer import plugins
from explainer.cli import main
from explainer.errors import ConfigError
from explainer.evaluation.results import Row
from explainer.report import tables
from explainer.report.latex import latex
from explainer.report.tables import Cell, Results, Table
from explainer.report.write import render, write
from tests.unit.report.results_folder import EVIL, make_results

COLUMN = {"title": "IoU", "higher_is_better": True, "percent": True, "average": "rows", "value": None, "counts": None, "shown": True}


def hand_made(values: dict[str, list[float]], column: dict | None = None, needs_truth: tuple[str, ...] = ()) -> Results:
    """One protocol with one column; ``values`` of each method by image."""
    rows = [Row(m, "raw", "seg", f"i{i}", i, 0, {"iou": v}) for m, vs in values.items() for i, v in enumerate(vs)]
    means = {m: [v for v in vs if not math.isnan(v)] for m, vs in values.items()}
    results = [
        {"method": m, "scale": "raw", "protocol": "seg", "column": "iou", "value": sum(v) / len(v), "low": 0.1, "high": 0.2, "used": len(v)}
        for m, v in means.items()
    ]
    summary = {
        "schema": 1,
        "methods": {m: {"needs_truth": m in needs_truth} for m in values},
        "results": results,
        "confidence": 0.95,
        "images": 4,
        "split": "test",
        "protocols": {
            "seg": {"name": "segmentation", "source": "paper", "mode": "corrected", "axes": {}, "columns": {"iou": column or COLUMN}}
        },
    }
    return Results(Path("here"), summary, rows)


def test_the_best_number_is_marked_and_ground_truth_does_not_compete():
    table = tables.protocol_table(hand_made({"a": [0.5, 0.7], "b": [0.6, 0.9], "truth": [1.0, 1.0]}, needs_truth=("truth",)), "seg")
    assert [(label, cells[0].number, cells[0].best) for label, cells in table.lines] == [
        ("a", "60.00", False),
        ("b", "75.00", True),
        ("truth", "100.00", False),
    ]
    assert table.header == ["IoU %"] and table.title == "Agreement with the objects (seg)"
    assert table.lines[0][1][0].interval == "10.00 to 20.00"
    lower = tables.protocol_table(hand_made({"a": [0.5], "b": [0.6]}, {**COLUMN, "higher_is_better": False}), "seg")
    assert [cells[0].best for _, cells in lower.lines] == [True, False]


def test_a_constant_is_never_marked_best():
    results = hand_made({"a": [0.5, 0.7], "b": [0.4, 0.4], "one": [1.0, 1.0]})
    results.summary["methods"]["one"]["reference"] = True
    table = tables.protocol_table(results, "seg")
    assert [cells[0].best for _, cells in table.lines] == [True, False, False]


def test_paired_differences_and_their_direction():
    results = hand_made({"explainer": [0.8, 0.7, 0.9, 0.8], "worse": [0.6, 0.5, 0.7, 0.6], "mixed": [1.0, 0.3, 1.2, math.nan]})
    table = tables.difference_table(results, "seg", "explainer", 200)
    worse, mixed = (cells[0] for _, cells in table.lines)
    assert worse.value == pytest.approx(20) and worse.verdict == "better" and worse.low == pytest.approx(20)
    assert mixed.value == pytest.approx(100 * (-0.2 + 0.4 - 0.3) / 3) and mixed.verdict == ""
    lower = hand_made({"explainer": [0.8, 0.7], "other": [0.6, 0.5]}, {**COLUMN, "higher_is_better": False})
    assert tables.difference_table(lower, "seg", "explainer", 50).lines[0][1][0].verdict == "worse"
    assert tables.difference_table(hand_made({"explainer": [1.0]}), "seg", "explainer") is None


def test_differences_without_raw_rows_and_with_both_scales():
    results = hand_made({"explainer": [0.8, 0.7], "other": [0.6, 0.5]})
    minmax = [replace(r, scale="minmax", values={"iou": r.values["iou"] + 0.1}) for r in results.rows]
    both = Results(results.folder, results.summary, [*results.rows, *minmax])
    table = tables.difference_table(both, "seg", "explainer", 50)
    assert [(label, round(cells[0].value, 6)) for label, cells in table.lines] == [("other", 20), ("other (rescaled)", 10)]
    assert table.caption.startswith("explainer minus")
    rescaled = tables.difference_table(Results(results.folder, results.summary, minmax), "seg", "explainer", 50)
    assert [(label, round(cells[0].value, 6)) for label, cells in rescaled.lines] == [("other (rescaled)", 20)]
    assert rescaled.caption.startswith("explainer (rescaled) minus"), "rescale: minmax leaves no raw rows"


def test_intervals_of_differences_are_resampled_with_the_evaluations_seed():
    values = {"explainer": [0.9, 0.1, 0.8, 0.3, 0.7, 0.2], "other": [0.1, 0.5, 0.3, 0.2, 0.4, 0.6]}

    def bounds(seed):
        results = hand_made(values)
        results.summary["provenance"] = {"config": {"seed": seed}}
        cell = tables.difference_table(results, "seg", "explainer", 40).lines[0][1][0]
        return cell.low, cell.high

    assert bounds(0) == bounds(0) != bounds(7)


def test_results_of_one_kind_of_data_have_names_of_their_own(tmp_path):
    def named(folder, data):
        return Results(folder, {"provenance": {"config": {"data": {"name": data}}}}, [])

    assert named(tmp_path / "street", "voc").name == "street (voc)" and named(tmp_path / "headline_street", "voc").name != "street (voc)"
    assert named(tmp_path / "shapes", "shapes").name == "shapes" and Results(tmp_path / "r", {}, []).name == "r"
    for folder in ("a/results", "b/results"):
        make_results(tmp_path / folder, images=4)
    text = render([tables.load_results(tmp_path / "a/results"), tables.load_results(tmp_path / "b/results")], ".html", bootstrap=0)
    headings = re.findall(r"<h2[^>]*>([^<]*At a glance)</h2>", text)
    assert len(headings) == len(set(headings)) == 2 and "a/results: At a glance" in headings[0]


def test_an_image_where_a_number_is_undefined_is_told():
    results = hand_made({"a": [0.5, 0.7], "b": [0.6, 0.8]})
    results.summary["results"][0]["used"] = 1
    results.summary["protocols"]["seg"]["columns"]["mae"] = {**COLUMN, "title": "MAE", "higher_is_better": None}
    results.summary["results"].append({**results.summary["results"][0], "column": "mae", "used": 2})
    cell = tables.protocol_table(results, "seg").lines[0][1][0]
    assert cell.note == "(n=1)" and cell.text() == "60.00 [10.00, 20.00] (n=1)"


def test_every_form_escapes_names():
    table = Table("k", "A|B_1", "50 % of <b>", ["x & y"], [True], [("m|<i>_{}", [Cell(1.0, best=True)]), ("none", [None])])
    text = tables.markdown(table)
    assert "A\\|B_1" in text and "m\\|&lt;i>" in text and "**1.00**" in text and "<b>" not in text
    assert len({line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("|")}) == 1
    tex = latex(table)
    assert r"m|$<$i$>$\_\{\} & \textbf{1.00} \\" in tex and r"50 \%" in tex and r"x \& y $\uparrow$" in tex and "none & --" in tex
    read = json.loads(tables.as_json([("shapes", table)]))
    assert read[0]["rows"][0]["cells"][0]["value"] == 1.0 and read[0]["rows"][1]["cells"] == [None]
    assert (
        json.loads(tables.as_json([("s", Table("k", "t", "", ["x"], [None], [("m", [Cell(math.inf)])]))]))[0]["rows"][0]["cells"][0][
            "value"
        ]
        == "Infinity"
    )


def test_results_of_a_run_in_every_form(tmp_path, capsys):
    folder = make_results(tmp_path / "results")
    assert (
        main(["report", str(folder), "--out", str(tmp_path / "out" / "report.html"), "--also", "md", "tex", "json", "--bootstrap", "20"])
        == 0
    )
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"report.{kind}") for kind in ("html", "md", "tex", "json")]
    loaded = tables.load_results(folder)
    found = {t.key: t for t in tables.all_tables(loaded, 20)}
    assert {"checks", "insertion_deletion", "insertion_deletion_differences", "masking_matrix", "label_leakage"} <= set(found)
    for line in loaded.summary["results"]:  # each number of the summary that is shown stands in its table
        table, protocol = found[line["protocol"]], loaded.summary["protocols"][line["protocol"]]
        shown = [name for name, c in protocol["columns"].items() if c["shown"]]
        if line["column"] not in shown or line["value"] is None:
            continue
        cell = dict(table.lines)[tables.label_of(line["method"], line["scale"])][shown.index(line["column"])]
        factor = 100 if protocol["columns"][line["column"]]["percent"] else 1
        assert cell.value == pytest.approx(line["value"] * factor)
    checks = dict(found["checks"].lines)
    edges = checks["edges"][found["checks"].header.index("maps change when the classifier's parameters are random")]
    assert edges.verdict == "FAIL"
    assert checks["ground_truth"][-1] is None or checks["ground_truth"][-1].verdict
    assert "<script>" not in (tmp_path / "out" / "report.md").read_text() and EVIL not in (tmp_path / "out" / "report.html").read_text()
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())) == len(found)
    assert render([loaded, loaded], ".md", bootstrap=0).count("### Insertion and deletion\n") == 2
    assert write([folder, folder], tmp_path / "two.html", bootstrap=0) == [tmp_path / "two.html"]


def test_wrong_folders_and_options_are_told(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no results folder"):
        tables.load_results(tmp_path)
    (tmp_path / "summary.json").write_text('{"schema": 99}')
    with pytest.raises(ConfigError, match="summary of this version"):
        tables.load_results(tmp_path)
    for arguments, words in ((["x", "--out", "report.pdf"], ".html"), ([], "results"), (["x", "--bootstrap", "-1"], "bootstrap")):
        assert main(["report", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_every_protocol_has_plain_words():
    known = plugins.discover("explainer.evaluation.protocols")
    assert [name for name, protocol in known.items() if not protocol.heading or not protocol.question] == []
    assert len({protocol.heading for protocol in known.values()}) == len(known)


def test_title_of_a_protocol_without_one_and_of_one_that_is_not_here():
    assert tables.title_of({"protocols": {"own": {"name": "my_protocol"}}}, "own") == ("My protocol (own)", "")
    assert tables.title_of({"protocols": {"my_protocol": {"name": "my_protocol"}}}, "my_protocol") == ("My protocol", "")
