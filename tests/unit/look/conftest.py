"""The tiny Explainer of the export tests, its classifier, and a running server."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.commands.parsing import command_parser
from explainer.commands.serve import COMMAND, make_server
from explainer.inference.eager import EagerRuntime
from explainer.look.server import Server
from explainer.look.uploads import Uploads
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.browser import Page, browser
from tests.unit.export.conftest import checkpoint, classifier, classifier_checkpoint, colored, net, onnx_fused

__all__ = ["checkpoint", "classifier", "classifier_checkpoint", "net", "onnx_fused"]


def photograph(height: int = 40, width: int = 48, seed: int = 7) -> np.ndarray:
    """``[H,W,3]`` uint8 with a red rectangle."""
    pixels = colored(1, 48, seed)[0][0]
    return (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()[:height, :width]


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """The server answering in a thread; ended on the way out."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        server.close()


def direct(net: Explainer, classifier: Explanandum) -> Server:
    """The server of :func:`server` without the files, for modules whose tests share one."""
    return Server(Uploads(EagerRuntime(net), classifier, max_pixels=20_000), port=0, max_bytes=int(0.1 * 2**20), title="run")


@pytest.fixture
def server(checkpoint: Path, classifier_checkpoint: Path) -> Iterator[Server]:
    options = ["--classifier", str(classifier_checkpoint), "--port", "0", "--max_megabytes", "0.1", "--max_megapixels", "0.02"]
    made: Server = make_server(command_parser(COMMAND, "explainer serve").parse_args([str(checkpoint), *options]))
    with running(made):
        yield made
