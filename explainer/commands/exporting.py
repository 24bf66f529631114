"""``explainer export | explain | bench``: arguments only. Importing this module imports neither torch nor a runtime."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from explainer.commands.arguments import name_list, number, parser, positive
from explainer.errors import ConfigError
from explainer.export.formats import format_names
from explainer.inference.classifier import add_classifier_options, open_classifier, prediction_threshold, require_same_classifier
from explainer.inference.outputs import writable_file, writable_folder
from explainer.inference.refine_method import SEARCHES, RefineMethod


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"expected a side (224) or HEIGHTxWIDTH (240x320) in pixels, received {text!r}")
    return int(parts[0]), int(parts[-1])


def _shares(text: str) -> list[float]:
    values = [number(part.strip()) for part in text.split(",")]
    if not all(0 < value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"expected shares of the image between 0 and 1 (0.05,0.1,0.2), received {text!r}")
    return sorted(set(values))


def _formats(text: str) -> list[str]:
    names, known = [name.strip() for name in text.split(",")], format_names()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f". Did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"unknown format {name!r}; known: {', '.join(known)}{hint}")
    return names


def export_parser() -> argparse.ArgumentParser:
    """Options of ``explainer export``."""
    p = parser("export", "Write a trained Explainer for another runtime, and check it against the network in torch.")
    p.add_argument("model", help="a .ckpt of train.py, or an export folder with model.safetensors")
    p.add_argument("--out", required=True, help="folder for the file, drift.json and README.md (the model card)")
    p.add_argument(
        "--format", type=_formats, default=["safetensors"], help=f"one or more, separated by commas: {', '.join(format_names())}"
    )
    p.add_argument(
        "--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="fp16: half-size weights; int8: needs --calibration"
    )
    p.add_argument("--size", type=_size, help="side, or HEIGHTxWIDTH, the file is fixed to; default: the side it was trained at")
    p.add_argument("--dynamic-size", action="store_true", help="accept any image size (10-25 %% slower); the batch size is always free")
    p.add_argument("--fused", action="store_true", help="one model: image -> probabilities, class masks, merged mask, areas")
    add_classifier_options(p, "for --fused, and to measure the change in faithfulness")
    p.add_argument("--threshold", type=number, default=0.5, help="probability from which a class counts as predicted (--fused)")
    p.add_argument("--calibration", help="folder of images like those the model will see: for int8, and to measure drift on")
    p.add_argument("--calibration-images", type=positive, default=128, help="how many of them are used")
    p.add_argument("--tolerance", type=number, help="largest allowed mask difference, instead of the precision's own limits")
    p.add_argument("--allow-drift", action="store_true", help="write the file even if it drifts further")
    p.add_argument("--metrics", help="JSON file of numbers for the model card; default: summary.json of the run, if it is there")
    p.add_argument("--licence", help="licence of the weights, for the model card")
    return p


def export_command(argv: Sequence[str]) -> int:
    """``explainer export``."""
    args = export_parser().parse_args(argv)
    import explainer
    from explainer.export.describe import describe, trained_geometry
    from explainer.export.exporting import DEFAULT_SIDE, export
    from explainer.inference.pictures import read_calibration

    writable_folder(args.out)
    net = explainer.load(args.model)
    side = net.image_size or DEFAULT_SIDE
    explanandum = open_classifier(args.classifier, args.classifier_options, describe(net))
    calibration = None
    if args.calibration is not None:
        geometry = trained_geometry(net.metadata)
        calibration = read_calibration(args.calibration, args.size or (side, side), args.calibration_images, geometry)
    metrics = _metrics(args.metrics, Path(args.model))
    for name in dict.fromkeys(args.format):
        path, report = export(
            net, name, args.out, size=args.size, dynamic_size=args.dynamic_size, precision=args.precision, fused=args.fused,
            explanandum=explanandum, threshold=args.threshold, calibration=calibration, tolerance=args.tolerance,
            allow_drift=args.allow_drift, metrics=metrics, licence=args.licence,
        )  # fmt: skip
        _print_table(f"{path}", ["quantity", "value"], [list(row) for row in report.rows()])
    return 0


def explain_parser() -> argparse.ArgumentParser:
    """Options of ``explainer explain``."""
    p = parser("explain", "Masks, overlays, a contact sheet and numbers for images (frames of a video: extract them as files first).")
    p.add_argument("model", help="a .ckpt of train.py, an export folder, or an exported file (.onnx, .pt2, .xml, .safetensors)")
    p.add_argument("images", nargs="+", help="images and folders")
    p.add_argument("--out", required=True, help="folder for the results")
    p.add_argument("--classes", type=name_list, help="names, separated by commas")
    add_classifier_options(p, "gives the scores and chooses the classes")
    p.add_argument("--batch-size", type=positive, default=8)
    p.add_argument("--size", type=positive, help="side at which the network runs; default: the side it was trained at")
    p.add_argument(
        "--threshold", type=number, help="probability from which a class counts as predicted; default: 0.5, or a fused file's own"
    )
    p.add_argument("--area", type=_shares, help="also masks of these shares of the image, e.g. 0.05,0.1,0.2 (.ckpt or .safetensors)")
    p.add_argument("--on-error", choices=("skip", "raise"), default="skip", help="what an unreadable file does")
    p.add_argument(
        "--refine", choices=get_args(RefineMethod), help="refine each mask: two searches and a filter that follows the image (--classifier)"
    )
    p.add_argument("--refine-iterations", type=positive, help="iterations of a search (default: 24)")
    p.add_argument("--refine-budget", type=number, help="seconds per image for a search")
    p.add_argument("--selector", help="file of `explainer calibrate`: masks below its threshold are refined or withheld (--classifier)")
    p.add_argument("--threads", type=positive, help="processor threads")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def _treatment(args: argparse.Namespace, explanandum: Any, description: dict[str, Any], threshold: float) -> Any:
    """Refinement and selection, where they are asked for."""
    if args.refine not in SEARCHES and (args.refine_iterations is not None or args.refine_budget is not None):
        name = "--refine-iterations" if args.refine_iterations is not None else "--refine-budget"
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


def explain_command(argv: Sequence[str]) -> int:
    """``explainer explain``."""
    args = explain_parser().parse_args(argv)
    from explainer.inference.explaining import ExplainOptions, explain
    from explainer.inference.runtime import open_model

    writable_folder(args.out)
    runtime = open_model(args.model, args.threads)
    explanandum = open_classifier(args.classifier, args.classifier_options, runtime.description)
    notice = require_same_classifier(explanandum, runtime.description, args.model)
    if notice:
        print(notice, file=sys.stderr)
    threshold = prediction_threshold(args.threshold, runtime.description)
    options = ExplainOptions(args.classes, args.batch_size, args.size, threshold, args.on_error, args.area)
    treatment = _treatment(args, explanandum, runtime.description, threshold)
    with _Bar("explaining", args.quiet) as progress:
        found = explain(args.images, runtime, args.out, options, explanandum, progress, treatment)
    apart = sum(not fact.get("covered", True) for row in found["images"] for fact in row.get("treatment", {}).values())
    if apart:
        print(
            f"The selector's guarantee is about predicted classes; {apart} of the masks are of named classes that are not predicted "
            "(results.json: covered false).",
            file=sys.stderr,
        )
    rows = [[row["name"], ", ".join(_class_line(row, c) for c in row["chosen"]) or "none"] for row in found["images"][:20]]
    _print_table(f"{args.out}: {len(found['images'])} images, {len(found['failed'])} not readable", ["image", "class and mask area"], rows)
    for name, reason in found["failed"].items():
        print(f"skipped {name}: {reason}")
    return 0


def _class_line(row: dict[str, Any], name: str) -> str:
    score = f" (p {row['scores'][name]:.2f})" if row["scores"] else ""
    return f"{name} {row['areas'][name]:.2f}{score}"


def bench_parser() -> argparse.ArgumentParser:
    """Options of ``explainer bench``."""
    p = parser("bench", "Latency, throughput and memory of exported models and of the classifier alone, paired in one run.")
    p.add_argument("models", nargs="*", help="checkpoints, export folders (all their files) and exported files")
    add_classifier_options(p, "last row, to which the others are compared")
    p.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="batch sizes")
    p.add_argument("--repeats", type=positive, default=11, help="timed rounds")
    p.add_argument("--threads", type=positive, default=1, help="processor threads")
    p.add_argument("--size", type=positive, help="side for models that take any size")
    p.add_argument("--out", help="JSON file for the numbers")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def bench_command(argv: Sequence[str]) -> int:
    """``explainer bench``."""
    args = bench_parser().parse_args(argv)
    from explainer.inference.bench import bench, contestants, describe_first, table

    if args.out:
        writable_file(args.out)
    description = describe_first(args.models) if args.classifier is not None else None
    explanandum = open_classifier(args.classifier, args.classifier_options, description)
    rivals = contestants(args.models, args.threads, explanandum, args.size)
    with _Bar("measuring", args.quiet) as progress:
        report = bench(rivals, args.batch, args.repeats, args.threads, progress)
    head, *rows = table(report)
    load = report.load["before"]
    busy = f"load {load[0]} before, {report.load['after'][0]} after" if load and report.load["after"] else "load unknown"
    _print_table(f"{report.threads} thread(s), {report.cores} cores, {busy}, medians of {report.repeats}", head, rows)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(report.as_dict(), indent=1) + "\n")
    return 0


def _metrics(given: str | None, model: Path) -> dict[str, Any] | None:
    """Numbers for the card: those asked for, or the summary of the run that the checkpoint lies in."""
    path = Path(given) if given is not None else model.resolve().parent.parent / "summary.json"
    if given is None and not (model.suffix == ".ckpt" and path.is_file()):
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--metrics {path} cannot be read ({error}). Give a JSON file with an object of numbers.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--metrics {path} holds a {type(content).__name__}, expected an object of numbers.")
    return content


def _print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


class _Bar:
    """A progress bar as a callable ``(done, total)``."""

    def __init__(self, label: str, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), disable=quiet)
        self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
