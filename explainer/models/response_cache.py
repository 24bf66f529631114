"""What a classifier behind a service has answered, so that no image is paid for twice."""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from explainer.errors import CheckpointError, ConfigError


class ResponseCache:
    """Answers by image, so that no image is paid for twice: the last ``size`` in memory, all of them in a file if one is given.

    It also keeps the account of how many images were asked about: with a file over all starts and processes that share it.

    Args:
        size: answers kept in memory; 0 keeps none.
        path: SQLite file that outlives the process, or None.
        identity: text that stands for the classifier; a file may hold the answers of several.
    """

    def __init__(self, size: int = 4096, path: str | Path | None = None, identity: str = "") -> None:
        if size < 0:
            raise ConfigError(f"cache_size must not be negative, received {size}.")
        self.size, self.identity = size, identity
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._file: sqlite3.Connection | None = None
        self._paid = 0
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                # Transactions are begun by hand: what is read and what is written then must be one.
                self._file = sqlite3.connect(str(path), timeout=60, isolation_level=None)
                self._file.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, scores BLOB)")
                with _transaction(self._file):
                    if not self._file.execute("SELECT name FROM sqlite_master WHERE name = 'paid'").fetchone():
                        self._file.execute("CREATE TABLE paid (identity TEXT PRIMARY KEY, number INTEGER)")
                        # A file of an older version does not say whose its answers are: they count for each classifier in it.
                        self._file.execute("INSERT INTO paid SELECT '', COUNT(*) FROM answers")
            except (OSError, sqlite3.Error) as error:
                raise CheckpointError(
                    f"response cache {path} cannot be used ({error}). Choose another cache_file, or delete it."
                ) from error

    def key(self, image: Tensor) -> str:
        """Stands for one image ``[C,H,W]`` and the classifier."""
        digest = hashlib.sha256(f"{self.identity} {tuple(image.shape)}".encode())
        digest.update(image.numpy().tobytes())
        return digest.hexdigest()

    def get(self, key: str) -> Tensor | None:
        """The stored scores ``[K]``."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        try:
            row = self._file.execute("SELECT scores FROM answers WHERE key = ?", (key,)).fetchone() if self._file is not None else None
        except sqlite3.Error as error:
            raise CheckpointError(f"the response cache cannot be read ({error}). Choose another cache_file, or delete it.") from error
        if row is None:
            return None
        try:
            scores = torch.from_numpy(np.frombuffer(row[0], dtype=np.float32).copy())
        except (TypeError, ValueError):  # not what this class writes: asked again and written anew
            return None
        if not bool(torch.isfinite(scores).all()):  # stored by an older version
            return None
        self._keep(key, scores)
        return scores

    def put(self, keys: Sequence[str], scores: Tensor) -> None:
        """Store rows of scores ``[n,K]``."""
        for key, row in zip(keys, scores, strict=True):
            self._keep(key, row.clone())
        if self._file is not None:
            with _transaction(self._file):
                rows = [(k, s.numpy().astype(np.float32).tobytes()) for k, s in zip(keys, scores, strict=True)]
                self._file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def paid(self) -> int:
        """Images that this classifier was asked about, with a file in all starts and processes."""
        if self._file is None:
            return self._paid
        try:
            row = self._file.execute("SELECT SUM(number) FROM paid WHERE identity IN (?, '')", (self.identity,)).fetchone()
            if not isinstance(row[0], int | None):
                raise sqlite3.DatabaseError(f"its account says {str(row[0])[:50]}")
        except sqlite3.Error as error:
            raise CheckpointError(f"the response cache cannot be read ({error}). Choose another cache_file, or delete it.") from error
        total: int = row[0] or 0
        return total

    def pay(self, number: int, most: int | None = None) -> bool:
        """Put images on the account (negative: take them off); False, and nothing changed, where there would be more than ``most``."""
        if self._file is None:
            if most is not None and self._paid + number > most:
                return False
            self._paid += number
            return True
        with _transaction(self._file):  # no other process counts in between
            if most is not None and self.paid() + number > most:
                return False
            self._file.execute("INSERT OR IGNORE INTO paid VALUES (?, 0)", (self.identity,))
            self._file.execute("UPDATE paid SET number = number + ? WHERE identity = ?", (number, self.identity))
        return True

    def _keep(self, key: str, scores: Tensor) -> None:
        self._memory[key] = scores
        while len(self._memory) > self.size:
            self._memory.popitem(last=False)


@contextlib.contextmanager
def _transaction(file: sqlite3.Connection) -> Iterator[None]:
    """All or nothing of what is done inside, and no other process's writing in between. Raises CheckpointError if it cannot be written."""
    try:
        file.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # sqlite may have rolled back by itself
                file.execute("ROLLBACK")
            raise
        file.execute("COMMIT")
    except sqlite3.Error as error:
        raise CheckpointError(
            f"the response cache (classifier.options.cache_file) cannot be written ({error}). Its earlier answers are untouched: free some "
            "space, make it writable, or choose another file."
        ) from error
