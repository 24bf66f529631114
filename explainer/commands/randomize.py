"""``explainer randomize``: a copy of a classifier with random parameters."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from explainer.commands.arguments import side
from explainer.commands.parsing import Command, Parser
from explainer.errors import ConfigError


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.epilog = "Then train with --classifier.checkpoint FILE; configs/evaluate/randomised.yaml has all commands in its head."
    parser.add_argument("classifier", help="checkpoint of a classifier that was trained with train.py")
    parser.add_argument("--out", required=True, metavar="FILE", help="the copy, e.g. runs/shapes_randomised_classifier.ckpt")
    parser.add_argument("--seed", type=int, default=0, help="of the random parameters")
    parser.add_argument(
        "--size",
        type=side,
        help="side of the images on which batch norms are measured again (default: the classifier's input size, or 64)",
    )


def run(_parser: Parser, options: Namespace) -> int:
    """Write the copy; returns the exit code."""
    out = Path(options.out)
    if out.suffix != ".ckpt":
        raise ConfigError(f"--out must end in .ckpt, received {options.out!r}.")
    if options.size is not None and options.size < 8:
        raise ConfigError(f"--size must be at least 8 pixels, received {options.size}.")
    if out.exists():
        raise ConfigError(f"--out {out} exists: an Explainer may have been trained against it. Delete it, or choose another name.")
    from explainer.evaluation.randomize import randomize_checkpoint
    from explainer.inference.outputs import writable_file

    writable_file(out)
    print(randomize_checkpoint(options.classifier, out, options.seed, options.size))
    return 0


COMMAND = Command("a copy of a classifier with random parameters, to train an Explainer that has nothing to explain", add_options, run)
