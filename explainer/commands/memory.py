"""How the C library hands out large blocks of memory, which decides the speed of convolutions on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

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

    Nothing happens outside glibc, or where one of :data:`DECIDED` is set.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in DECIDED):
        return False
    with contextlib.suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
    return False
