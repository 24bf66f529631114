"""``explainer overlay``: one HTML file; point at a patch and see how similar the classifier's layers find all other patches."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from explainer.commands.arguments import add_classifier_options, name_list, positive
from explainer.commands.parsing import Command, Parser
from explainer.errors import ConfigError
from explainer.inference.classifier import classifier_size, open_classifier
from explainer.inference.outputs import writable_file


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("images", nargs="+", help="images and folders")
    add_classifier_options(parser, "its layers are shown", required=True)
    parser.add_argument("--layers", type=name_list, help="module paths, separated by commas; default: the last feature map")
    parser.add_argument("--out", default="overlay.html", help="file")
    parser.add_argument(
        "--size", type=positive, default=None, help="side at which the classifier sees them; default: that of its training, or 224"
    )
    parser.add_argument("--grid", type=positive, default=16, help="most patches a side; finer layers are averaged to it")
    parser.add_argument("--limit", type=positive, default=12, help="most images, spread evenly over those found")
    parser.add_argument("--title", default="Similarity of patches", help="of the page")


def run(_parser: Parser, args: Namespace) -> int:
    """Write the page; returns the exit code."""
    if Path(args.out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out must end in .html, received {args.out!r}.")
    writable_file(args.out)
    from explainer.look.similarity import Options, write_overlay

    explanandum = open_classifier(args.classifier, args.classifier_options)
    side = args.size or classifier_size(args.classifier, args.classifier_options)
    path = write_overlay(args.images, explanandum, args.out, Options(args.layers, side, args.grid, args.limit, args.title))
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MB)")
    return 0


COMMAND = Command("a page on which a patch shows how similar a layer finds all other patches", add_options, run)
