"""Kinds of values and groups of options that several commands share. Imports nothing heavy.

The kinds accept their own results too: the parser checks defaults and values from files by the same functions.
"""

from __future__ import annotations

import argparse
import csv
import math

from explainer.commands.parsing import Parser
from explainer.geometry import LARGEST


def positive(value: str | int) -> int:
    """A whole number of at least 1."""
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text!r}")
    return int(text)


def side(value: str | int) -> int:
    """A side of images in pixels: at most what data sets take, beyond which one image fills the memory."""
    result = positive(value)
    if result > LARGEST:
        raise argparse.ArgumentTypeError(f"expected a side of at most {LARGEST} pixels, received {str(value)!r}")
    return result


def number(value: str | float) -> float:
    """A finite number of at least 0."""
    try:
        result = float(value)
    except ValueError:
        result = math.nan
    if not 0 <= result < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, received {str(value)!r}")
    return result


def probability(value: str | float) -> float:
    """A number from 0 to 1."""
    result = number(value)
    if result > 1:
        raise argparse.ArgumentTypeError(f"expected a probability from 0 to 1, received {str(value)!r}")
    return result


def name_list(value: str | list[str]) -> list[str]:
    """Names separated by commas; one that holds a comma stands in double quotes: ``'"tench, Tinca tinca",goldfish'``."""
    if not isinstance(value, str):
        return value
    names = [name.strip() for row in csv.reader([value], skipinitialspace=True) for name in row if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"expected at least one name, received {value!r}: leave the option out for its default")
    return names


def add_model(parser: Parser) -> None:
    """Declare the trained Explainer, in any of its forms."""
    parser.add_argument("model", help="a .ckpt of train.py, an export folder, or an exported file (.onnx, .pt2, .xml, .safetensors)")


def add_classifier_options(parser: Parser, use: str, required: bool = False) -> None:
    """Declare ``--classifier`` and ``--classifier_options``.

    Args:
        parser: parser of the command.
        use: completes the help text "file of the classifier: ...".
        required: whether the command needs a classifier.
    """
    parser.add_argument("--classifier", required=required, help=f"checkpoint, state_dict or .onnx file of the classifier: {use}")
    parser.add_argument(
        "--classifier_options",
        help="what the classifier's file does not say, as YAML with the keys of `classifier:` in a configuration, task and class_names: "
        "'{arch: timm:resnet50}' for a state_dict, '{task: multiclass, options: {scores: probability}}' for ONNX; default: what the "
        "model knows about it",
    )
