"""``explainer srd``: one decision as SRD's map, receptive fields and a tree of feature vectors."""

from __future__ import annotations

from jsonargparse import Namespace

from explainer.commands.arguments import add_classifier_options, positive, side
from explainer.commands.parsing import Command, Parser
from explainer.inference.classifier import classifier_size, open_classifier
from explainer.inference.outputs import writable_folder
from explainer.locks import claimed


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("image", help="one image")
    add_classifier_options(parser, "its decision is explained", required=True)
    parser.add_argument("--class", help="name; default: the class with the highest score")
    parser.add_argument("--layer", help="module path whose strongest vectors are shown; default: the encoder's output")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--vectors", type=positive, default=6, help="vectors of the layer that are shown")
    parser.add_argument("--children", type=positive, default=3, help="of every node of the tree")
    parser.add_argument("--depth", type=positive, default=2, help="levels of vectors below the class")
    parser.add_argument(
        "--ablations", action="store_true", help="beside SRD's map those of its ablations: single neurons, vectors behind the activations"
    )
    parser.add_argument("--data", help="folder of images in which the nearest vectors are looked for")
    parser.add_argument("--neighbors", type=positive, default=3, help="per vector, each from another image")
    parser.add_argument("--limit", type=positive, default=100, help="most images of --data, spread evenly over those found")
    parser.add_argument("--size", type=side, help="side at which the classifier sees images; default: that of its training, or 224")


def run(_parser: Parser, args: Namespace) -> int:
    """Write the folder; returns the exit code."""
    writable_folder(args.out)
    from explainer.look.vectors import Options, write_view

    explanandum = open_classifier(args.classifier, args.classifier_options)
    options = Options(
        class_name=args["class"],
        layer=args.layer,
        vectors=args.vectors,
        children=args.children,
        depth=args.depth,
        ablations=args.ablations,
        data=args.data,
        neighbors=args.neighbors,
        limit=args.limit,
        side=args.size or classifier_size(args.classifier, args.classifier_options),
    )
    with claimed(args.out, "srd"):
        found = write_view(args.image, explanandum, args.out, options)
    print(f"{args.out}/index.html: {found['class']}, probability {found['probability']:.3f}")
    for node in found["children"]:
        print(f"  {node['layer']} ({node['row']}, {node['column']}): share {node['share']:.3f}")
    return 0


COMMAND = Command("one decision as SRD's map, receptive fields and a tree of feature vectors", add_options, run)
