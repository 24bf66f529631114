"""``explainer report RESULTS... --out FILE``: parsing only; nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from explainer.errors import ConfigError

SUMMARY = "report on results folders: one HTML file, and the tables as Markdown, LaTeX and JSON"
_SUFFIXES = (".html", ".md", ".tex", ".json")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of pages of usage."""
        raise ConfigError(f"{message}. See: explainer report --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of ``explainer report``.

    Raises:
        ConfigError: no results folder, or an output of another kind.
    """
    parser = _Parser(
        prog="explainer report", description=SUMMARY, epilog="Example: explainer report results/shapes results/street --out report.html"
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results folder of an evaluation")
    parser.add_argument(
        "--out", default="report.html", help="file; its ending chooses the form: .html, .md, .tex or .json (default: report.html)"
    )
    parser.add_argument("--also", nargs="*", default=[], choices=["md", "tex", "json"], help="further forms, written beside the first")
    parser.add_argument("--title", default="Evaluation report", help="of the page")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples behind the intervals of differences (default: 1000)")
    arguments = parser.parse_args(list(argv))
    if Path(arguments.out).suffix not in _SUFFIXES:
        raise ConfigError(f"--out must end in {', '.join(_SUFFIXES)}, received {arguments.out!r}.")
    if arguments.bootstrap < 0:
        raise ConfigError(f"--bootstrap must not be negative, received {arguments.bootstrap}.")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Write the report; returns the exit code."""
    arguments = parse(argv)
    from explainer.report.write import write

    for path in write(arguments.results, Path(arguments.out), arguments.also, arguments.title, arguments.bootstrap):
        print(path)
    return 0
