"""``explainer serve | overlay``: arguments only. Importing this module does not import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explainer.arguments import name_list, number, parser, positive
from explainer.errors import ConfigError

_OPTIONS_HELP = (
    "what the classifier's file does not say, as YAML with the keys of `classifier:` in a configuration and task, e.g. "
    "'{arch: vgg16, num_classes: 20}' for a state_dict, '{task: multiclass, options: {scores: probability}}' for ONNX"
)


def serve_parser() -> argparse.ArgumentParser:
    """Options of ``explainer serve``."""
    p = parser("serve", "A local web page: drop an image; probabilities, masks per class, threshold, comparison, PNG files.")
    p.add_argument("model", help="a .ckpt of train.py, an export folder, or an exported file (.onnx, .pt2, .xml, .safetensors)")
    p.add_argument("--classifier", help="checkpoint (or .onnx file) of the explained classifier: gives probabilities and comparisons")
    p.add_argument("--classifier-options", help=_OPTIONS_HELP)
    p.add_argument("--compare", type=name_list, help="methods to offer, of `explainer methods`, and refined; default: grad_cam,srd,refined")
    p.add_argument("--refine-budget", type=number, default=20.0, help="seconds for a refined mask (default: 20)")
    p.add_argument("--size", type=positive, help="side at which the network runs; default: the side it was trained at")
    p.add_argument("--threshold", type=number, default=0.5, help="probability from which a class counts as predicted")
    p.add_argument("--threads", type=positive, help="processor threads")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is reachable from this machine alone")
    p.add_argument("--allow-host", action="append", default=[], help="a further name under which the page may be opened (with --host)")
    p.add_argument("--port", type=int, default=7860, help="0: any free one")
    p.add_argument("--max-megabytes", type=number, default=20.0, help="largest file (default: 20)")
    p.add_argument("--max-megapixels", type=number, default=25.0, help="largest picture (default: 25)")
    return p


def serve_command(argv: Sequence[str]) -> int:
    """``explainer serve``."""
    args = serve_parser().parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port must lie in 0..65535, received {args.port}.")
    server = make_server(args)
    try:
        if not server.loopback:
            print("Anyone who can reach this machine on the network can use the page: there is no password.", file=sys.stderr)
        print(f"{server.title}: open {server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        print("ended")
    finally:
        server.server_close()
    return 0


def make_server(args: argparse.Namespace) -> Any:
    """The server of parsed arguments, listening but not yet answering."""
    from explainer.export.runtime import open_model
    from explainer.look.server import Server
    from explainer.look.uploads import Uploads

    runtime = open_model(args.model, args.threads)
    explanandum = open_classifier(args.classifier, args.classifier_options, runtime.classes, runtime.description.get("task"))
    notice, expected = "", runtime.description.get("explained_classifier")
    if explanandum is not None and expected is not None:
        if explanandum.differentiable:
            explanandum.require_fingerprint(expected, args.model)
        elif explanandum.fingerprint() != expected:
            notice = "Whether this classifier is the one that the model explains cannot be checked: it gives scores only."
    uploads = Uploads(
        runtime, explanandum, args.compare, args.size, args.threshold, int(args.max_megapixels * 1e6), refine_budget=args.refine_budget
    )
    return Server(uploads, args.host, args.port, int(args.max_megabytes * 2**20), _title(args.model), notice, tuple(args.allow_host))


def _title(model: str) -> str:
    """A model's name for people: ``runs/NAME/checkpoints/best.ckpt`` is NAME."""
    path = Path(model).resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.parent.name if path.stem == "model" else path.name


def open_classifier(path: str | None, options: str | None, class_names: Sequence[str] | None = None, task: str | None = None) -> Any:
    """The classifier in a checkpoint or an ONNX file; None without path.

    Args:
        options: YAML of what the file does not say.
        class_names: of the model it belongs to, or None if unknown.
        task: of that model, likewise.
    """
    given = _mapping(options)
    if path is None:
        if given:
            raise ConfigError("--classifier-options describes a classifier: name its file with --classifier.")
        return None
    from explainer.models.checkpoints import load_explanandum

    known: dict[str, Any] = {} if task is None else {"task": task}
    if class_names is not None:
        known |= {"class_names": list(class_names), "num_classes": len(class_names)}
    if str(path).endswith(".onnx"):
        return load_explanandum(None, **{**known, **given, "arch": f"onnx:{path}"})
    try:
        return load_explanandum(path, **{**known, **given})
    except TypeError as error:
        raise ConfigError(f"--classifier-options has a key of another kind ({error}).") from error


def _mapping(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--classifier-options is not valid YAML ({' '.join(str(error).split())}).") from error
    keys = ("arch", "options", "num_classes", "task", "class_names", "mean", "std", "input_size")
    if not isinstance(values, dict) or (unknown := [k for k in values if k not in keys]):
        wrong = f"the key {unknown[0]!r}" if isinstance(values, dict) else repr(values)
        raise ConfigError(f"--classifier-options must be a mapping with keys of {', '.join(keys)}; received {wrong}.")
    return values


def overlay_parser() -> argparse.ArgumentParser:
    """Options of ``explainer overlay``."""
    p = parser("overlay", "One HTML file: point at a patch and see how similar the classifier's layers find all other patches.")
    p.add_argument("images", nargs="+", help="images and folders")
    p.add_argument("--classifier", required=True, help="checkpoint of a classifier")
    p.add_argument("--classifier-options", help=_OPTIONS_HELP)
    p.add_argument("--layers", type=name_list, help="module paths, separated by commas; default: the last feature map")
    p.add_argument("--out", default="overlay.html", help="file (default: overlay.html)")
    p.add_argument("--size", type=positive, default=None, help="side at which the classifier sees the images; default: its own, or 224")
    p.add_argument("--grid", type=positive, default=16, help="most patches a side; finer layers are averaged to it (default: 16)")
    p.add_argument("--limit", type=positive, default=12, help="most images, spread evenly over those found (default: 12)")
    p.add_argument("--title", default="Similarity of patches", help="of the page")
    return p


def overlay_command(argv: Sequence[str]) -> int:
    """``explainer overlay``."""
    args = overlay_parser().parse_args(argv)
    if Path(args.out).suffix not in (".html", ".htm"):
        raise ConfigError(f"--out must end in .html, received {args.out!r}.")
    from explainer.look.similarity import Options, write_overlay

    explanandum = open_classifier(args.classifier, args.classifier_options)
    path = write_overlay(args.images, explanandum, args.out, Options(args.layers, args.size, args.grid, args.limit, args.title))
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MB)")
    return 0
