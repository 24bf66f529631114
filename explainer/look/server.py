"""The local page's server: uvicorn, bound to loopback, answering only its own page and programs on this machine."""

from __future__ import annotations

import socket

import uvicorn

from explainer.errors import ConfigError
from explainer.look.application import Application
from explainer.look.connection import Connection
from explainer.look.guard import Guard, Names
from explainer.look.uploads import Uploads

_BACKLOG = 512  # connections that the system keeps until they are accepted
_ENDING = 3  # seconds that answers under way may take when the server ends


class Server:
    """Serves one model.

    Args:
        uploads: what is shown.
        host: address to bind.
        port: 0 takes any free one.
        max_bytes: largest size of an upload.
        title: title of the page.
        notice: shown on the page, or empty.
        names: further host names under which it may be addressed.

    Attributes:
        host, port: that it listens on.
        knows: whether a Host header is this server's.
        application: what answers.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """

    def __init__(
        self,
        uploads: Uploads,
        *,
        host: str = "127.0.0.1",
        port: int = 7860,
        max_bytes: int = 20 * 2**20,
        title: str = "explainer",
        notice: str = "",
        names: tuple[str, ...] = (),
    ) -> None:
        self.uploads, self.host = uploads, host
        self._socket = _listening(host, port)
        address, self.port = self._socket.getsockname()[:2]
        self.knows = Names(host, address, self.port, names)
        self.application = Application(uploads, max_bytes, title, notice)
        config = uvicorn.Config(
            Guard(self.application.app, self.knows, lambda: self.url),
            http=Connection,
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # quiet: the terminal is for faults
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_ENDING,
        )
        self._server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """Address of the page."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, f"[{self.host}]" if ":" in self.host else self.host)
        return f"http://{host}:{self.port}/"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.knows.loopback

    def run(self) -> None:
        """Answer until :meth:`stop` is called, or the process is interrupted."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Make :meth:`run` return, from another thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Close the socket and the computing thread."""
        self._socket.close()
        self.application.intake.close()


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        try:
            # A port that was just given up may be taken again.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
            made.listen(_BACKLOG)
        except OSError:
            made.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host} port {port} ({error}). Choose another --port (0: any free one) or --host.") from error
    return made
