"""Which files of a folder are images: without what systems and tools leave there, and with names that can be written down."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from explainer.data.decoding import IMAGE_SUFFIXES
from explainer.errors import DatasetNotFoundError

__all__ = ["image_files", "printable", "report_links", "subfolders"]

log = logging.getLogger(__name__)

# Thumbnails of network storage, archives packed on a Mac, deleted files. Names with a dot in front (.ipynb_checkpoints, ._photo.jpg,
# .DS_Store, .Trash-1000) need no list.
_SYSTEM = frozenset({"@eadir", "#recycle", "#snapshot", "__macosx", "$recycle.bin", "system volume information", "lost+found", "thumbs.db"})


# What cameras and phones write and Pillow does not read: who has them in a folder means them as photographs.
_OF_CAMERAS = frozenset({".heic", ".heif", ".avif", ".jxl", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"})


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is no one's data."""
    return name.startswith(".") or name.lower() in _SYSTEM


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in ``folder`` that are not hidden, sorted."""
    return sorted(p.name for p in folder.iterdir() if not hidden(p.name) and p.is_dir())


def image_files(folder: Path) -> list[Path]:
    """All images below ``folder``, sorted. Hidden names below it are left out; what lies above it does not matter. Links that lead nowhere
    and photographs in formats that are not read are left out and said.

    Raises:
        DatasetNotFoundError: a folder cannot be read: its images would be missing in silence.
    """
    files: list[Path] = []
    others: list[Path] = []
    strange: list[Path] = []
    for path in _walk(folder):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            (files if path.is_file() else others).append(path)
        elif path.suffix.lower() in _OF_CAMERAS:
            strange.append(path)
    if strange:
        log.warning(
            "%d photograph(s) in %s are in formats that are not read (%s), the first %s. They are left out: convert them to JPEG or PNG.",
            len(strange),
            folder,
            ", ".join(sorted({path.suffix.lower() for path in strange})),
            printable(min(strange)),
        )
    if lost := sorted(path for path in others if path.is_symlink()):
        log.warning(
            "%d image(s) in %s are links that lead nowhere, the first %s. They are left out.", len(lost), folder, printable(lost[0])
        )
    return sorted(files)


def _refuse(error: OSError) -> NoReturn:
    raise DatasetNotFoundError(
        f"folder {printable(error.filename)} cannot be read ({error.strerror}): its images would be missing. Make it "
        "readable, or move it away."
    ) from error


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, onerror=_refuse):  # does not follow links to folders, so that it ends
        folders[:] = [name for name in folders if not hidden(name)]
        for name in files:
            path = Path(parent, name)
            if not hidden(name):
                yield path


def printable(path: Path | str) -> str:
    r"""A path as text that every file can hold: bytes that are not UTF-8 become ``\xNN``. "/" separates its parts."""
    return os.fsencode(Path(path).as_posix()).decode("utf-8", "backslashreplace")


def report_links(root: Path, paths: Iterable[Path]) -> None:
    """Say how many of the paths are symbolic links whose targets lie outside ``root``: someone else's file may be shown."""
    base = root.resolve()
    away = [p for p in paths if p.is_symlink() and not p.resolve().is_relative_to(base)]
    if away:
        log.warning(
            "%d file(s) in %s are symbolic links that leave it, the first %s -> %s. They are read as if they lay there.",
            len(away),
            root,
            printable(away[0]),
            printable(away[0].resolve()),
        )
