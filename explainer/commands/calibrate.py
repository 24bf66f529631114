"""``explainer calibrate``: quality score from which explanations are given, with a guarantee."""

from __future__ import annotations

from jsonargparse import Namespace

from explainer.commands.calibrate_config import CalibrateConfig
from explainer.commands.parsing import Command, Parser, add_config_options, to_config


def add_options(parser: Parser) -> None:
    """Declare the options."""
    add_config_options(parser, CalibrateConfig)


def run(parser: Parser, namespace: Namespace) -> int:
    """Run the command; returns the exit code."""
    config = to_config(parser, namespace, CalibrateConfig)
    from explainer.commands import calibration

    return calibration.run(config)


COMMAND = Command("quality score from which explanations are given, with a guarantee", add_options, run)
