"""``explainer concepts fit | report``: which filters encode which concepts (Net2Vec)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from explainer.commands.concepts_config import ConceptsConfig
from explainer.commands.parsing import Command, Group, Parser, add_config_options, command_parser, to_config, with_underscores
from explainer.errors import ConfigError


def _add_fit_options(parser: Parser) -> None:
    add_config_options(parser, ConceptsConfig)


def to_concepts(parser: Parser, namespace: Namespace) -> ConceptsConfig:
    """The configuration from parsed options.

    Raises:
        ConfigError: no layer, no task, or a number out of range.
    """
    config = to_config(parser, namespace, ConceptsConfig)
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


def parse_fit(argv: Sequence[str]) -> ConceptsConfig:
    """Options of ``explainer concepts fit`` from Python."""
    parser = command_parser(FIT, "explainer concepts fit")
    return to_concepts(parser, parser.parse_args(with_underscores(parser, argv)))


def _fit(parser: Parser, namespace: Namespace) -> int:
    config = to_concepts(parser, namespace)
    from explainer.commands.concepts_run import run
    from explainer.inference.outputs import writable_folder

    writable_folder(config.out)
    return run(config)


def _add_report_options(parser: Parser) -> None:
    parser.add_argument("folder", help="folder of explainer concepts fit")
    parser.add_argument("--out", help="file ending in .html or .md; default: report.html in the folder")
    parser.add_argument("--title", default="Concepts and filters", help="of the page")


def _report(_parser: Parser, options: Namespace) -> int:
    out = Path(options.out) if options.out else Path(options.folder) / "report.html"
    if out.suffix not in (".html", ".md"):
        raise ConfigError(f"--out must end in .html or .md, received {str(out)!r}.")
    from explainer.inference.outputs import writable_file
    from explainer.report.concepts import write

    writable_file(out)
    print(write(Path(options.folder), out, options.title))
    return 0


FIT = Command("fit probes to filters, and store what they say", _add_fit_options, _fit)
GROUP = Group(
    "which filters encode which concepts, and how (Net2Vec)",
    {
        "fit": FIT,
        "report": Command("the page of a folder that concepts fit has written", _add_report_options, _report),
    },
)
