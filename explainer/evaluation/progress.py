"""The progress bar of every command, with the time left; without a terminal, a line a minute."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 60.0


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
        self._start = self._last = time.monotonic()

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
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, description: str) -> None:
        """Name what is being done."""
        if self._bar is not None:
            self._bar.update(self._task, description=description)

    def advance(self, units: int) -> None:
        """Count finished units."""
        self.done += units
        if self._bar is not None:
            self._bar.advance(self._task, units)
        elif self.enabled and time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{self.what}: {self.done} of {self.total} done, {self.remaining():.0f} s left", file=sys.stderr, flush=True)

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
