"""How the C library hands out large blocks of memory, which decides the speed of convolutions on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

#: Parameters of glibc's mallopt (malloc.h): trim the heap, and blocks that the system maps one by one.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
#: With one of these the user has decided.
DECIDED = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Let this process keep freed blocks for the next ones instead of giving them back to the system. Whether that was possible.

    glibc has the system map each block above 32 MiB anew, and every page of it is cleared when it is first touched. The features of a
    batch of photographs are such blocks: on a CPU a convolutional network's passes over 64 photographs spent more than half of their time
    there (``tests/benchmarks/bench_pages.py``). Blocks from the heap, which is not trimmed, are used again as they are. The peak of memory
    grew by a tenth to a quarter with one thread; each further thread and each forked worker process keeps its own peak. What was freed is
    the system's again when the process ends.

    The heap also breaks into pieces that are too small for the next block, and grows: iGOS++ went from 4.4 to 11 GiB in a quarter of an
    hour. A :class:`Trimmer` gives those pieces back now and then.

    Nothing happens outside glibc, or where one of :data:`DECIDED` is set.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in DECIDED):
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        libc = ctypes.CDLL(None)
        if libc.mallopt(_MMAP_MAX, 0) and libc.mallopt(_TRIM_THRESHOLD, -1):
            Trimmer(_resident, lambda: libc.malloc_trim(0)).start()
            return True
    return False


class Trimmer(threading.Thread):
    """Gives free pages back to the system when the process has grown by a fifth since it last did.

    The pages that a pass needs come back with that pass, once; what fragments held does not. So work whose memory is steady is never
    disturbed, and growth is bounded.

    Args:
        resident: bytes of memory that the process holds.
        trim: gives free pages back.
        every: seconds between two looks.
    """

    GROWN = 1.2

    def __init__(self, resident: Callable[[], int], trim: Callable[[], object], every: float = 30.0) -> None:
        super().__init__(name="trimmer", daemon=True)
        self.resident, self.trim, self.every = resident, trim, every
        self._steady: int | None = None

    def look(self) -> bool:
        """Trim if the process has grown. Whether it did."""
        now = self.resident()
        if self._steady is None:  # the first look, and the one after a trim, when the pages in use are back
            self._steady = now
        elif now > self.GROWN * self._steady:
            self.trim()
            self._steady = None
            return True
        return False

    def run(self) -> None:
        """Look for ever; a daemon thread ends with its process."""
        while True:
            time.sleep(self.every)
            self.look()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
