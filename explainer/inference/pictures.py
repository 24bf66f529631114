"""Pictures in: which files a command means, and batches of them, decoded ahead of the network in a thread."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from explainer.data.decoding import IMAGE_SUFFIXES, image_size, read_scaled
from explainer.data.listing import image_files, printable, report_links
from explainer.data.transforms import place_image
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.files import shortened
from explainer.geometry import Placement, placement
from explainer.inference.formats import Array

OnError = Literal["raise", "skip"]
MOST_PIXELS = 16_000_000  # of a picture in memory; larger ones are reduced, their masks keep the file's size
_OURS = re.compile(r"contact_sheet_\d+\.png")  # what lies beside the pictures' folders in the results
_AHEAD = 4  # batches decoded ahead: enough to hide the disk, few enough to stay small
_BYTES = 256 * 2**20  # of pictures waiting, and of pictures in a batch, whatever their number


@dataclass
class Picture:
    """One decoded image.

    Attributes:
        name: unique among the pictures of a run, a relative path with forward slashes.
        path: the file.
        pixels: ``[3,H',W']`` uint8, as decoded; at most :data:`MOST_PIXELS` of them.
        small: ``[3,h,w]`` float32 in [0,1], at the network's size.
        place: where the picture, at the size in its file, lies in ``small``.
    """

    name: str
    path: Path
    pixels: Tensor
    small: Array
    place: Placement

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in the file."""
        return self.place.picture

    @property
    def inside(self) -> tuple[slice, slice]:
        """The rows and columns of the network's image that are not padding."""
        top, left, height, width = self.place.target
        return slice(top, top + height), slice(left, left + width)


def find_pictures(inputs: Sequence[str | Path]) -> dict[str, Path]:
    r"""Files by a unique name: images as given, folders searched through, sorted.

    Hidden files and what systems leave in folders (``@eaDir``, ``__MACOSX``) are left out. Bytes of names that are not UTF-8 are
    written as ``\xNN``, so that results can be saved; each part of a name can be that of a folder, and is none of a file of results.

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
            name = "/".join(shortened(part, 240) for part in name.split("/"))
            unique, number = name, 2
            while (unique in found and found[unique] != file) or _OURS.fullmatch(unique):
                unique, number = f"{number}_{name}", number + 1
            found[unique] = file
    if not found:
        listing = ", ".join(str(p) for p in inputs)
        raise DatasetNotFoundError(f"no images in {listing}. Known suffixes: {' '.join(sorted(IMAGE_SUFFIXES))}.")
    return found


def outside(files: dict[str, Path], inputs: Sequence[str | Path], out: Path) -> dict[str, Path]:
    """The pictures without what earlier calls have written below ``out``, where that lies in a folder of pictures.

    Args:
        files: what :func:`find_pictures` returns.
        inputs: what it was given; a file that is named there stays.
        out: where results are written.

    Raises:
        ConfigError: ``out`` is a folder of pictures itself.
        DatasetNotFoundError: no picture is left.
    """
    place, given = out.resolve(), [Path(path) for path in inputs]
    if any(path.is_dir() and path.resolve() == place for path in given):
        raise ConfigError(f"--out {out} is the folder of the images: the next call would explain the masks too. Name {out / 'masks'}, say.")
    kept = {name: path for name, path in files.items() if path in given or not path.parent.resolve().is_relative_to(place)}
    if not kept:
        raise DatasetNotFoundError(
            f"all images in {', '.join(map(str, inputs))} lie in --out {out}, where masks are written. Name another."
        )
    return kept


def load_picture(name: str, path: Path, size: tuple[int, int], geometry: str = "squash") -> Picture:
    """Decode one file and bring it to the network's ``size`` by the geometry of its training."""
    pixels, own = read_scaled(path, most=MOST_PIXELS)
    place = placement(geometry, own, size)
    small = place_image(pixels, place).numpy().astype(np.float32) / np.float32(255)
    return Picture(name, path, pixels, small, place)


def _bytes(path: Path) -> int:
    """What :func:`load_picture` will keep, from the file's header; 0 for a file that it will refuse."""
    try:
        height, width = image_size(path)
    except CorruptSampleError:
        return 0
    return 3 * min(height * width, MOST_PIXELS)


def batches(
    files: dict[str, Path],
    size: tuple[int, int],
    batch_size: int,
    *,
    on_error: OnError,
    failed: dict[str, str],
    geometry: str = "squash",
) -> Iterator[list[Picture]]:
    """Pictures in order, decoded by a thread while the network works; fewer than ``batch_size`` at a time where they are very large.

    Args:
        files: names and paths, see :func:`find_pictures`.
        size: (height, width) of the network's image.
        batch_size: pictures per list, at most.
        on_error: "raise" stops at an unreadable file, "skip" leaves it out.
        failed: receives name -> reason of every file that was skipped.
        geometry: how a picture becomes an image (:mod:`explainer.geometry`).

    Raises:
        CorruptSampleError: the first unreadable file, if ``on_error`` is "raise".
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, received {batch_size}.")
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode") as pool:
        waiting: deque[tuple[str, int, Future[Picture]]] = deque()
        rest = deque(files.items())
        ready: list[Picture] = []

        def fill_queue() -> None:
            held = sum(cost for _, cost, _ in waiting)
            while rest and len(waiting) < _AHEAD * batch_size:
                name, path = rest[0]
                cost = _bytes(path)
                if waiting and held + cost > _BYTES:
                    break
                rest.popleft()
                held += cost
                waiting.append((name, cost, pool.submit(load_picture, name, path, size, geometry)))

        fill_queue()
        try:
            while waiting:
                name, _, future = waiting.popleft()
                try:
                    ready.append(future.result())
                except CorruptSampleError as error:
                    if on_error == "raise":
                        raise CorruptSampleError(f"{error} To leave out such files: --on_error skip.") from error
                    failed[name] = str(error)
                fill_queue()
                if len(ready) == batch_size or sum(p.pixels.numel() for p in ready) > _BYTES:
                    yield ready
                    ready = []
        finally:
            for _, _, future in waiting:
                future.cancel()
        if ready:
            yield ready


def read_calibration(folder: str | Path, size: tuple[int, int], limit: int = 128, geometry: str = "squash") -> Array:
    """Up to ``limit`` images of a folder, spread over it evenly, as ``[N,3,H,W]`` float32 in [0,1]."""
    files = list(find_pictures([folder]).items())
    chosen = [files[i * len(files) // min(limit, len(files))] for i in range(min(limit, len(files)))]
    return np.stack([load_picture(name, path, size, geometry).small for name, path in chosen])
