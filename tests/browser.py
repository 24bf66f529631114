"""A real browser (chromium, without a window) driven over its DevTools pipe: clicks, files, screenshots; no package needed."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
)


def program() -> str:
    """Path of chromium; the test fails without."""
    found = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)
    if found is None:
        pytest.fail("chromium is not installed: apt-get install -y chromium, or leave these tests out with -m 'not browser'.")
    return found


def screenshots(fallback: Path) -> Path:
    """Folder of screenshots: the one named by SCREENSHOTS, or the test's own."""
    folder = Path(os.environ.get("SCREENSHOTS", fallback))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Page:
    """One tab.

    Attributes:
        requests: addresses that the page asked for.
        errors: uncaught errors, messages of console.error, and what a policy blocked.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._number, self._buffer = read, write, 0, b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + 120
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._read, 2**20) if ready else b""
            if not part:
                raise AssertionError("chromium does not answer")
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        event = json.loads(text)
        values = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(values["exceptionDetails"].get("exception", {}).get("description", values["exceptionDetails"]["text"])))
        elif event.get("method") == "Log.entryAdded" and values["entry"]["level"] == "error" and values["entry"]["source"] != "network":
            self.errors.append(values["entry"]["text"])
        return event

    def size(self, width: int, height: int) -> None:
        """Width and height of the screen in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def dark(self, on: bool) -> None:
        """Which colours the user prefers."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if on else "light"}])

    def open(self, url: str) -> None:
        """Go to an address."""
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Value of an expression (or of the promise that it is)."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(answer["exceptionDetails"].get("exception", {}).get("description", "script failed") + f"\n{script}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """The expression's value, once it is true."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if value := self.run(script):
                return value
            time.sleep(0.05)
        raise AssertionError(f"still not true after {seconds} s: {script}; errors: {self.errors}")

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """A point of an element, which is scrolled into view; ``x`` and ``y`` are shares of its box."""
        box = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center', behavior: 'instant'}}); const b = e.getBoundingClientRect();"
            f" return [b.left, b.top, b.width, b.height]; }})(document.querySelector({json.dumps(selector)}))"
        )
        return box[0] + x * box[2], box[1] + y * box[3]

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse over an element."""
        at = self.place(selector, x, y)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press and release the mouse on an element."""
        at = self.place(selector, x, y)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **button)

    def key(self, name: str) -> None:
        """Press and release a key such as ArrowRight."""
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=codes[name])

    def choose_file(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path, whole: bool = True) -> Path:
        """PNG of the page, or of the visible part."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
        return path


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A fresh chromium with one empty tab, ended on the way out."""
    out_read, out_write = os.pipe()  # to chromium, its descriptor 3
    in_read, in_write = os.pipe()  # from chromium, its descriptor 4

    def connect() -> None:
        high = os.dup(out_read), os.dup(in_write)  # neither may be 3 or 4 before both are in place
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    command = [program(), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        command, preexec_fn=connect, pass_fds=(3, 4), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(out_read)
    os.close(in_write)
    try:
        yield Page(in_read, out_write)
    finally:
        os.close(out_write)
        os.close(in_read)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
