"""The local page's server: the standard library's, bound to loopback, answering only its own page.

A page of another site cannot read or send anything: the Host header must be the server's own (a foreign name that resolves to this
machine is refused), a request that a browser marks as coming from another site is refused, and uploads need a header that such a page
may not set.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import math
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError, ExplainerError
from explainer.look.uploads import ALL, OWN, Map, Upload, Uploads
from explainer.report.page import page

HEADER = "X-Explainer"
_WAITING = 8  # requests that may wait for the network
_PATIENCE = 60.0  # seconds that sending one upload may take
_DRAIN = 256 * 2**20  # most bytes of a refused upload that are read, so that the browser sees the answer


class RefusedError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of the answer.
    """

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves one model.

    Args:
        uploads: what is shown.
        host: address to bind.
        port: 0 takes any free one.
        max_bytes: of an upload.
        title: of the page.
        notice: shown on the page, or empty.
        names: further host names under which it may be addressed.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        uploads: Uploads,
        host: str = "127.0.0.1",
        port: int = 7860,
        max_bytes: int = 20 * 2**20,
        title: str = "explainer",
        notice: str = "",
        names: tuple[str, ...] = (),
    ) -> None:
        self.uploads, self.max_bytes, self.title, self.notice = uploads, max_bytes, title, notice
        self.names = {name.lower() for name in (host, "localhost", *names)}
        # One thread for all computing: torch's hooks are not thread-safe, and each new thread would start its own pool.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explain")
        self._free = threading.BoundedSemaphore(_WAITING)
        self.content, self.policy = _content(title)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen on {host} port {port} ({error}). Choose another --port (0: any free one) or --host."
            ) from error
        self.host, self.port = host, int(self.server_address[1])
        self.loopback = _is_loopback(self.server_address[0])

    def server_bind(self) -> None:
        """Bind without asking the network for this machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Address of the page."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, f"[{self.host}]" if ":" in self.host else self.host)
        return f"http://{host}:{self.port}/"

    @contextmanager
    def place(self) -> Iterator[Callable[..., Any]]:
        """One of few places in the queue, refused when all are taken: a function that runs another in the computing thread."""
        if not self._free.acquire(blocking=False):
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "The model is busy. Try again in a moment.")
        try:
            yield lambda function, *arguments: self._worker.submit(function, *arguments).result()
        finally:
            self._free.release()

    def compute(self, function: Any, *arguments: Any) -> Any:
        """Run in the computing thread; refuse when too many wait."""
        with self.place() as run:
            return run(function, *arguments)

    def knows(self, host: str) -> bool:
        """Whether a Host header is this server's: a loopback or listed name, or, on other than loopback, any numeric address."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = (parts.hostname or "").lower(), parts.port or 80
        except ValueError:
            return False
        if port != self.port:
            return False
        return name in self.names or _is_loopback(name) or (not self.loopback and _is_address(name))

    def server_close(self) -> None:
        """Close the socket and the computing thread."""
        super().server_close()
        self._worker.shutdown(wait=False, cancel_futures=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error of ours."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "explainer", ""
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        """The page, facts, maps, pictures."""
        self._answer(self._get)

    def do_HEAD(self) -> None:
        """As GET, without the content."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Uploads."""
        self._answer(self._post)

    def _answer(self, function: Any) -> None:
        try:
            status, kind, body, headers = self._checked(function)
        except RefusedError as error:
            status, kind, body, headers = error.status, "application/json", _json({"error": str(error)}), {}
        except DatasetNotFoundError as error:
            status, kind, body, headers = HTTPStatus.NOT_FOUND, "application/json", _json({"error": str(error)}), {}
        except CorruptSampleError as error:
            status, kind, body, headers = HTTPStatus.UNPROCESSABLE_ENTITY, "application/json", _json({"error": str(error)}), {}
        except ExplainerError as error:
            status, kind, body, headers = HTTPStatus.BAD_REQUEST, "application/json", _json({"error": str(error)}), {}
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        except Exception:  # a fault of ours: the reason goes to the terminal, not to the page
            traceback.print_exc()
            message = {"error": "The server failed; its terminal shows why."}
            status, kind, body, headers = HTTPStatus.INTERNAL_SERVER_ERROR, "application/json", _json(message), {}
        self._send(status, kind, body, headers)

    def _checked(self, function: Any) -> tuple[HTTPStatus, str, bytes, dict[str, str]]:
        host = self.headers.get("Host", "")
        if not self.server.knows(host):
            self.close_connection = True
            raise RefusedError(HTTPStatus.FORBIDDEN, f"This server does not answer as {host[:100]!r}. Open {self.server.url}")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        at_the_door = self.command == "GET" and urlsplit(self.path).path == "/"  # following a link to the page is harmless
        if (origin is not None and origin.lower() != f"http://{host.lower()}") or (site not in ("same-origin", "none") and not at_the_door):
            self.close_connection = True
            raise RefusedError(HTTPStatus.FORBIDDEN, "Requests of other sites are refused.")
        return function()

    def _get(self) -> tuple[HTTPStatus, str, bytes, dict[str, str]]:
        s, parts = self.server, urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query).items()}
        if parts.path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", s.content, {"Content-Security-Policy": s.policy}
        if parts.path == "/model":
            facts = {**s.uploads.describe(), "title": s.title, "notice": s.notice, "max_bytes": s.max_bytes, "header": HEADER}
            return HTTPStatus.OK, "application/json", _json(facts), {}
        if parts.path == "/picture":
            body, kind = s.compute(lambda: s.uploads.preview(s.uploads.find(query.get("id", ""))))
            return HTTPStatus.OK, kind, body, {}
        if parts.path == "/map":
            return HTTPStatus.OK, "application/json", _json(s.compute(self._map, query)), {}
        if parts.path == "/judge":
            return HTTPStatus.OK, "application/json", _json(s.compute(self._judge, query)), {}
        if parts.path == "/download":
            name, body = s.compute(self._file, query)
            return HTTPStatus.OK, "image/png", body, {"Content-Disposition": f'attachment; filename="{_ascii(name)}"'}
        raise RefusedError(HTTPStatus.NOT_FOUND, f"There is no {parts.path[:100]!r} here.")

    def _asked(self, query: dict[str, str]) -> tuple[Upload, str, int | str, Map]:
        u = self.server.uploads
        upload, method, chosen = u.find(query.get("id", "")), query.get("method", OWN), _class(query.get("class", ""))
        return upload, method, chosen, u.map(upload, method, chosen)

    def _map(self, query: dict[str, str]) -> dict[str, Any]:
        return map_facts(self._asked(query)[3])

    def _judge(self, query: dict[str, str]) -> dict[str, Any]:
        upload, _, chosen, found = self._asked(query)
        return self.server.uploads.judge(upload, found, chosen, _cut(query))

    def _file(self, query: dict[str, str]) -> tuple[str, bytes]:
        upload, method, chosen, found = self._asked(query)
        u, kind = self.server.uploads, query.get("kind", "overlay")
        return u.file_name(kind, method, chosen), u.png(upload, kind, found, _cut(query))

    def _post(self) -> tuple[HTTPStatus, str, bytes, dict[str, str]]:
        self.close_connection = True  # whatever is left of a refused body must not be read as the next request
        if urlsplit(self.path).path != "/explain":
            raise RefusedError(HTTPStatus.NOT_FOUND, "Uploads go to /explain.")
        if self.headers.get(HEADER) is None:
            raise RefusedError(HTTPStatus.FORBIDDEN, f"An upload needs the header {HEADER}.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "An upload must say its length.")
        if int(length) > self.server.max_bytes:
            self._drain(int(length))
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The file has {int(length) / 2**20:.1f} MB, more than the limit of {self.server.max_bytes / 2**20:g} MB. Make it smaller, "
                "or start with a larger --max_megabytes.",
            )
        try:
            with self.server.place() as run:  # before the body is read: bodies of those who wait would fill the memory
                body = b"".join(self._parts(int(length)))
                if len(body) < int(length):
                    raise ConnectionError
                self.close_connection = False
                upload = run(self.server.uploads.add, body)
        except RefusedError:
            self._drain(int(length))
            raise
        return HTTPStatus.OK, "application/json", _json(upload_facts(upload)), {}

    def _parts(self, length: int) -> Iterator[bytes]:
        """The body bit by bit; one that trickles in must not keep its place for ever."""
        end = time.monotonic() + _PATIENCE
        while length > 0 and (part := self.rfile.read1(min(length, 2**16))):  # type: ignore[attr-defined]
            length -= len(part)
            yield part
            if time.monotonic() > end:
                raise TimeoutError

    def _drain(self, length: int) -> None:
        for _ in self._parts(min(length, _DRAIN)):
            pass

    def _send(self, status: HTTPStatus, kind: str, body: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            fixed = {
                "Content-Type": kind,
                "Content-Length": str(len(body)),
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
                "X-Frame-Options": "DENY",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
            }
            for name, value in {**fixed, **headers}.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the terminal is for faults."""


def upload_facts(upload: Upload) -> dict[str, Any]:
    """What the page is told about an upload; the masks follow one by one."""
    return {
        "id": upload.key,
        "height": upload.picture.size[0],
        "width": upload.picture.size[1],
        "scores": None if upload.scores is None else [round(float(s), 6) for s in upload.scores],
        "areas": [round(float(m.mean()), 6) for m in upload.masks],
        "chosen": upload.chosen,
    }


def map_facts(found: Map) -> dict[str, Any]:
    """A map as bytes (0..255, row by row) in base64, and its numbers."""
    values = (found.values.clip(0, 1) * 255).round().astype(np.uint8)
    return {
        "height": values.shape[0],
        "width": values.shape[1],
        "data": base64.b64encode(values.tobytes()).decode(),
        "area": round(float(found.values.mean()), 6),
        "seconds": round(found.seconds, 3),
        "note": found.note,
    }


def _class(text: str) -> int | str:
    return ALL if text == ALL else int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else text


def _cut(query: dict[str, str]) -> float:
    try:
        cut = float(query.get("cut", "0"))
    except ValueError:
        cut = math.nan
    if not 0 <= cut <= 1:
        raise ConfigError(f"cut must be a number in [0,1], received {query['cut']!r}.")
    return cut


def _content(title: str) -> tuple[bytes, str]:
    """The page, and its policy: only this very style and script, nothing from elsewhere."""
    root = resources.files("explainer.look")
    body, style, script = (root.joinpath(f"serve.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    text = page(title, body, style, script, images="'self' data:", connect="'self'")
    hashes = {}
    for tag in ("style", "script"):
        inside = text[text.index(f"<{tag}>") + len(tag) + 2 : text.rindex(f"</{tag}>")]
        hashes[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'sha256-{hashes['style']}'; "
        f"script-src 'sha256-{hashes['script']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode()


def _ascii(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: Any) -> bool:
    return _is_address(str(name)) and ipaddress.ip_address(str(name)).is_loopback
