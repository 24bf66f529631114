"""Who may ask the server, and what every answer says: an ASGI application around another.

A page of another site cannot read or send anything: the Host header must be the server's own (a foreign name that resolves to this
machine is refused), and a request that a browser marks as coming from another site is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE = 60.0  # seconds that sending one upload may take
_DRAIN = 256 * 2**20  # most bytes of a refused upload that are read, so that the client sees the answer
_ALWAYS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses requests that are not for this server or not from its own page, and completes answers.

    Args:
        app: answers the others.
        knows: whether a Host header is this server's.
        url: address of the page, for the refusal.
    """

    def __init__(self, app: ASGIApp, knows: Callable[[str], bool], url: Callable[[], str]) -> None:
        self.app, self.knows, self.url = app, knows, url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = _Exchange(Headers(scope=scope), receive, send)
        try:
            self.check(scope)
        except HTTPException as refusal:
            exchange.close = True
            await failure(refusal.status_code, refusal.detail)(scope, exchange.receive, exchange.send)
            return
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # the server ends; without an answer it would complain of a fault
            if exchange.began:
                raise
            await failure(HTTPStatus.SERVICE_UNAVAILABLE, "The server is ending.")(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raise HTTPException for a request that is not answered.

        Raises:
            HTTPException: 400 for a body of two lengths, 403 for a foreign name or site.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if "transfer-encoding" in headers and "content-length" in headers:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "A request has either Content-Length or Transfer-Encoding, not both.")
        if not self.knows(host):
            raise HTTPException(HTTPStatus.FORBIDDEN, f"This server does not answer as {host[:100]!r}. Open {self.url()}")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        at_the_door = scope["method"] == "GET" and scope["path"] == "/"  # following a link to the page is harmless
        if (origin is not None and origin.lower() != f"http://{host.lower()}") or (site not in ("same-origin", "none") and not at_the_door):
            raise HTTPException(HTTPStatus.FORBIDDEN, "Requests of other sites are refused.")


class _Exchange:
    """A request and its answer: adds headers, and reads what is left of a body so that the client sees the answer.

    Attributes:
        close: whether the connection ends with the answer.
        began: whether the answer has begun.
    """

    def __init__(self, headers: Headers, receive: Receive, send: Send) -> None:
        length = headers.get("content-length", "0")
        self._receive, self._send = receive, send
        self._unread = int(length) if length.isdecimal() and len(length) < 19 else 0
        self._asks_first = "expect" in headers  # such a client waits for leave to send; it needs no draining
        self._chunked = "transfer-encoding" in headers
        self.close = self.began = False

    async def receive(self) -> Message:
        """As in ASGI."""
        message = await self._receive()
        self._asks_first = False
        self._unread = max(0, self._unread - len(message.get("body", b""))) if message["type"] == "http.request" else 0
        if not message.get("more_body", False):
            self._unread, self._chunked = 0, False
        return message

    async def send(self, message: Message) -> None:
        """As in ASGI."""
        if message["type"] == "http.response.start":
            self.began = True
            headers = MutableHeaders(raw=message.setdefault("headers", []))
            for name, value in _ALWAYS.items():
                headers.setdefault(name, value)
            if self.close or self._unread or self._chunked:
                # Whatever is left of a body must not be read as the next request.
                headers["Connection"] = "close"
                await self._drain()
        await self._send(message)

    async def _drain(self) -> None:
        if self._asks_first:
            return
        least = self._unread - _DRAIN
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while self._unread > max(0, least):
                    await self.receive()


class Names:
    """The names under which a server may be addressed.

    Args:
        host: that it is bound to.
        address: its numeric address.
        port: that it listens on.
        further: host names beside ``host`` and localhost.
    """

    def __init__(self, host: str, address: str, port: int, further: tuple[str, ...] = ()) -> None:
        self.names = {name.lower() for name in (host, "localhost", *further)}
        self.port, self.loopback = port, _is_loopback(address)

    def __call__(self, host: str) -> bool:
        """Whether a Host header is this server's: a loopback or listed name, or, on other than loopback, any numeric address."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = (parts.hostname or "").lower(), parts.port or 80
        except ValueError:
            return False
        if port != self.port:
            return False
        return name in self.names or _is_loopback(name) or (not self.loopback and _is_address(name))


def failure(status: int, message: str, headers: Any = None) -> JSONResponse:
    """An answer that says what is wrong: ``{"error": ..., "status": ...}``.

    Args:
        status: HTTP's code.
        message: what is wrong, in words.
        headers: further ones.
    """
    return JSONResponse({"error": message, "status": int(status)}, int(status), headers)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback
