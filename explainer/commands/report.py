"""``explainer report``: one HTML file about results folders, and their tables in other forms."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from explainer.commands.parsing import Command, Parser
from explainer.errors import ConfigError

_SUFFIXES = (".html", ".md", ".tex", ".json")


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.epilog = "Example: explainer report results/shapes results/street --out report.html"
    parser.add_argument("results", nargs="+", help="results folder of an evaluation")
    parser.add_argument("--out", default="report.html", help="file; its ending chooses the form: .html, .md, .tex or .json")
    parser.add_argument("--also", nargs="*", default=[], choices=["md", "tex", "json"], help="further forms, written beside the first")
    parser.add_argument("--title", default="Evaluation report", help="of the page")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples behind the intervals of differences")


def run(_parser: Parser, options: Namespace) -> int:
    """Write the report; returns the exit code."""
    if Path(options.out).suffix not in _SUFFIXES:
        raise ConfigError(f"--out must end in {', '.join(_SUFFIXES)}, received {options.out!r}.")
    if options.bootstrap < 0:
        raise ConfigError(f"--bootstrap must not be negative, received {options.bootstrap}.")
    from explainer.inference.outputs import writable_file
    from explainer.report.write import write

    writable_file(options.out)
    for path in write(options.results, Path(options.out), options.also, options.title, options.bootstrap):
        print(path)
    return 0


COMMAND = Command("report on results folders: one HTML file, and the tables as Markdown, LaTeX and JSON", add_options, run)
