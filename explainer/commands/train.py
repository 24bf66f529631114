"""``explainer fit | validate | test | predict``."""

from __future__ import annotations

import functools

from jsonargparse import Namespace

from explainer.commands.parsing import Command, Parser, add_run_options, to_run


def fit(parser: Parser, namespace: Namespace) -> int:
    """Train; returns the exit code."""
    config, rest = to_run(parser, namespace)
    from explainer.commands.fit import FitRequest, fit

    return fit(FitRequest(config, rest.ckpt_path, rest.resolved, rest.overwrite))


def use(command: str, parser: Parser, namespace: Namespace) -> int:
    """Validate, test or predict with a run's checkpoint; returns the exit code."""
    config, rest = to_run(parser, namespace)
    from explainer.commands.validate import run

    return run(command, config, rest.ckpt_path)


_options = functools.partial(add_run_options, fit=False)
COMMANDS = {
    "fit": Command("train; resume with --ckpt_path last (or auto: if there is one)", functools.partial(add_run_options, fit=True), fit),
    "validate": Command("losses and metrics on the validation split", _options, functools.partial(use, "validate")),
    "test": Command("losses and metrics on the test split", _options, functools.partial(use, "test")),
    "predict": Command("write masks (or logits) of the test split as .npz", _options, functools.partial(use, "predict")),
}
