"""``explainer evaluate``: methods x images x protocols -> tables with intervals."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from explainer.commands.parsing import Command, Parser, add_config_options, parse_evaluate, to_config
from explainer.evaluation.config import EvaluateConfig
from explainer.inference.outputs import writable_folder


def add_options(parser: Parser) -> None:
    """Declare the options."""
    add_config_options(parser, EvaluateConfig)


def run(parser: Parser, namespace: Namespace) -> int:
    """Evaluate; returns the exit code."""
    return _run(to_config(parser, namespace, EvaluateConfig), parser.dump(namespace))


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate from Python, with the arguments that stand behind ``explainer evaluate``; returns the exit code.

    Raises:
        ExplainerError: what the command line would print.
    """
    return _run(*parse_evaluate(argv))


def _run(config: EvaluateConfig, resolved: str) -> int:
    writable_folder(config.out)
    from explainer.commands import evaluation

    return evaluation.run(config, resolved)


COMMAND = Command("methods x images x protocols -> tables with intervals", add_options, run)
