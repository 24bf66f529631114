"""``explainer methods``: what each per-image method needs and costs, and the options it takes."""

from __future__ import annotations

from jsonargparse import Namespace

from explainer import vocabulary
from explainer.commands.parsing import Command, Parser
from explainer.errors import ConfigError


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("--options", metavar="NAME", help="print this method's options with their defaults, as YAML for a configuration")


def run(_parser: Parser, options: Namespace) -> int:
    """Print the table, or one method's options; returns the exit code."""
    if options.options is not None and options.options not in vocabulary.methods():
        import difflib

        close = difflib.get_close_matches(options.options, vocabulary.methods(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--options {options.options}: there is no such method.{hint} `explainer methods` lists all.")
    from explainer.baselines.overview import markdown, options_as_yaml

    print(markdown() if options.options is None else options_as_yaml(options.options))
    return 0


COMMAND = Command("all per-image methods with what each needs and costs", add_options, run)
