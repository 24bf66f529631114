"""``explainer concepts fit|report``: parsing only; nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser

from explainer.commands import arguments
from explainer.commands.concepts_config import ConceptsConfig
from explainer.errors import ConfigError

SUMMARY = "which filters encode which concepts, and how (Net2Vec): fit probes, report them"


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One paragraph instead of pages of usage."""
        raise ConfigError(f"{' '.join(str(message).split())}\nSee all options with: explainer concepts fit --help")


def parse_fit(argv: Sequence[str]) -> ConceptsConfig:
    """Options of ``explainer concepts fit``.

    Raises:
        ConfigError: an unknown option, a value of the wrong kind, no layer, or a number out of range.
    """
    parser = _Parser(prog="explainer concepts fit", description=SUMMARY, default_env=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; later files and options override earlier ones")
    parser.add_class_arguments(ConceptsConfig, as_group=False)
    values = parser.instantiate(parser.parse_args(list(argv)))
    config = ConceptsConfig(**{k: v for k, v in vars(values).items() if k != "config"})
    if not config.layers:
        raise ConfigError("layers is empty: name the modules to probe, e.g. --layers '[features.29]'.")
    if not config.tasks:
        raise ConfigError("tasks is empty: name segmentation, classification or both.")
    if config.train_split == config.val_split:
        raise ConfigError(f"train_split and val_split are both {config.train_split!r}: filters must not be chosen where they are scored.")
    for name, value, least in (("clusters", config.clusters, 1), ("pictures", config.pictures, 0), ("bootstrap", config.bootstrap, 0)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, received {value}.")
    return config


def _report(argv: Sequence[str]) -> int:
    parser = arguments.parser("concepts report", "The page of a folder that explainer concepts fit has written.")
    parser.add_argument("folder", metavar="RESULTS", help="folder of explainer concepts fit")
    parser.add_argument("--out", help="file ending in .html or .md (default: RESULTS/report.html)")
    parser.add_argument("--title", default="Concepts and filters", help="of the page")
    given = parser.parse_args(list(argv))
    out = Path(given.out) if given.out else Path(given.folder) / "report.html"
    if out.suffix not in (".html", ".md"):
        raise ConfigError(f"--out must end in .html or .md, received {str(out)!r}.")
    from explainer.report.concepts import write

    print(write(Path(given.folder), out, given.title))
    return 0


def main(argv: Sequence[str]) -> int:
    """Fit or report; returns the exit code."""
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: explainer concepts fit --config FILE [--option value ...]\n       explainer concepts report RESULTS\n\n{SUMMARY}\n\n"
            "explainer concepts fit --help lists all options."
        )
        return 0
    if not argv or argv[0] not in ("fit", "report"):
        raise ConfigError(
            f"say what to do: explainer concepts fit or explainer concepts report, received {' '.join(argv[:1]) or 'nothing'}."
        )
    if argv[0] == "report":
        return _report(argv[1:])
    config = parse_fit(argv[1:])
    from explainer.commands.concepts_run import run

    return run(config)
