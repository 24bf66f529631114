"""The server on the wire: requests whose end is in doubt, clients that are slow, and many at once."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from starlette.responses import Response

from explainer.look import connection as connection_module
from explainer.look.application import HEADER
from explainer.look.server import Server
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.unit.look.conftest import direct, encoded, photograph, running
from tests.unit.look.test_serve import ask


@pytest.fixture(scope="module")
def server(net: Explainer, classifier: Explanandum) -> Iterator[Server]:
    with running(direct(net, classifier)) as made:
        yield made


def talk(server: Server, content: bytes) -> tuple[int, bytes]:
    """(status, all bytes) that come back until the server closes the connection; status 0 if nothing does."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(content)
        try:
            while part := raw.recv(65536):
                received += part
        except ConnectionResetError:
            pass
    return int(received.split(b" ", 2)[1]) if received else 0, received


def post(server: Server, *headers: str, body: bytes = b"abcd") -> bytes:
    lines = ["POST /explain HTTP/1.1", f"Host: 127.0.0.1:{server.port}", f"{HEADER}: 1", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (("Host: 127.0.0.1:PORT", "Content-Length: 4"), b"abcd"),
        (("Host: evil.example", "Content-Length: 4"), b"abcd"),
        (("Content-Length: 4", "Content-Length: 4"), b"abcd"),
        (("Content-Length: 4", "content-length : 4"), b"abcd"),
        (("Content-Length: 4", "Content-Length: 5"), b"abcd"),
        (("Content-Length: 4, 5",), b"abcd"),
        (("Content-Length: +4",), b"abcd"),
        (("Content-Length: 4", "Transfer-Encoding: chunked"), b"4\r\nabcd\r\n0\r\n\r\n"),
        (("Transfer-Encoding: chunked", "Content-Length: 4"), b"4\r\nabcd\r\n0\r\n\r\n"),
        (("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", "Content-Length: 4"), b"4\r\nabcd\r\n0\r\n\r\n"),
        (("Transfer-Encoding: gzip",), b"abcd"),
        (("Content-Length: 4", "No colon here"), b"abcd"),
    ],
)
def test_requests_whose_end_is_in_doubt_are_refused(server: Server, headers: tuple[str, ...], body: bytes) -> None:
    smuggled = f"GET /api/model HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode()
    sent = [line.replace("PORT", str(server.port)) for line in headers]
    status, received = talk(server, post(server, *sent, body=body + smuggled))
    assert status == 400 and received.count(b"HTTP/1.1 ") == 1, received
    answer = json.loads(received.partition(b"\r\n\r\n")[2])
    assert answer["status"] == 400 and answer["error"]


def test_one_request_without_doubt_is_answered(server: Server) -> None:
    """The same request as above, with its length once: what is refused there is refused for its headers."""
    status, received = talk(server, post(server, "Content-Length: 4"))
    assert status == 422 and b"not a readable image" in received


def test_a_request_without_host_is_refused(server: Server) -> None:
    assert talk(server, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")[0] == 400
    assert talk(server, b"GET / HTTP/1.0\r\n\r\n")[0] == 403


def test_a_head_must_arrive_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_HEAD", 0.3)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as silent:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as dripping, pytest.raises(OSError):
            for _ in range(100):
                dripping.sendall(b"G")
                time.sleep(0.05)
            raise AssertionError("it was still waited for")
        assert silent.recv(1) == b"", "closed without a word"
    assert time.monotonic() - began < 3
    assert ask(server, "/api/model")[0] == 200


def test_an_answer_must_be_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_READING", 0.2)

    for route in server.application.app.routes:
        if route.path == "/api/model":
            monkeypatch.setattr(route, "app", Response(b"x" * 20_000_000))
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
        raw.sendall(f"GET /api/model HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        time.sleep(0.6)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := raw.recv(2**20):
                received += len(part)
    assert 0 < received < 20_000_000, "the rest of the answer was let go"


@pytest.fixture
def slow(server: Server) -> Iterator[list[socket.socket]]:
    """60 clients that have sent half a head, and 60 that have sent half a picture."""
    head = post(server, "Content-Length: 90000", body=b"x" * 100)
    sockets = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(120)]
    for i, raw in enumerate(sockets):
        raw.sendall(head[:30] if i % 2 else head)
    yield sockets
    for raw in sockets:
        raw.close()


def test_slow_clients_block_nobody(server: Server, slow: list[socket.socket]) -> None:
    began = time.monotonic()
    status, found, _ = ask(server, "/explain", encoded(photograph()))
    assert status == 200 and ask(server, f"/map?id={found['id']}&class=0")[0] == 200 == ask(server, "/")[0]
    assert time.monotonic() - began < 5
    assert server.application.intake.held == 60 * 100, "they still hold what they sent"
    assert server.application.intake.waiting == 0, "and no place in the queue"


@pytest.mark.slow
def test_two_hundred_at_once_are_all_answered(server: Server) -> None:
    """Each of 200 parallel clients gets the picture's answer, or is told to come back; the page answers meanwhile."""
    picture, answers = encoded(photograph()), []
    together = threading.Barrier(201)

    def upload() -> None:
        together.wait(30)
        answers.append(ask(server, "/api/explain?masks=none", picture))

    threads = [threading.Thread(target=upload) for _ in range(200)]
    for t in threads:
        t.start()
    together.wait(30)
    assert ask(server, "/")[0] == 200
    for t in threads:
        t.join(60)
    statuses = [status for status, _, _ in answers]
    assert len(statuses) == 200 and set(statuses) <= {200, 503} and statuses.count(200) >= 32
    areas = [json.dumps(found["areas"]) for status, found, _ in answers if status == 200]
    assert len(set(areas)) == 1
    assert all(headers["Retry-After"] == "1" for status, _, headers in answers if status == 503)
    assert ask(server, "/api/explain?masks=none", picture)[0] == 200


def test_connections_are_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_CONNECTIONS", 3)
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3)]
    with pytest.raises(OSError):
        ask(server, "/api/model")
    for raw in held:
        raw.close()
    for _ in range(100):
        try:
            status = ask(server, "/api/model")[0]
            break
        except OSError:
            time.sleep(0.02)
    assert status == 200


def test_who_waits_when_the_server_ends_is_told(net: Explainer, classifier: Explanandum, monkeypatch: pytest.MonkeyPatch) -> None:
    made, gate = direct(net, classifier), threading.Event()
    monkeypatch.setattr(made._server.config, "timeout_graceful_shutdown", 0.1)
    monkeypatch.setattr(made.uploads, "find", lambda key: gate.wait(30))
    answers = []
    client = threading.Thread(target=lambda: answers.append(ask(made, "/picture?id=x")))
    try:
        with running(made):
            client.start()
            for _ in range(1000):
                if made.application.intake.waiting:
                    break
                time.sleep(0.01)
            made.stop()
            client.join(20)
    finally:
        gate.set()
    assert [(status, answer["error"]) for status, answer, _ in answers] == [(503, "The server is ending.")]
