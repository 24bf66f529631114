"""What a server takes in: bodies within a time and a memory, and work for one thread within a queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TypeVar

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from explainer.look import guard

T = TypeVar("T")
FIELD = "image"  # of a form
_WAITING = 32  # requests that may wait for the network
_HELD = 256 * 2**20  # bytes of bodies in memory, at any time; a body within the limit is always taken when there is no other
_FRAME = 16 * 2**10  # bytes of a form around its file
_BUSY = {"Retry-After": "1"}


class Intake:
    """Bodies and work of one server. Its methods are called from the server's event loop.

    Args:
        max_bytes: largest size of a picture's file.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.waiting, self.held = max_bytes, 0, 0
        # One thread for all computing: torch's hooks are not thread-safe, and each new thread would start its own pool.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="explain")

    async def compute(self, function: Callable[..., T], *arguments: object) -> T:
        """Run in the computing thread.

        Raises:
            HTTPException: 503, too many wait already.
        """
        self._require_place()
        self.waiting += 1
        try:
            return await asyncio.wrap_future(self._worker.submit(function, *arguments))
        finally:
            self.waiting -= 1

    def _require_place(self) -> None:
        if self.waiting >= _WAITING:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "The model is busy. Try again in a moment.", _BUSY)

    @asynccontextmanager
    async def body(self, request: Request, room: int = 0) -> AsyncIterator[bytes]:
        """The body of a request, which counts as held until the block ends.

        A slow client holds no place in the queue: that is asked for when its body is complete.

        Args:
            request: not read yet.
            room: bytes that the body may have beside the picture.

        Raises:
            HTTPException: 411, 413, 503 or 408: no length, too long, too many at once, too slow.
        """
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise HTTPException(HTTPStatus.LENGTH_REQUIRED, "An upload must say its length (Content-Length).")
        if int(length) > self.max_bytes + room:
            self.refuse_length(int(length))
        self._require_place()
        parts, size = [], 0
        try:
            try:
                async with asyncio.timeout(guard.PATIENCE):
                    async for part in request.stream():
                        size += len(part)
                        self.held += len(part)
                        if self.held > max(_HELD, size):
                            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "Too many uploads at once. Try again in a moment.", _BUSY)
                        parts.append(part)
            except TimeoutError as error:
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, f"The upload took longer than {guard.PATIENCE:g} s.") from error
            yield b"".join(parts)
        finally:
            self.held -= size

    def refuse_length(self, length: int) -> None:
        """Raise HTTPException 413."""
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The file has {length / 2**20:.1f} MB, more than the limit of {self.max_bytes / 2**20:.4g} MB. Make it smaller, or start with "
            "a larger --max_megabytes.",
        )

    @asynccontextmanager
    async def picture(self, request: Request) -> AsyncIterator[bytes]:
        """The file of a picture: the field ``image`` of a form (``multipart/form-data``), or the body itself.

        Raises:
            HTTPException: as for :meth:`body`, and 400 for another form.
        """
        form = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"
        async with self.body(request, _FRAME if form else 0) as body:
            yield await self._from_form(request, body) if form else body

    async def _from_form(self, request: Request, body: bytes) -> bytes:
        async def receive() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async with Request(request.scope, receive).form(max_files=1, max_fields=8) as form:
            file = form.get(FIELD)
            if len(form.multi_items()) != 1 or not isinstance(file, UploadFile):
                raise HTTPException(
                    HTTPStatus.BAD_REQUEST,
                    f"The form must have one file, in the field {FIELD!r}: curl -F {FIELD}=@photo.jpg. Options stand in the "
                    "address: ?top=3.",
                )
            content = await file.read()
        if len(content) > self.max_bytes:
            self.refuse_length(len(content))
        return content

    def close(self) -> None:
        """End the computing thread once it has finished what it does."""
        self._worker.shutdown(wait=False, cancel_futures=True)
