"""One connection of the server: uvicorn's, with limits of time and number, and strict about where a request ends."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_CONNECTIONS = 500  # open at once; below the 1024 open files that systems allow a process
_HEAD = 20.0  # seconds in which the head of a request must arrive
_HEAD_BYTES = 64 * 2**10  # of a head, at most: servers on other ports of this machine may have set many cookies
_READING = 60.0  # seconds in which a client must have read a part of its answer
_LEAST = 64 * 2**10  # bytes of that part
_LENGTH = re.compile(rb"^content-length[ \t]*:", re.IGNORECASE | re.MULTILINE)


class StrictParser(h11.Connection):
    """h11's parser, which also refuses a Content-Length that is given twice.

    h11 refuses several Host headers and two lengths that differ; of two equal ones it keeps one. A proxy in front could count otherwise, so
    that both would see other requests in the same bytes.
    """

    def next_event(self) -> Any:
        """The next part of a request; see h11."""
        waiting = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        event = super().next_event()
        if isinstance(event, h11.Request):
            head = waiting[: len(waiting) - len(self.trailing_data[0])]
            if len(_LENGTH.findall(head)) > 1:
                raise h11.RemoteProtocolError("several Content-Length headers")
        return event


class Connection(H11Protocol):
    """uvicorn's connection. A client that sends or reads too slowly is cut off, so that it holds nothing for ever."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = StrictParser(h11.SERVER, _HEAD_BYTES)
        self._head: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connects."""
        super().connection_made(transport)
        if len(self.connections) > _CONNECTIONS:
            transport.abort()
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """A client sends."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """A request has its answer; the next may follow."""
        super().on_response_complete()
        self._watch_head()

    def _watch_head(self) -> None:
        """Count the time while a head is awaited. Single bytes do not start it anew."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head = _stopped(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(_HEAD, self.transport.abort)

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        super().pause_writing()
        self._watch_reading()

    def _watch_reading(self, before: int | None = None) -> None:
        left = self.transport.get_write_buffer_size()
        if before is not None and before - left < _LEAST:
            self.transport.abort()
        else:
            self._reading = self.loop.call_later(_READING, self._watch_reading, left)

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._reading = _stopped(self._reading)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, from whichever side."""
        self._head, self._reading = _stopped(self._head), _stopped(self._reading)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP request, as JSON; a client that is already being answered is cut off."""
        body = json.dumps({"error": msg, "status": 400}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        try:
            for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            self.transport.abort()
        else:
            self.transport.close()


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
