"""``explainer randomise CLASSIFIER --out FILE``: parsing only; nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from explainer.errors import ConfigError

SUMMARY = "a copy of a classifier with random parameters, to train an Explainer that has nothing to explain"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of pages of usage."""
        raise ConfigError(f"{message}. See: explainer randomise --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of ``explainer randomise``.

    Raises:
        ConfigError: one is missing or wrong.
    """
    parser = _Parser(
        prog="explainer randomise",
        description=SUMMARY,
        epilog="Then train with --classifier.checkpoint FILE; configs/evaluate/randomised.yaml has all commands in its head.",
    )
    parser.add_argument("classifier", metavar="CLASSIFIER", help="checkpoint of a classifier that was trained with train.py")
    parser.add_argument("--out", required=True, metavar="FILE", help="the copy, e.g. runs/shapes_randomised_classifier.ckpt")
    parser.add_argument("--seed", type=int, default=0, help="of the random parameters (default: 0)")
    parser.add_argument(
        "--size", type=int, help="side of the images on which batch norms are measured again (default: the classifier's input size, or 64)"
    )
    arguments = parser.parse_args(list(argv))
    if Path(arguments.out).suffix != ".ckpt":
        raise ConfigError(f"--out must end in .ckpt, received {arguments.out!r}.")
    if arguments.size is not None and arguments.size < 8:
        raise ConfigError(f"--size must be at least 8 pixels, received {arguments.size}.")
    if Path(arguments.out).exists():
        raise ConfigError(
            f"--out {arguments.out} exists: an Explainer may have been trained against it. Delete it, or choose another name."
        )
    return arguments


def main(argv: Sequence[str]) -> int:
    """Write the copy; returns the exit code."""
    arguments = parse(argv)
    from explainer.evaluation.randomise import randomise_checkpoint

    print(randomise_checkpoint(arguments.classifier, arguments.out, arguments.seed, arguments.size))
    return 0
