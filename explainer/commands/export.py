"""``explainer export``: a trained Explainer as a file for another runtime, checked against the network in torch."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from explainer import vocabulary
from explainer.commands.arguments import add_classifier_options, number, positive, probability, side
from explainer.commands.parsing import Command, Parser
from explainer.commands.terminal import print_table
from explainer.errors import ConfigError
from explainer.files import parse_json
from explainer.inference.classifier import GivenClassifier
from explainer.inference.outputs import writable_folder
from explainer.locks import claimed

_EXAMPLES = 4  # pictures in the model card


def _size(value: str | tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, str):
        return value
    parts = value.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise argparse.ArgumentTypeError(f"expected a side (224) or HEIGHTxWIDTH (240x320) in pixels, received {value!r}")
    return side(parts[0]), side(parts[-1])


def _formats(value: str | list[str]) -> list[str]:
    if not isinstance(value, str):
        return value
    names, known = [name.strip() for name in value.split(",")], vocabulary.formats()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f". Did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"unknown format {name!r}; known: {', '.join(known)}{hint}")
    return names


def add_options(parser: Parser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="a .ckpt of train.py, or an export folder with model.safetensors")
    parser.add_argument("--out", required=True, help="folder for the file, drift.json and README.md (the model card)")
    parser.add_argument(
        "--format", type=_formats, default=["safetensors"], help=f"one or more, separated by commas: {', '.join(vocabulary.formats())}"
    )
    parser.add_argument(
        "--precision", default="fp32", choices=("fp32", "fp16", "int8"), help="fp16: half-size weights; int8: needs --calibration"
    )
    parser.add_argument("--size", type=_size, help="side, or HEIGHTxWIDTH, the file is fixed to; default: the side it was trained at")
    parser.add_argument("--dynamic_size", action="store_true", help="accept any image size (10-25 %% slower); the batch is always free")
    parser.add_argument("--fused", action="store_true", help="one model: image -> probabilities, class masks, merged mask, areas")
    add_classifier_options(parser, "for --fused, and to measure the change in faithfulness")
    parser.add_argument("--top", type=positive, help="compute the masks of the most probable classes only, this many (--fused)")
    parser.add_argument(
        "--mask_size",
        default="image",
        choices=("image", "decoder"),
        help="decoder: masks stay at the decoder's resolution and are enlarged when they are read: faster (--fused, shared encoder)",
    )
    parser.add_argument("--threshold", type=probability, default=0.5, help="probability from which a class counts as predicted (--fused)")
    parser.add_argument("--calibration", help="folder of images like those the model will see: for int8, and to measure drift on")
    parser.add_argument("--calibration_images", type=positive, default=128, help="how many of them are used")
    parser.add_argument("--tolerance", type=number, help="largest allowed mask difference, instead of the precision's own limits")
    parser.add_argument("--allow_drift", action="store_true", help="write the file even if it drifts further")
    parser.add_argument("--metrics", help="JSON file of numbers for the model card; default: summary.json of the run, if it is there")
    parser.add_argument("--examples", help="folder of images; up to four of them are shown in the model card with their masks")
    parser.add_argument("--runtime", help="folder dist of the npm package onnxruntime-web, copied into the page (--format web)")
    parser.add_argument("--license", help="licence of the weights, for the model card")


def run(_parser: Parser, args: Namespace) -> int:
    """Export; returns the exit code."""
    import explainer
    from explainer.export.exporting import check_formats, export
    from explainer.geometry import height_width
    from explainer.inference.describe import describe, trained_geometry
    from explainer.inference.formats import DEFAULT_SIDE, ExportOptions
    from explainer.inference.pictures import read_calibration

    writable_folder(args.out)
    given = GivenClassifier(args.classifier, args.classifier_options)
    net = explainer.load(args.model, given=given)
    size = args.size or height_width(net.image_size or DEFAULT_SIDE)
    explanandum = given.beside(describe(net))
    calibration = examples = None
    geometry = trained_geometry(net.metadata)
    if args.examples is not None:
        examples = read_calibration(args.examples, size, _EXAMPLES, geometry)
    if args.calibration is not None:
        calibration = read_calibration(args.calibration, size, args.calibration_images, geometry)
    metrics = _metrics(args.metrics, Path(args.model))
    runtime = None if args.runtime is None else Path(args.runtime)
    names = list(dict.fromkeys(args.format))
    check_formats(names, ExportOptions(size, args.dynamic_size, args.precision, calibration, examples, runtime), args.fused)
    with claimed(args.out, "export"):
        for name in names:
            path, report = export(
                net,
                name,
                args.out,
                size=args.size,
                dynamic_size=args.dynamic_size,
                precision=args.precision,
                fused=args.fused,
                explanandum=explanandum,
                threshold=args.threshold,
                top=args.top,
                full_size=args.mask_size == "image",
                calibration=calibration,
                tolerance=args.tolerance,
                allow_drift=args.allow_drift,
                metrics=metrics,
                license=args.license,
                examples=examples,
                runtime=runtime,
            )
            print_table(f"{path}", ["quantity", "value"], [list(row) for row in report.rows()])
    return 0


def _metrics(given: str | None, model: Path) -> dict[str, Any] | None:
    """Numbers for the card: those asked for, or the summary of the run that the checkpoint lies in."""
    path = Path(given) if given is not None else model.resolve().parent.parent / "summary.json"
    if given is None and not (model.suffix == ".ckpt" and path.is_file()):
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--metrics {path} cannot be read ({error}). Give a JSON file with an object of numbers.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"--metrics {path} holds a {type(content).__name__}, expected an object of numbers.")
    content.pop("verdict", None)  # words
    return content


COMMAND = Command("safetensors, ONNX, torch.export, OpenVINO, a web page, a Space or a server's folder, checked", add_options, run)
