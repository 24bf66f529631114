"""``explainer methods``: what each per-image method needs and costs, the options it takes, and the classifiers it works on."""

from __future__ import annotations

import sys

from jsonargparse import Namespace

from explainer import vocabulary
from explainer.commands.arguments import name_list
from explainer.commands.parsing import Command, Parser
from explainer.errors import ConfigError


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("--options", metavar="NAME", help="print this method's options with their defaults, as YAML for a configuration")
    parser.add_argument(
        "--matrix", action="store_true", help="try every method on a small random network of every family of classifiers (minutes)"
    )
    parser.add_argument("--families", type=name_list, help="with --matrix: these families only, separated by commas; default: all")
    parser.add_argument("--out", help="with --matrix: file for the table, .md or .json; default: print it")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(_parser: Parser, options: Namespace) -> int:
    """Print the table, one method's options, or the matrix; returns the exit code: 1 where a cell of the matrix is an error."""
    if options.matrix:
        return _matrix(options)
    for given in ("families", "out"):
        if getattr(options, given) is not None:
            raise ConfigError(f"--{given} belongs to --matrix: add it, or leave --{given} out.")
    if options.options is not None and options.options not in vocabulary.methods():
        import difflib

        close = difflib.get_close_matches(options.options, vocabulary.methods(), n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"--options {options.options}: there is no such method.{hint} `explainer methods` lists all.")
    from explainer.baselines.overview import markdown, options_as_yaml

    print(markdown() if options.options is None else options_as_yaml(options.options))
    return 0


def _matrix(options: Namespace) -> int:
    """Compute the matrix, write or print it."""
    from pathlib import Path

    from explainer.commands import matrix
    from explainer.evaluation.progress import Progress
    from explainer.files import write_text
    from explainer.inference.outputs import writable_file

    if options.out is not None:
        if Path(options.out).suffix not in (".md", ".json"):
            raise ConfigError(f"--out must end in .md or .json, received {options.out}.")
        writable_file(options.out)
    with Progress(None, not options.quiet, "methods x families") as progress:
        found = matrix.compute(options.families, progress=progress.reach)
    chosen = "" if options.families is None else f' --families "{",".join(options.families)}"'
    if options.out is None:
        print(matrix.markdown(found))
    elif options.out.endswith(".json"):
        write_text(options.out, matrix.as_json(found) + "\n")
    else:
        write_text(options.out, matrix.page(found, f"explainer methods --matrix{chosen} --out {options.out}"))
    faults = [(f, n, c.reason) for f, row in found.items() for n, c in row.items() if c.status == "error"]
    for family, name, reason in faults:
        print(f"error: {name} on {family}: {reason}", file=sys.stderr)
    return 1 if faults else 0


COMMAND = Command("all per-image methods with what each needs and costs", add_options, run)
