"""The README's table of methods is the one that the code's verified facts give."""

from pathlib import Path

from explainer.baselines.overview import markdown, overview


def test_readme_table_is_current():
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    missing = [line for line in markdown().splitlines() if line not in readme]
    advice = "README.md, section Methods: replace the table by the output of `explainer methods`; changed lines: "
    assert not missing, advice + "; ".join(missing)


def test_facts_are_stated():
    rows = {row[0]: row for row in overview()}
    assert rows["rise"][1] == "no" and rows["rise"][6] == "yes"
    assert rows["grad_cam"][1:3] == ("yes", "layer")
    assert [name for name, row in rows.items() if row[3] == "none"] == ["centre", "constant", "edges", "ground_truth", "random"]
