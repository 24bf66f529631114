"""The progress bar of every command, with the time left; without a terminal, a line a minute."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 60.0
#: After so many without a line, one says what is still being done.
_SECONDS_BETWEEN_SIGNS = 60.0


class Progress:
    """Counts units of work.

    Args:
        total: number of units, or None where :meth:`reach` says it later.
        enabled: False shows nothing.
        what: is done, a verb.
    """

    def __init__(self, total: int | None, enabled: bool = True, what: str = "evaluate") -> None:
        self.total, self.done, self.enabled, self.what = total, 0, enabled, what
        self._bar: Any = None
        self._start = self._last = self._shown = time.monotonic()
        self._at = ""
        self._over = threading.Event()
        self._signs: threading.Thread | None = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self.enabled and self.total != 0 and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        elif self.enabled and self.total != 0:
            # One unit (a method that takes hours on a batch) may last longer than the time between two lines.
            self._over.clear()
            self._signs = threading.Thread(target=self._give_signs, name="progress", daemon=True)
            self._signs.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._over.set()
        if self._signs is not None:
            self._signs.join()
            self._signs = None

    def _give_signs(self) -> None:
        while not self._over.wait(_SECONDS_BETWEEN_SIGNS):
            if time.monotonic() - self._last >= _SECONDS_BETWEEN_SIGNS:
                self._line()

    def _line(self) -> None:
        self._last = time.monotonic()
        left = self.remaining()
        ends = [] if left == float("inf") else [f"{left:.0f} s left"]
        ends += [f"at {self._at} for {self._last - self._shown:.0f} s"] if self._at else []
        total = "" if self.total is None else f" of {self.total}"
        print(f"{self.what}: {self.done}{total} done{''.join(f', {end}' for end in ends)}", file=sys.stderr, flush=True)

    def show(self, description: str) -> None:
        """Name what is being done."""
        self._at, self._shown = description, time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=description)

    def advance(self, units: int) -> None:
        """Count finished units."""
        self.done += units
        if self._bar is not None:
            self._bar.advance(self._task, units)
        elif self.enabled and time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._line()

    def reach(self, done: int, total: int) -> None:
        """Say how many units are finished, of how many, where both become known on the way."""
        self.total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self.advance(done - self.done)

    def remaining(self) -> float:
        """Seconds left at the speed so far; infinity before the first unit, and while the total is not known."""
        if self.total is None or not self.done:
            return float("inf")
        return (time.monotonic() - self._start) * (self.total - self.done) / self.done
