"""``explainer channels``: which channels of a layer keep a decision, where they act, and what they stand for."""

from __future__ import annotations

import argparse

from jsonargparse import Namespace

from explainer.commands.arguments import add_classifier_options, name_list, number, positive, side
from explainer.commands.parsing import Command, Parser
from explainer.inference.classifier import classifier_size, open_classifier
from explainer.inference.outputs import writable_folder
from explainer.locks import claimed


def areas(value: str | list[float]) -> list[float]:
    """Fractions of the channels below 1, or numbers of channels, separated by commas."""
    found = [number(v) for v in (value.split(",") if isinstance(value, str) else value)]
    if not found or any(v == 0 or (v > 1 and v != int(v)) for v in found):
        raise argparse.ArgumentTypeError(f"expected fractions in (0,1), or whole numbers of channels, received {value!r}")
    return found


def whole(value: str | int) -> int:
    """A whole number of at least 0."""
    if not str(value).isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, received {str(value)!r}")
    return int(value)


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("images", nargs="+", help="images and folders")
    add_classifier_options(parser, "its decisions are explained", required=True)
    parser.add_argument("--classes", type=name_list, help="names, separated by commas; default: of each image the best")
    parser.add_argument("--layer", help="module path; default: the last feature map")
    parser.add_argument("--out", required=True, help="folder for the sheets")
    parser.add_argument(
        "--areas", type=areas, help="how many channels a mask keeps: fractions or numbers; default: 0.01,0.02,0.05,0.1,0.2,0.4,0.8"
    )
    parser.add_argument("--iterations", type=positive, default=300, help="of the search of a mask")
    parser.add_argument("--top", type=whole, default=3, help="channels an image and class that are inverted by themselves")
    parser.add_argument("--prior", choices=["fourier", "pixel"], default="fourier", help="what keeps an inversion like a photograph")
    parser.add_argument(
        "--objective", choices=["dot", "match"], default="dot", help="an inversion's inner product with the features, or distance from them"
    )
    parser.add_argument("--steps", type=positive, help="of an inversion; default: 512 (fourier) or 200 (pixel)")
    parser.add_argument("--seed", type=whole, default=0, help="of the inversions")
    parser.add_argument("--limit", type=positive, default=12, help="most images, spread evenly over those found")
    parser.add_argument("--size", type=side, help="side at which the classifier sees images; default: that of its training, or 224")


def run(_parser: Parser, args: Namespace) -> int:
    """Write the folder; returns the exit code."""
    writable_folder(args.out)
    from explainer.look.channels import AREAS, Options, write_sheets

    explanandum = open_classifier(args.classifier, args.classifier_options)
    options = Options(
        classes=args.classes,
        layer=args.layer,
        areas=args.areas or AREAS,
        iterations=args.iterations,
        top=args.top,
        prior=args.prior,
        objective=args.objective,
        steps=args.steps,
        seed=args.seed,
        limit=args.limit,
        side=args.size or classifier_size(args.classifier, args.classifier_options),
    )
    with claimed(args.out, "channels"):
        found = write_sheets(args.images, explanandum, args.out, options)
    for row in found["decisions"]:
        kept = f"{row['kept']} of {found['channels']} channels" + ("" if row["reached"] else ", no area suffices")
        print(f"{args.out}/{row['sheet']}: {row['class']}, {kept}, top {', '.join(map(str, row['top'])) or 'none'}")
    return 0


COMMAND = Command("which channels of a layer keep a decision, and what they stand for", add_options, run)
