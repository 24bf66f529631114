"""``explainer maps``: maps of one method over a split, kept for evaluation and distillation."""

from __future__ import annotations

from jsonargparse import Namespace

from explainer.commands.maps_config import MapsConfig
from explainer.commands.parsing import Command, Parser, add_config_options, to_config
from explainer.inference.outputs import writable_folder


def add_options(parser: Parser) -> None:
    """Declare the options."""
    add_config_options(parser, MapsConfig)


def run(parser: Parser, namespace: Namespace) -> int:
    """Run the command; returns the exit code."""
    config = to_config(parser, namespace, MapsConfig)
    if config.cache.folder is not None:
        writable_folder(config.cache.folder, "--cache.folder")
    from explainer.commands import filling

    return filling.run(config)


COMMAND = Command("maps of one method over a split, kept for evaluation and distillation", add_options, run)
