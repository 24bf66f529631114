"""What users typed for version 0.1 in British spelling still works: commands, options, protocols, a method's options, metrics."""

from __future__ import annotations

import pytest
from torch import nn

from explainer import Explanandum, baselines, plugins
from explainer.cli import COMMANDS
from explainer.commands.parsing import parse
from explainer.evaluation.protocol import build_protocol, parse_protocols
from explainer.metrics.base import PerImageMetric
from explainer.report.tables import title_of


def test_command_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    command, _, options = parse(COMMANDS, ["randomise", "c.ckpt", "--out", "o.ckpt"])
    assert command is COMMANDS["randomize"] and options.classifier == "c.ckpt"
    _, _, options = parse(COMMANDS, ["export", "c.ckpt", "--out", "folder", "--licence=MIT"])
    assert options.license == "MIT"
    _, _, options = parse(COMMANDS, ["srd", "a.png", "--classifier", "c.ckpt", "--out", "o", "--neighbours", "3"])
    assert options.neighbors == 3
    assert capsys.readouterr().err == "", "no note: both spellings are right"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("binarised", "binarized"),
        ("data_randomisation", "data_randomization"),
        ("localisation", "localization"),
        ("parameter_randomisation", "parameter_randomization"),
        ("randomised_classifier", "randomized_classifier"),
    ],
)
def test_protocols_keep_the_label_that_was_typed(old: str, new: str) -> None:
    built = parse_protocols([old], "corrected")
    assert list(built) == [old] and built[old].name == new and type(built[old]) is type(build_protocol(new, None, "corrected"))
    # Rows of an older evaluation say the old name; their table has the title of the new one.
    for name in (old, new):
        assert title_of({"protocols": {old: {"name": name}}}, old) == (built[old].heading, built[old].question)


def test_options_of_methods_and_names_of_metrics() -> None:
    classifier = Explanandum(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), num_classes=2)
    assert baselines.build("igos_pp", classifier, optimiser="nesterov").optimizer == "nesterov"
    assert PerImageMetric("attribution_localisation").name == "attribution_localization"
    assert plugins.find("explainer.metrics", "attribution_localisation").name == "attribution_localization"
