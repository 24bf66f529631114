"""``explainer serve``: a local web page (drop an image; look at probabilities, masks and comparisons) and a JSON interface for programs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from explainer.commands.arguments import add_classifier_options, add_model, name_list, number, positive, probability, side
from explainer.commands.parsing import Command, Parser
from explainer.errors import ConfigError
from explainer.inference.classifier import GivenClassifier, prediction_threshold, require_same_classifier

if TYPE_CHECKING:
    from explainer.look.server import Server


def add_options(parser: Parser) -> None:
    """Declare the options."""
    add_model(parser)
    add_classifier_options(parser, "gives probabilities and comparisons")
    parser.add_argument("--compare", type=name_list, help="methods to offer, and refined; default: grad_cam,srd,refined")
    parser.add_argument("--refine_budget", type=number, default=20.0, help="seconds for a refined mask")
    parser.add_argument("--size", type=side, help="side at which the network runs; default: the side it was trained at")
    parser.add_argument(
        "--threshold", type=probability, help="probability from which a class counts as predicted; default: 0.5, or a fused file's own"
    )
    parser.add_argument("--threads", type=positive, help="processor threads")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; the default is reachable from this machine alone")
    parser.add_argument("--allow_host", action="append", default=[], help="a further name under which the page may be opened (with --host)")
    parser.add_argument("--port", type=int, default=7860, help="0: any free one")
    parser.add_argument("--max_megabytes", type=number, default=20.0, help="largest file (default: 20, at most 256)")
    parser.add_argument("--max_megapixels", type=number, default=25.0, help="largest picture (default: 25, at most 64)")


def run(_parser: Parser, args: Namespace) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port must lie in 0..65535, received {args.port}.")
    server = make_server(args)
    try:
        if not server.loopback:
            print("Anyone who can reach this machine on the network can use the page: there is no password.", file=sys.stderr)
        print(f"{server.application.title}: open {server.url} (Ctrl-C ends it)", flush=True)
        server.run()
    except KeyboardInterrupt:
        print("ended")
    finally:
        server.close()
    return 0


def make_server(args: Namespace) -> Server:
    """The server of parsed arguments, listening but not yet answering."""
    from explainer.data.decoding import MAX_FILE_BYTES, MAX_PIXELS
    from explainer.inference.formats import require
    from explainer.inference.runtime import open_model
    from explainer.look.uploads import Uploads

    for module in ("uvicorn", "starlette", "python_multipart"):
        require(module, "serve")
    from explainer.look.server import Server

    limits = (("--max_megapixels", args.max_megapixels, MAX_PIXELS / 1e6), ("--max_megabytes", args.max_megabytes, MAX_FILE_BYTES / 2**20))
    for option, value, most in limits:
        if value > most:
            raise ConfigError(
                f"{option} can be at most {most:g}, the limit for any image, received {value:g}. Resize larger pictures first."
            )
    given = GivenClassifier(args.classifier, args.classifier_options)
    runtime = open_model(args.model, args.threads, given)
    explanandum = given.beside(runtime.description)
    notice = require_same_classifier(explanandum, runtime.description, args.model)
    threshold = prediction_threshold(args.threshold, runtime.description)
    uploads = Uploads(
        runtime,
        explanandum,
        compare=args.compare,
        side=args.size,
        threshold=threshold,
        max_pixels=int(args.max_megapixels * 1e6),
        refine_budget=args.refine_budget,
    )
    return Server(
        uploads,
        host=args.host,
        port=args.port,
        max_bytes=int(args.max_megabytes * 2**20),
        title=_title(args.model),
        notice=notice,
        names=tuple(args.allow_host),
    )


def _title(model: str) -> str:
    """A model's name for people: ``runs/NAME/checkpoints/best.ckpt`` is NAME."""
    path = Path(model).resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.parent.name if path.stem == "model" else path.name


COMMAND = Command("a local web page (drop an image, look at the masks of its classes) and a JSON interface for programs", add_options, run)
