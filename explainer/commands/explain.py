"""``explainer explain``: masks, overlays, a contact sheet and numbers for images and folders."""

from __future__ import annotations

import argparse
import sys
from typing import Any, get_args

from jsonargparse import Namespace

from explainer.commands.arguments import add_classifier_options, add_model, name_list, number, positive, probability, side
from explainer.commands.parsing import Command, Parser
from explainer.commands.terminal import print_table
from explainer.errors import ConfigError
from explainer.evaluation.progress import Progress
from explainer.inference.classifier import GivenClassifier, prediction_threshold, require_same_classifier
from explainer.inference.outputs import writable_folder
from explainer.locks import claimed
from explainer.vocabulary import SEARCHES, RefineMethod


def _shares(value: str | list[float]) -> list[float]:
    if not isinstance(value, str):
        return value
    values = [number(part.strip()) for part in value.split(",")]
    if not all(0 < share < 1 for share in values):
        raise argparse.ArgumentTypeError(f"expected shares of the image between 0 and 1 (0.05,0.1,0.2), received {value!r}")
    return sorted(set(values))


def add_options(parser: Parser) -> None:
    """Declare the options."""
    add_model(parser)
    parser.add_argument("images", nargs="+", help="images and folders")
    parser.add_argument("--out", required=True, help="folder for the results")
    parser.add_argument("--classes", type=name_list, help="names, separated by commas")
    add_classifier_options(parser, "gives the scores and chooses the classes")
    parser.add_argument("--batch_size", type=positive, default=8, help="images per step")
    parser.add_argument("--size", type=side, help="side at which the network runs; default: the side it was trained at")
    parser.add_argument(
        "--threshold", type=probability, help="probability from which a class counts as predicted; default: 0.5, or a fused file's own"
    )
    parser.add_argument("--top", type=positive, default=1, help="of a single-label classifier explain the most probable classes, this many")
    parser.add_argument("--area", type=_shares, help="also masks of these shares of the image, e.g. 0.05,0.1,0.2 (.ckpt or .safetensors)")
    parser.add_argument("--on_error", choices=("skip", "raise"), default="skip", help="what an unreadable file does")
    parser.add_argument(
        "--refine", choices=get_args(RefineMethod), help="refine each mask: two searches and a filter that follows the image (--classifier)"
    )
    parser.add_argument("--refine_iterations", type=positive, help="iterations of a search; default: 24")
    parser.add_argument("--refine_budget", type=number, help="seconds per image for a search")
    parser.add_argument("--selector", help="file of `explainer calibrate`: masks below its threshold are refined or withheld")
    parser.add_argument("--threads", type=positive, help="processor threads")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def treatment_of(args: Namespace, explanandum: Any, description: dict[str, Any], threshold: float) -> Any:
    """Refinement and selection, where they are asked for."""
    if args.refine not in SEARCHES and (args.refine_iterations is not None or args.refine_budget is not None):
        name = "--refine_iterations" if args.refine_iterations is not None else "--refine_budget"
        why = (
            "a selector refines exactly as it was calibrated (explainer calibrate --iterations): leave it out"
            if args.selector is not None
            else "name a search: --refine extremal_perturbation"
        )
        raise ConfigError(f"{name} belongs to --refine; {why}.")
    if args.refine is None and args.selector is None:
        return None
    from explainer.fills import judging_fill
    from explainer.inference.selection import Selector
    from explainer.inference.treatment import Treatment

    selector = None if args.selector is None else Selector.load(args.selector)
    fill = judging_fill(description.get("fill"))
    treatment = Treatment(explanandum, args.refine, args.refine_iterations or 24, args.refine_budget, selector, fill)
    if selector is not None:
        selector.require_same_pipeline(description, explanandum, threshold, args.selector)
    return treatment


def run(_parser: Parser, args: Namespace) -> int:
    """Explain; returns the exit code."""
    from explainer.inference.explaining import ExplainOptions, explain
    from explainer.inference.runtime import open_model

    writable_folder(args.out)
    given = GivenClassifier(args.classifier, args.classifier_options)
    runtime = open_model(args.model, args.threads, given)
    explanandum = given.beside(runtime.description)
    notice = require_same_classifier(explanandum, runtime.description, args.model)
    if notice:
        print(notice, file=sys.stderr)
    threshold = prediction_threshold(args.threshold, runtime.description)
    options = ExplainOptions(args.classes, args.batch_size, args.size, threshold, args.on_error, args.area, args.top)
    treatment = treatment_of(args, explanandum, runtime.description, threshold)
    with claimed(args.out, "explain"), Progress(None, not args.quiet, "explaining") as progress:
        found = explain(args.images, runtime, args.out, options, explanandum=explanandum, progress=progress.reach, treatment=treatment)
    apart = sum(not fact.get("covered", True) for row in found["images"] for fact in row.get("treatment", {}).values())
    if apart:
        print(
            f"The selector's guarantee is about predicted classes; {apart} of the masks are of named classes that are not predicted "
            "(results.json: covered false).",
            file=sys.stderr,
        )
    rows = [[row["name"], ", ".join(_class_line(row, c) for c in row["chosen"]) or "none"] for row in found["images"][:20]]
    print_table(f"{args.out}: {len(found['images'])} images, {len(found['failed'])} not readable", ["image", "class and mask area"], rows)
    for name, reason in found["failed"].items():
        print(f"skipped {name}: {reason}")
    for sentence in found["verdict"]:
        print(sentence)
    return 0


def _class_line(row: dict[str, Any], name: str) -> str:
    score = f" (p {row['scores'][name]:.2f})" if row["scores"] else ""
    return f"{name} {row['areas'][name]:.2f}{score}"


COMMAND = Command("class masks, overlays and numbers for images and folders", add_options, run)
