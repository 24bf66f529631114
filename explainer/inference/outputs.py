"""Where results go: asked before the work, so that an hour's result is not lost to a folder that cannot be written."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from explainer.errors import ConfigError


def writable_folder(path: str | Path, option: str = "--out") -> Path:
    """``path``, once a file can be created in it or, where it does not exist yet, in the nearest folder above that does. Nothing is made.

    Raises:
        ConfigError: it is no folder, or cannot be written.
    """
    folder = Path(path)
    existing = next((p for p in (folder, *folder.absolute().parents) if p.exists()), folder)
    try:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(existing))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(f"{option} {folder} cannot be written ({reason(error)}). Choose another folder.") from error
    return folder


def writable_file(path: str | Path, option: str = "--out") -> Path:
    """The file ``path``, which may exist; see :func:`writable_folder`.

    Raises:
        ConfigError: it is a folder, or cannot be written.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(f"{option} {file} is a folder. Name a file in it.")
    writable_folder(file.parent, option)
    if file.exists() and not os.access(file, os.W_OK):
        raise ConfigError(f"{option} {file} cannot be written (permission denied). Choose another file.")
    return file


def reason(error: OSError) -> str:
    """Why, in words, and where."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"
