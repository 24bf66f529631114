"""Files that are whole or not there: one atomic writer for checkpoints, caches, results, pages and exports.

A file is written beside its place under a name that says who writes it, made durable and renamed. At every moment the place
holds the old file or the new one. What a killed process left is recognised by its owner and removed by the next writer in
that folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = [
    "Owner",
    "clear_leftovers",
    "parse_json",
    "partial_folder",
    "replacing",
    "second_name",
    "shortened",
    "sync_folder",
    "write_json",
    "write_text",
]

_SUFFIX, _BETWEEN = ".tmp", "~"
#: A file of another machine that nobody has written to for so long (seconds) is taken for left behind.
_FORGOTTEN = 86_400.0
_cleared: set[tuple[int, Path]] = set()  # (process, folder): cleared on the first write into it


class Owner:
    """A process of a machine, in words that another process can check.

    Args:
        host: name of the machine.
        pid: number that the system gave the process.
        start: when it started, in the system's own unit (0 where the system does not say): a number that is used again
            belongs to another process then.
    """

    def __init__(self, host: str, pid: int, start: int) -> None:
        self.host, self.pid, self.start = host, pid, start

    @classmethod
    def this(cls) -> Owner:
        """The process that asks."""
        return cls(socket.gethostname() or "localhost", os.getpid(), _started(os.getpid()) or 0)

    @classmethod
    def of(cls, text: str) -> Owner | None:
        """The owner that ``str`` wrote, or None for other words."""
        parts = text.split(_BETWEEN)
        if len(parts) != 3 or not all(p.isascii() and p.isdecimal() and len(p) < 20 for p in parts[1:]) or int(parts[1]) == 0:
            return None
        return cls(parts[0], int(parts[1]), int(parts[2]))

    def __str__(self) -> str:
        return _BETWEEN.join((self.host, str(self.pid), str(self.start)))

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == (socket.gethostname() or "localhost")

    @property
    def ended(self) -> bool:
        """Whether it certainly runs no more; a process of another machine cannot be asked."""
        if not self.here:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except (PermissionError, OverflowError):
            return False
        started = _started(self.pid)
        return bool(self.start and started and started != self.start)


def _started(pid: int) -> int | None:
    """When a process started (Linux: clock ticks after boot), or None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] == "Z" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def shortened(name: str, most: int) -> str:
    """A name of at most ``most`` bytes (file systems allow 255): the beginning of a longer one, with a part of its hash."""
    content = os.fsencode(name)
    if len(content) <= most:
        return name
    return content[: most - 9].decode("utf-8", "ignore") + "-" + hashlib.sha256(content).hexdigest()[:8]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{shortened(path.name, 100)}{_BETWEEN}{Owner.this()}{_BETWEEN}{uuid.uuid4().hex[:8]}{_SUFFIX}")


def _owner_of(path: Path) -> Owner | None:
    """Who writes this temporary file; None for any other file."""
    if not (path.name.startswith(".") and path.name.endswith(_SUFFIX)):
        return None
    return Owner.of(_BETWEEN.join(path.name.removesuffix(_SUFFIX).split(_BETWEEN)[-4:-1]))


def clear_leftovers(folder: str | Path) -> list[Path]:
    """Remove from this folder (not from those below) what processes that have ended were writing.

    Returns:
        What was removed.
    """
    removed = []
    with contextlib.suppress(OSError):
        for path in Path(folder).iterdir():
            owner = _owner_of(path)
            if owner is None or not (owner.ended or (not owner.here and _forgotten(path))):
                continue
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                removed.append(path)
    return removed


def _forgotten(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > _FORGOTTEN
    return False


def _prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    key = (os.getpid(), folder.absolute())
    if key not in _cleared:
        _cleared.add(key)
        clear_leftovers(folder)


@contextlib.contextmanager
def replacing(path: str | Path, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary stream whose content takes the place of ``path`` at once when the block ends without an error.

    Args:
        path: the file; its folder is made.
        durable: make the bytes outlive a power cut before they take the place. False for what is cheap to make again.

    Raises:
        OSError: the file cannot be written; what was at ``path`` is untouched and nothing is left beside it.
    """
    path = Path(path)
    _prepare(path.parent)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(path)  # a write does not say of which file
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: str | Path, text: str, durable: bool = True) -> None:
    """Replace a text file (UTF-8) at once: readers see the old or the new text, never a part. See :func:`replacing`."""
    with replacing(path, durable) as stream:
        stream.write(text.encode("utf-8"))


def write_json(path: str | Path, value: Any, durable: bool = True) -> None:
    """Replace a JSON file at once. NaN and infinity, which JSON does not know and other readers refuse, are null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n", durable)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str | bytes) -> Any:
    """``json.loads`` of what a stranger may have written.

    Raises:
        ValueError: not JSON; also for bytes that are no text, and for nesting at which recursion ends.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def second_name(path: Path, other: Path) -> None:
    """Give ``path`` the second name ``other``, at once; where there are no hard links, copy it."""
    temporary = _temporary(other)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(other)
    finally:
        # Also after success: renaming one name of a file to another name of the same file does nothing.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def partial_folder(parent: str | Path) -> Iterator[Path]:
    """A new folder inside ``parent`` for files that belong together and are moved to their places once all are whole.

    It is removed in the end with what is still in it, or by the next writer if this process is killed.
    """
    _prepare(Path(parent))
    folder = _temporary(Path(parent) / "partial")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
