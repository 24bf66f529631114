"""Pictures in: which files a command means, and batches of them, decoded ahead of the network in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from explainer.data.decoding import IMAGE_SUFFIXES, read_image
from explainer.data.listing import image_files, printable, report_links
from explainer.data.transforms import resize_image
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.export.base import Array

OnError = Literal["raise", "skip"]
_AHEAD = 4  # batches decoded ahead: enough to hide the disk, few enough to stay small


@dataclass
class Picture:
    """One decoded image.

    Attributes:
        name: unique among the pictures of a run, a relative path with forward slashes.
        path: the file.
        pixels: ``[3,H,W]`` uint8, as decoded.
        small: ``[3,h,w]`` float32 in [0,1], at the network's size.
    """

    name: str
    path: Path
    pixels: Tensor
    small: Array


def find_pictures(inputs: Sequence[str | Path]) -> dict[str, Path]:
    r"""Files by a unique name: images as given, folders searched through, sorted.

    Hidden files and what systems leave in folders (``@eaDir``, ``__MACOSX``) are left out. Bytes of names that are not UTF-8 are
    written as ``\xNN``, so that results can be saved.

    Raises:
        DatasetNotFoundError: a path does not exist, or no image was found.
    """
    found: dict[str, Path] = {}
    for given in inputs:
        path = Path(given)
        if not path.exists():
            raise DatasetNotFoundError(f"{path} does not exist. Give images or folders of images.")
        if path.is_dir():
            files = image_files(path)
            report_links(path, files)
            pairs = [(printable(p.relative_to(path)), p) for p in files]
        else:
            pairs = [(printable(path.name), path)]
        for name, file in pairs:
            unique, number = name, 2
            while unique in found and found[unique] != file:
                unique, number = f"{number}_{name}", number + 1
            found[unique] = file
    if not found:
        listing = ", ".join(str(p) for p in inputs)
        raise DatasetNotFoundError(f"no images in {listing}. Known suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


def load_picture(name: str, path: Path, size: tuple[int, int]) -> Picture:
    """Decode one file and resize it as in training."""
    pixels = read_image(path)
    small = resize_image(pixels, *size).numpy().astype(np.float32) / np.float32(255)
    return Picture(name, path, pixels, small)


def batches(
    files: dict[str, Path], size: tuple[int, int], batch_size: int, on_error: OnError, failed: dict[str, str]
) -> Iterator[list[Picture]]:
    """Pictures in order, decoded by a thread while the network works.

    Args:
        failed: receives name -> reason of every file that was skipped.

    Raises:
        CorruptSampleError: the first unreadable file, if ``on_error`` is "raise".
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, received {batch_size}.")
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[str, Future[Picture]]] = deque()
        rest = iter(files.items())
        ready: list[Picture] = []

        def fill_queue() -> None:
            while len(waiting) < _AHEAD * batch_size and (item := next(rest, None)) is not None:
                waiting.append((item[0], pool.submit(load_picture, *item, size)))

        fill_queue()
        try:
            while waiting:
                name, future = waiting.popleft()
                try:
                    ready.append(future.result())
                except CorruptSampleError as error:
                    if on_error == "raise":
                        raise CorruptSampleError(f"{error} To leave out such files: --on-error skip.") from error
                    failed[name] = str(error)
                fill_queue()
                if len(ready) == batch_size:
                    yield ready
                    ready = []
        finally:
            for _, future in waiting:
                future.cancel()
        if ready:
            yield ready


def read_calibration(folder: str | Path, size: tuple[int, int], limit: int = 128) -> Array:
    """Up to ``limit`` images of a folder, spread over it evenly, as ``[N,3,H,W]`` float32 in [0,1]."""
    files = list(find_pictures([folder]).items())
    chosen = [files[i * len(files) // min(limit, len(files))] for i in range(min(limit, len(files)))]
    return np.stack([load_picture(name, path, size).small for name, path in chosen])
