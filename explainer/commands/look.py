"""``explainer serve | overlay``: arguments only. Importing this module does not import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from explainer.commands.arguments import name_list, number, parser, positive
from explainer.errors import ConfigError
from explainer.inference.classifier import add_classifier_options, open_classifier, prediction_threshold, require_same_classifier
from explainer.inference.outputs import writable_file


def serve_parser() -> argparse.ArgumentParser:
    """Options of ``explainer serve``."""
    p = parser("serve", "A local web page: drop an image; probabilities, masks per class, threshold, comparison, PNG files.")
    p.add_argument("model", help="a .ckpt of train.py, an export folder, or an exported file (.onnx, .pt2, .xml, .safetensors)")
    add_classifier_options(p, "gives probabilities and comparisons")
    p.add_argument("--compare", type=name_list, help="methods to offer, of `explainer methods`, and refined; default: grad_cam,srd,refined")
    p.add_argument("--refine-budget", type=number, default=20.0, help="seconds for a refined mask (default: 20)")
    p.add_argument("--size", type=positive, help="side at which the network runs; default: the side it was trained at")
    p.add_argument(
        "--threshold", type=number, help="probability from which a class counts as predicted; default: 0.5, or a fused file's own"
    )
    p.add_argument("--threads", type=positive, help="processor threads")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is reachable from this machine alone")
    p.add_argument("--allow-host", action="append", default=[], help="a further name under which the page may be opened (with --host)")
    p.add_argument("--port", type=int, default=7860, help="0: any free one")
    p.add_argument("--max-megabytes", type=number, default=20.0, help="largest file (default: 20, at most 256)")
    p.add_argument("--max-megapixels", type=number, default=25.0, help="largest picture (default: 25, at most 64)")
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
    from explainer.data.decoding import MAX_FILE_BYTES, MAX_PIXELS
    from explainer.inference.runtime import open_model
    from explainer.look.server import Server
    from explainer.look.uploads import Uploads

    limits = (("--max-megapixels", args.max_megapixels, MAX_PIXELS / 1e6), ("--max-megabytes", args.max_megabytes, MAX_FILE_BYTES / 2**20))
    for option, value, most in limits:
        if value > most:
            raise ConfigError(
                f"{option} can be at most {most:g}, the limit for any image, received {value:g}. Resize larger pictures first."
            )
    runtime = open_model(args.model, args.threads)
    explanandum = open_classifier(args.classifier, args.classifier_options, runtime.description)
    notice = require_same_classifier(explanandum, runtime.description, args.model)
    threshold = prediction_threshold(args.threshold, runtime.description)
    uploads = Uploads(
        runtime, explanandum, args.compare, args.size, threshold, int(args.max_megapixels * 1e6), refine_budget=args.refine_budget
    )
    return Server(uploads, args.host, args.port, int(args.max_megabytes * 2**20), _title(args.model), notice, tuple(args.allow_host))


def _title(model: str) -> str:
    """A model's name for people: ``runs/NAME/checkpoints/best.ckpt`` is NAME."""
    path = Path(model).resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.parent.name if path.stem == "model" else path.name


def overlay_parser() -> argparse.ArgumentParser:
    """Options of ``explainer overlay``."""
    p = parser("overlay", "One HTML file: point at a patch and see how similar the classifier's layers find all other patches.")
    p.add_argument("images", nargs="+", help="images and folders")
    add_classifier_options(p, "its layers are shown", required=True)
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
    writable_file(args.out)
    from explainer.look.similarity import Options, write_overlay

    explanandum = open_classifier(args.classifier, args.classifier_options)
    path = write_overlay(args.images, explanandum, args.out, Options(args.layers, args.size, args.grid, args.limit, args.title))
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MB)")
    return 0
