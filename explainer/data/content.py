"""Digests of file contents: what makes two data sets the same. A file is read again only when the system says that it may have changed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

__all__ = ["MISSING", "content_digests", "memory_file"]

log = logging.getLogger(__name__)

MISSING = "missing"
_THREADS = 8
_CHUNK = 500  # SQLite's oldest limit on the variables of one statement is 999
# A file that was written a moment ago may be written again within the clock's resolution, so that its stamps stay the same.
_SETTLED_NS = 2_000_000_000


def memory_file() -> Path:
    """The small database of known digests: ``$EXPLAINER_CACHE``, else ``explainer`` in the user's cache folder.

    It holds digests of paths, never the paths.
    """
    own = os.environ.get("EXPLAINER_CACHE")
    if own:
        return Path(own) / "content.sqlite"
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:  # an account without a home folder, as containers have
        base = Path(tempfile.gettempdir()) / f"cache-{getattr(os, 'getuid', int)()}"
    return base / "explainer" / "content.sqlite"


def content_digests(paths: Sequence[Path]) -> list[str]:
    """BLAKE2b of each file's bytes, 32 hex digits; :data:`MISSING` where there is none.

    A digest is remembered with the file's size, modification and change times (nanoseconds), inode and device, and taken from memory
    only while all five agree. Where the memory cannot be used, every file is read.

    Args:
        paths: files, in the order of the answer.
    """
    stamps = [_stamp(path) for path in paths]
    keys = [hashlib.blake2b(os.fsencode(path.absolute()), digest_size=16).digest() for path in paths]
    known = _recall(keys)
    wanted = [i for i, stamp in enumerate(stamps) if stamp is not None and known.get(keys[i], ("", ""))[0] != stamp]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="digest") as pool:  # hashlib lets other threads run
        fresh = dict(zip(wanted, pool.map(lambda i: _digest(paths[i]), wanted), strict=True))
    settled = time.time_ns() - _SETTLED_NS
    rows = [(keys[i], stamp, fresh[i]) for i in wanted if (stamp := stamps[i]) is not None and _changed(stamp) < settled]
    _remember([row for row in rows if row[2] != MISSING])
    return [fresh[i] if i in fresh else MISSING if stamps[i] is None else known[keys[i]][1] for i in range(len(paths))]


def _stamp(path: Path) -> str | None:
    """All that changes with a file's content, as text; None where there is no file."""
    try:
        s = path.stat()
    except (OSError, ValueError):
        return None
    return f"{s.st_size},{s.st_mtime_ns},{s.st_ctime_ns},{s.st_ino},{s.st_dev}"


def _changed(stamp: str) -> int:
    """The later of a stamp's modification and change times, in nanoseconds."""
    return max(int(part) for part in stamp.split(",")[1:3])


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return MISSING


def _recall(keys: Iterable[bytes]) -> dict[bytes, tuple[str, str]]:
    """Stamp and digest of every key that is known."""
    path, found = memory_file(), {}
    if not path.is_file():
        return {}
    wanted = list(dict.fromkeys(keys))
    try:
        with closing(_open(path)) as file:
            for start in range(0, len(wanted), _CHUNK):
                part = wanted[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                for key, stamp, digest in file.execute(f"SELECT key, stamp, digest FROM content WHERE key IN ({marks})", part):
                    if isinstance(stamp, str) and isinstance(digest, str) and len(digest) == 32:
                        found[bytes(key)] = (stamp, digest)
    except (sqlite3.Error, OSError, TypeError, ValueError) as error:
        log.debug("%s cannot be used (%s): every file is read", path, error)
        return {}
    return found


def _remember(rows: Sequence[tuple[bytes, str, str]]) -> None:
    """Keep digests for the next time. A damaged memory is written anew: it can be computed again."""
    if not rows:
        return
    path = memory_file()
    for attempt in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(_open(path)) as file, file:
                file.execute("CREATE TABLE IF NOT EXISTS content (key BLOB PRIMARY KEY, stamp TEXT, digest TEXT) WITHOUT ROWID")
                file.executemany("INSERT OR REPLACE INTO content VALUES (?, ?, ?)", rows)
            return
        except sqlite3.OperationalError as error:  # locked, read-only, full: another time
            log.debug("%s cannot be written (%s)", path, error)
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # which is a table of another form
                return
        except sqlite3.DatabaseError as error:
            log.debug("%s is damaged (%s): it is written anew", path, error)
        except OSError as error:
            log.debug("%s cannot be written (%s)", path, error)
            return
        if attempt == 0:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=5)
