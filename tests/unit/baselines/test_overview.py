"""The table of methods, which the guide shows, says what the code's verified facts say."""

from explainer.baselines.overview import overview


def test_facts_are_stated():
    rows = {row[0]: row for row in overview()}
    assert rows["rise"][1] == "no" and rows["rise"][6] == "yes"
    assert rows["grad_cam"][1:3] == ("yes", "layer")
    assert [name for name, row in rows.items() if row[3] == "none"] == ["centre", "constant", "edges", "ground_truth", "random"]
