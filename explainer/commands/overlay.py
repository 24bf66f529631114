"""``explainer overlay``: one HTML file; point at a patch and see how similar the classifier's layers find all other patches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from explainer.commands.arguments import add_classifier_options, name_list, positive, side
from explainer.commands.parsing import Command, Parser
from explainer.errors import ConfigError
from explainer.inference.classifier import classifier_size, open_classifier
from explainer.inference.outputs import writable_file

if TYPE_CHECKING:
    from explainer.look.similarity import Beside


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("images", nargs="+", help="images and folders")
    add_classifier_options(parser, "its layers are shown", required=True)
    parser.add_argument("--layers", type=name_list, help="module paths, separated by commas; default: the last feature map")
    parser.add_argument("--out", default="overlay.html", help="file")
    parser.add_argument(
        "--size", type=side, default=None, help="side at which the classifier sees them; default: that of its training, or 224"
    )
    parser.add_argument("--grid", type=positive, default=16, help="most patches a side; finer layers are averaged to it")
    parser.add_argument("--limit", type=positive, default=12, help="most images, spread evenly over those found")
    parser.add_argument("--beside", type=name_list, help="files of further classifiers, separated by commas: their rows on the same page")
    parser.add_argument("--beside_options", type=list[str], help="of each of them as --classifier_options, a YAML list of texts")
    parser.add_argument(
        "--beside_layers", type=list[str], help="of each of them as --layers, a YAML list of texts; default: the last feature map"
    )
    parser.add_argument(
        "--components", type=positive, help="take the patches of each layer apart into so many components (needs the extra components)"
    )
    parser.add_argument("--data", help="folder in which the nearest patches of each patch are looked for")
    parser.add_argument("--data_limit", type=positive, default=200, help="most images of --data, spread evenly over those found")
    parser.add_argument("--neighbors", type=positive, default=12, help="nearest patches, each from another image of --data")
    parser.add_argument(
        "--rotate", type=positive, help="one image turned by 0, so many, ... degrees, with a chart of each patch's similarity"
    )
    parser.add_argument("--disc", action="store_true", help="with --rotate: show the largest disc only")
    parser.add_argument("--zoom", type=positive, help="one image enlarged by 1.35, 1.35 ** 2, ..., so many times, with a chart")
    parser.add_argument("--title", default="Similarity of patches", help="of the page")


def run(_parser: Parser, args: Namespace) -> int:
    """Write the page; returns the exit code."""
    if Path(args.out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out must end in .html, received {args.out!r}.")
    writable_file(args.out)
    from explainer.look.similarity import Options, write_overlay

    if args.disc and args.rotate is None:
        raise ConfigError("--disc belongs to --rotate: add it, or leave --disc out.")
    explanandum = open_classifier(args.classifier, args.classifier_options)
    options = Options(
        layers=args.layers,
        side=args.size or classifier_size(args.classifier, args.classifier_options),
        grid=args.grid,
        limit=args.limit,
        title=args.title,
        beside=_beside(args),
        components=args.components or 0,
        data=args.data,
        data_limit=args.data_limit,
        neighbors=args.neighbors,
        rotate=args.rotate,
        zoom=args.zoom,
        disc=args.disc,
    )
    path = write_overlay(args.images, explanandum, args.out, options)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MB)")
    return 0


def _beside(args: Namespace) -> list[Beside]:
    """The further classifiers, by their file's name (the whole path where two share one)."""
    from explainer.look.similarity import Beside

    files = args.beside or []
    given = {name: getattr(args, name) or [None] * len(files) for name in ("beside_options", "beside_layers")}
    for name, values in given.items():
        if len(values) != len(files):
            raise ConfigError(f"--{name} has {len(values)} entries for {len(files)} classifiers of --beside: give one each.")
    stems = [Path(f).stem for f in files]
    found = []
    for file, stem, options, layers in zip(files, stems, given["beside_options"], given["beside_layers"], strict=True):
        model, side = open_classifier(file, options), args.size or classifier_size(file, options)
        found.append(Beside(stem if stems.count(stem) == 1 else str(file), model, name_list(layers) if layers else None, side))
    return found


COMMAND = Command("a page on which a patch shows how similar a layer finds all other patches", add_options, run)
