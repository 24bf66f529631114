"""What a client may send to the page and the interface, whole and mutated."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from explainer.errors import CheckpointError
from tests.integration.fuzz_models import small_classifier, small_network
from tests.integration.fuzz_mutations import NASTY, Case, mutate


def requests(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """What a client may send to the page and the interface, in its bytes, headers, options and pictures."""
    from explainer.inference.eager import EagerRuntime
    from explainer.look.application import HEADER
    from explainer.look.server import Server
    from explainer.look.uploads import Uploads

    uploads = Uploads(EagerRuntime(small_network()), small_classifier(), compare=("grad_cam",), max_pixels=20_000)
    server = Server(uploads, port=0, max_bytes=10**5, title="fuzz")
    threading.Thread(target=server.run, daemon=True).start()
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(2).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    picture = buffer.getvalue()
    key = uploads.add(picture).key

    def request(line: str, body: bytes = b"", *headers: str) -> bytes:
        length = [f"Content-Length: {len(body)}"] if body else []
        lines = [f"{line} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: close", *headers, *length, "", ""]
        return "\r\n".join(lines).encode() + body

    def address(path: str, options: dict[str, str]) -> str:
        return path + "?" * bool(options) + "&".join(f"{name}={quote(value, safe='')}" for name, value in options.items())

    form = b'--X\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + picture + b"\r\n--X--\r\n"
    asked = {"id": key, "method": "grad_cam", "class": "1", "cut": "0.5"}
    gets = {
        "/": {},
        "/model": {},
        "/api/model": {},
        "/api/openapi.json": {},
        "/picture": {"id": key},
        "/map": asked,
        "/judge": asked,
        "/download": {**asked, "kind": "mask"},
    }
    posts = {
        "/explain": ({}, picture, (f"{HEADER}: 1",)),
        "/api/explain": ({"top": "2", "masks": "rle", "cut": "0.5"}, picture, ()),
        "/api/explain#": ({"classes": "red", "threshold": "0.2"}, form, ("Content-Type: multipart/form-data; boundary=X",)),
    }

    def send(content: bytes, patience: float = 0.5) -> None:
        received = b""
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(content)
            if not select.select([raw], [], [], patience)[0]:
                raw.shutdown(socket.SHUT_WR)  # the server waits for the rest of a request: there is none
            while part := raw.recv(65536):
                received += part
        while received.startswith(b"HTTP/1.1 1"):  # 100 Continue
            received = received.partition(b"\r\n\r\n")[2]
        status = int(received.split(b" ", 2)[1]) if received else 0
        assert status < 500, received
        if status >= 400:
            words = json.loads(received.partition(b"\r\n\r\n")[2].rpartition(b"}")[0] + b"}") if b"{" in received else {"error": "none"}
            raise CheckpointError(f"refused: {words['error']}")
        if status != 200:
            raise CheckpointError("closed without an answer")

    def whole() -> None:
        for path, options in gets.items():
            send(request(f"GET {address(path, options)}"), 60.0)
        for path, (options, body, headers) in posts.items():
            send(request(f"POST {address(path.rstrip('#'), options)}", body, *headers), 60.0)

    yield "nothing", whole
    for i in itertools.count():
        if random.random() < 0.5:
            path = list(gets)[int(random.integers(len(gets)))]
            line, options, body, headers = "GET", dict(gets[path]), b"", ()
        else:
            path = list(posts)[int(random.integers(len(posts)))]
            line, (options, body, headers) = "POST", posts[path]
            options = dict(options)
        if i % 3 == 0 and options:
            option = list(options)[int(random.integers(len(options)))]
            options[option] = str(
                [*NASTY, "all", 'red,"', "explainer", "refined", "9" * 400, "-0", "nan"][int(random.integers(len(NASTY) + 7))]
            )
        elif i % 3 == 1 and body:
            body = mutate(body, random)
        content = request(f"{line} {address(path.rstrip('#'), options)}", body, *headers)
        if i % 3 == 2:
            head, _, rest = content.partition(b"\r\n\r\n")
            content = mutate(head, random) + b"\r\n\r\n" + rest
        yield f"{content[:600]!r}", functools.partial(send, content)
        if i % 25 == 24:
            yield "a whole request after mutated ones", functools.partial(send, request("GET /api/model"), 60.0)
