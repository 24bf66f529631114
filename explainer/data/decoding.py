"""Reading files that strangers made: bounded, without side effects, and with errors that name the file.

Every failure is a :class:`CorruptSampleError` (or :class:`DatasetNotFoundError` for a list that is missing), so that a bad file
can be skipped or reported but never surfaces as a traceback from a codec.
"""

from __future__ import annotations

import io
import math
import stat
import warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from torch import Tensor

from explainer.errors import CorruptSampleError, DatasetNotFoundError
from explainer.files import parse_json

__all__ = [
    "Stored",
    "home_path",
    "image_facts",
    "image_size",
    "join_inside",
    "read_image",
    "read_json",
    "read_label_map",
    "read_lines",
    "read_scaled",
    "read_xml",
]

MAX_PIXELS = 64_000_000
MAX_SIDE = 32_768
MAX_FILE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 64 * 2**20
MAX_JSON_BYTES = 2 * 2**30
MAX_XML_BYTES = 8 * 2**20
MAX_XML_DEPTH = 32
# Raster formats only: PostScript, PDF and the like run interpreters.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "MPO")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


@dataclass(frozen=True)
class Stored:
    """A file's bytes that do not lie in a file of their own, with the name that messages call them by."""

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


def home_path(path: str | Path) -> Path:
    """The path, a leading ``~`` or ``~user`` replaced by that home folder.

    Raises:
        DatasetNotFoundError: there is none.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DatasetNotFoundError(f"{path}: {error}. Write the path in full.") from error


def join_inside(root: Path, name: str, source: Path | str) -> Path:
    """``root / name`` for a relative name read from ``source`` (a list or an annotation).

    Raises:
        CorruptSampleError: the name is empty, absolute, has a drive, a backslash or a control character, or climbs out with "..".
    """
    parts = PurePosixPath(name).parts
    climbs = ".." in parts or name.startswith(("/", "~")) or "\\" in name or (len(name) > 1 and name[1] == ":")
    if not parts or climbs or any(ord(c) < 32 or ord(c) == 127 for c in name) or len(name) > 1024:
        raise CorruptSampleError(
            f"{source}: the file name {name[:200]!r} is not a plain path below {root}. Names in lists and annotations must be relative "
            "and without '..', backslashes or control characters."
        )
    return root / name


def _open(path: Path | Stored, what: str) -> Image.Image:
    """The opened, not yet decoded image, after all checks that need no decoding."""
    try:
        length = len(path.data) if isinstance(path, Stored) else path.stat().st_size if path.is_file() else None
    except (OSError, ValueError) as error:
        raise CorruptSampleError(f"{path}: {what} cannot be opened ({error}).") from error
    if length is None:
        raise CorruptSampleError(f"{path}: {what} is missing. Restore the file, or remove it from the list or annotation that names it.")
    if length == 0:
        raise CorruptSampleError(f"{path}: {what} is empty (0 bytes). Copy it again.")
    if length > MAX_FILE_BYTES:
        raise CorruptSampleError(f"{path}: {what} has {length} bytes, more than the limit of {MAX_FILE_BYTES}. Re-encode it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
            Image.init()  # Pillow loads its plug-ins late and answers a bad file with KeyError for those it has not met yet
            source = io.BytesIO(path.data) if isinstance(path, Stored) else path
            image = Image.open(source, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise CorruptSampleError(f"{path}: {what} claims more pixels than the limit of {MAX_PIXELS}. Resize it first.") from error
    except Exception as error:  # codecs raise whatever they like on hostile bytes
        raise CorruptSampleError(
            f"{path}: {what} is not a readable image ({_short(error, path)}). Known formats: {', '.join(FORMATS)}."
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        image.close()
        raise CorruptSampleError(
            f"{path}: {what} is {width} x {height} pixels, over the limit of {MAX_PIXELS} pixels or {MAX_SIDE} a side. Resize it first."
        )
    return image


def _short(error: Exception, path: Path | Stored) -> str:
    return (str(error).replace(repr(str(path)), "").strip() or type(error).__name__)[:200]


def image_size(path: Path | Stored) -> tuple[int, int]:
    """``(height, width)`` as :func:`read_image` returns it, from the header alone."""
    with _open(path, "the image") as image:
        return _seen_size(image)


def image_facts(path: Path | Stored) -> tuple[int, int, str, str]:
    """``(height, width, mode, format)`` from the header, e.g. (480, 640, "RGB", "JPEG")."""
    with _open(path, "the image") as image:
        return *_seen_size(image), image.mode, image.format or "unknown"


def _seen_size(image: Image.Image) -> tuple[int, int]:
    """``(height, width)`` of a picture that is not decoded yet, as it is meant to be seen."""
    width, height = image.size
    if not _turned(image):
        return height, width
    stored = getattr(image, "tag_v2", None)
    if stored is not None:  # a TIFF's size is turned already in newer versions of Pillow
        width, height = stored[Base.ImageWidth], stored[Base.ImageLength]
    return width, height


def _turned(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return False


def read_image(path: str | Path) -> Tensor:
    """Decode to uint8 ``[3,H,W]`` RGB.

    EXIF rotation is applied; grey, palette, CMYK, YCbCr and 1-bit become RGB; 16-bit grey is scaled to 8; alpha is composed on
    white (the colours under transparent pixels are arbitrary); of an animation the first frame is taken.

    Raises:
        CorruptSampleError: missing, empty, truncated, too large, not an image, or float pixels of unknown range.
    """
    return read_scaled(path)[0]


def read_scaled(path: str | Path | Stored, at_least: int | None = None, most: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """As :func:`read_image`, decoded at a fraction of its size where that is enough, and the size in the file.

    JPEG decodes to a half, a quarter or an eighth directly, which saves time and memory; other formats are averaged over blocks.

    Args:
        path: the image.
        at_least: both sides keep at least this many pixels; None: all. Give twice what is wanted: resizing then does the rest without
            a visible difference.
        most: number of pixels above which the image is reduced in any case.

    Returns:
        The pixels, and (height, width) of the image at full size.

    Raises:
        CorruptSampleError: see :func:`read_image`.
    """
    path = Path(path) if isinstance(path, str) else path
    with _open(path, "the image") as image:
        own = _seen_size(image)
        try:
            array = np.asarray(_decoded(image, path, at_least, most), dtype=np.uint8)
        except CorruptSampleError:
            raise
        except Exception as error:
            raise CorruptSampleError(
                f"{path}: the image is damaged or truncated ({_short(error, path)}). Copy or export it again."
            ) from error
    return torch.from_numpy(array.transpose(2, 0, 1).copy()), own


def _decoded(image: Image.Image, path: Path | Stored, at_least: int | None, most: int | None) -> Image.Image:
    """RGB and upright, reduced by a whole factor."""
    width, height = image.size
    factor = min(width, height) // at_least if at_least else 1
    if most is not None and width * height > most:
        factor = max(factor, math.ceil(math.sqrt(width * height / most)))
    if factor > 1:
        image.draft(None, (math.ceil(width / factor), math.ceil(height / factor)))  # does nothing for other formats than JPEG
    image.load()
    factor = max(1, factor * image.width // width)
    early = factor > 1 and image.mode in ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")  # before copies in full size are made
    image = image.reduce(factor) if early else image
    image = _to_rgb(_upright(image), path)
    return image.reduce(factor) if factor > 1 and not early else image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        return image


def _to_rgb(image: Image.Image, path: Path | Stored) -> Image.Image:
    if image.mode == "F":
        raise CorruptSampleError(f"{path}: the image has float pixels of unknown range. Save it with 8 or 16 bits.")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise CorruptSampleError(f"{path}: grey values {values.min()} to {values.max()} exceed 16 bits. Save it with 8 or 16 bits.")
        grey = np.empty(values.shape, dtype=np.uint8)
        for row in range(0, len(values), 256):  # in parts, because the sums need four bytes a pixel
            grey[row : row + 256] = (values[row : row + 256].astype(np.int32) + 128) // 257
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_label_map(path: Path | Stored, size: tuple[int, int] | None = None, image: Path | Stored | None = None) -> Tensor:
    """Decode a mask to uint8 ``[H,W]``: palette indices, or the grey values of 1-, 8- or 16-bit files (not above 255).

    Args:
        path: the mask file.
        size: ``(height, width)`` of its image, checked where given.
        image: the image's path, for the message.
    """
    with _open(path, "the mask") as mask:
        if mask.mode not in ("P", "L", "1") and not mask.mode.startswith("I"):
            raise CorruptSampleError(
                f"{path}: the mask has mode {mask.mode}; expected one channel of class indices (palette or grey PNG), not colours."
            )
        if size is not None and (mask.height, mask.width) != size:
            raise CorruptSampleError(
                f"{path}: the mask is {mask.height} x {mask.width} (height x width), its image {image or ''} is {size[0]} x {size[1]}. "
                "Both must have the same size."
            )
        try:
            array = np.array(mask)
        except Exception as error:
            raise CorruptSampleError(
                f"{path}: the mask is damaged or truncated ({_short(error, path)}). Copy or export it again."
            ) from error
    if array.ndim != 2 or array.min() < 0 or array.max() > 255:
        raise CorruptSampleError(f"{path}: mask values must lie in 0..255, found {array.min()} to {array.max()}.")
    return torch.from_numpy(array.astype(np.uint8))


def _read_bytes(path: Path, limit: int) -> bytes:
    try:
        status = path.stat()
        length = status.st_size
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a pipe or a device may never end
            raise CorruptSampleError(f"{path} is no file but a pipe, a socket or a device. Save its content as a file.")
        if length > limit:
            raise CorruptSampleError(f"{path}: {length} bytes exceed the limit of {limit} for such a file.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DatasetNotFoundError(f"{path} does not exist. Restore it from the data set's archive.") from error
    except (OSError, ValueError) as error:
        raise CorruptSampleError(f"{path} cannot be read ({error}).") from error


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 list, stripped."""
    try:
        text = _read_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorruptSampleError(f"{path}: not UTF-8 text (byte {error.start}). Save the list as UTF-8.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """The parsed JSON file."""
    try:
        return parse_json(_read_bytes(path, MAX_JSON_BYTES))
    except ValueError as error:
        raise CorruptSampleError(f"{path}: not valid JSON ({str(error)[:200]}). Download or export it again.") from error


def read_xml(path: Path) -> ElementTree.Element:
    """The root element. Document types (and with them entities, which can grow without bound or read files) are refused."""
    builder, depth = ElementTree.TreeBuilder(), 0
    parser = expat.ParserCreate()

    def refuse(*_: Any) -> None:
        raise CorruptSampleError(f"{path}: the annotation declares a document type, which is refused. Remove the <!DOCTYPE ...> block.")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_XML_DEPTH:
            raise CorruptSampleError(f"{path}: the annotation is nested deeper than {MAX_XML_DEPTH} elements.")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    try:
        parser.Parse(_read_bytes(path, MAX_XML_BYTES), True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as error:
        raise CorruptSampleError(f"{path}: not valid XML ({error}). Restore the annotation from the data set's archive.") from error
