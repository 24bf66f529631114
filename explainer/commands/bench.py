"""``explainer bench``: latency, throughput and memory of exported models and of the classifier alone, paired in one run."""

from __future__ import annotations

from jsonargparse import Namespace

from explainer.commands.arguments import add_classifier_options, positive, side
from explainer.commands.parsing import Command, Parser
from explainer.commands.terminal import print_table
from explainer.evaluation.progress import Progress
from explainer.files import write_json
from explainer.inference.classifier import GivenClassifier
from explainer.inference.outputs import writable_file


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("models", nargs="*", help="checkpoints, export folders (all their files) and exported files")
    add_classifier_options(parser, "last row, to which the others are compared")
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="batch sizes")
    parser.add_argument("--repeats", type=positive, default=11, help="timed rounds")
    parser.add_argument("--threads", type=positive, default=1, help="processor threads")
    parser.add_argument("--size", type=side, help="side for models that take any size")
    parser.add_argument("--out", help="JSON file for the numbers")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(_parser: Parser, args: Namespace) -> int:
    """Measure; returns the exit code."""
    from explainer.commands.measuring import bench, contestants, describe_first, table

    if args.out:
        writable_file(args.out)
    given = GivenClassifier(args.classifier, args.classifier_options)
    explanandum = given.beside(describe_first(args.models, given) if args.classifier is not None else None)
    rivals = contestants(args.models, args.threads, explanandum, args.size, given)
    with Progress(None, not args.quiet, "measuring") as progress:
        report = bench(rivals, args.batch, args.repeats, args.threads, progress.reach)
    head, *rows = table(report)
    load = report.load["before"]
    busy = f"load {load[0]} before, {report.load['after'][0]} after" if load and report.load["after"] else "load unknown"
    print_table(f"{report.threads} thread(s), {report.cores} cores, {busy}, medians of {report.repeats}", head, rows)
    if args.out:
        write_json(args.out, report.as_dict())
    return 0


COMMAND = Command("latency, throughput and memory of exported models and of the classifier", add_options, run)
