"""An exported Explainer in onnxruntime, without torch: this file needs numpy, Pillow and onnxruntime only and may be copied alone
(with :mod:`explainer.errors` and :mod:`explainer.geometry`) into a service.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from explainer.errors import CheckpointError, ConfigError, CorruptSampleError, NumericalError, ShapeError
from explainer.geometry import GEOMETRIES, PADDING, Placement, as_size, height_width, placement

Array = NDArray[np.float32]
# The limits and formats of explainer.data.decoding, which needs torch; a test keeps both equal.
_MAX_PIXELS = 64_000_000
_MAX_SIDE = 32_768
_MAX_BYTES = 256 * 2**20
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "MPO")


class Predictor:
    """Class masks of images, from a ``.onnx`` file that ``explainer export`` wrote.

    Args:
        path: the file, or the export folder that holds it.
        threads: number of threads in one call; None lets onnxruntime choose.
        providers: execution providers of onnxruntime, default the CPU's.

    Attributes:
        classes: names in the order of the masks.
        size: ``(height, width)`` the file is fixed to, or None if it takes any.
        description: all that was stored with the file.

    Example:
        >>> predictor = Predictor("model.onnx")                # doctest: +SKIP
        >>> result = predictor("street.jpg")                   # doctest: +SKIP
        >>> result["masks"][predictor.classes.index("car")]    # [H,W] in [0,1], at the photograph's resolution  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, threads: int | None = None, providers: tuple[str, ...] = ("CPUExecutionProvider",)) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(f"onnxruntime is not installed ({error}). pip install onnxruntime") from error
        path = _model_file(Path(path))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
            stored = self._session.get_modelmeta().custom_metadata_map
            self.description: dict[str, Any] = check_description(json.loads(stored["explainer"]), path)
        except CheckpointError:
            raise
        except Exception as error:  # onnxruntime raises its own types for damaged files; a foreign file lacks the description
            raise CheckpointError(
                f"{path} is not a model written by `explainer export --format onnx` ({type(error).__name__}: {str(error)[:200]})."
            ) from error
        self._path = path
        self._input = self._session.get_inputs()[0].name
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.classes: list[str] = list(self.description["classes"])
        size = self.description.get("size")
        self.size: tuple[int, int] | None = (int(size[0]), int(size[1])) if size else None

    def run(self, images: Array) -> dict[str, Array]:
        """``[B,3,H,W]`` float32 in [0,1] -> ``masks`` ``[B,K,H,W]``; fused files also probabilities, merged and areas. A file of the most
        probable classes (``--top N``) also gives ``classes`` ``[B,N]``, and masks and areas of these, in their order.

        Raises:
            CheckpointError: see :func:`answered`.
        """
        batch = {self._input: np.ascontiguousarray(images, dtype=np.float32)}
        return answered(
            lambda: dict(zip(self._outputs, self._session.run(self._outputs, batch), strict=True)), self.description, images, self._path
        )

    def __call__(self, image: str | Path | Image.Image | NDArray[Any], side: int | None = None) -> dict[str, Array]:
        """One image -> its class masks ``[K,H,W]`` (and merged mask) at the image's own resolution, probabilities and areas ``[K]``; of
        a file of the most probable classes, ``classes`` ``[N]`` and the masks and areas of these.

        Args:
            image: a file, a PIL image, or an array ``[H,W,3]``: uint8, uint16, whole numbers in 0..255 or floats in [0,1].
            side: square side in pixels at which the network runs, for files that take any size. Default: the side it was trained at.

        Raises:
            CorruptSampleError: not an image, damaged, too large, or of an unknown range.
            ShapeError: an array of another shape or range.
            NumericalError: the model answers NaN.
        """
        picture = _picture(image)
        if self.size is not None:
            height, width = self.size
        else:
            trained = side or self.description.get("image_size")
            height, width = height_width(trained) if trained else (picture.height, picture.width)
        place = placement(self.description.get("geometry") or "squash", (picture.height, picture.width), (height, width))
        batch = np.asarray(_placed(picture, place), dtype=np.float32).transpose(2, 0, 1)[None] / np.float32(255)
        result = {name: value[0] for name, value in self.run(batch).items()}
        if "masks" not in result:
            raise CheckpointError(f"{self._path} answers {', '.join(result)} and no masks: it is no Explainer.")
        if not all(np.isfinite(value).all() for value in result.values()):
            raise NumericalError("the model's answer is NaN or infinite: its weights are damaged. Export again from another checkpoint.")
        top, left, inner_height, inner_width = place.target
        seen = result["masks"][:, top : top + inner_height, left : left + inner_width]
        if place.padded or "areas" not in result:
            result["areas"] = seen.mean(axis=(1, 2))
        result["masks"] = np.stack([_in_picture(mask, place) for mask in result["masks"]])
        if "merged" in result:
            result["merged"] = _in_picture(result["merged"], place)
        return result


def _model_file(path: Path) -> Path:
    """The file itself, or the one that an export folder holds."""
    found = [path] if path.is_file() else sorted(path.glob("*.onnx"))
    named = [p for p in found if p.name == "model.onnx"] or found
    if len(named) == 1:
        return named[0]
    if path.is_dir():
        listing = ", ".join(p.name for p in found) or "none"
        raise CheckpointError(f"{path} holds {len(found)} .onnx files ({listing}), expected model.onnx or exactly one. Give the file.")
    raise CheckpointError(f"{path} does not exist. Write it with `explainer export MODEL --format onnx --out FOLDER`.")


def _placed(picture: Image.Image, place: Placement) -> Image.Image:
    """The network's image."""
    top, left, height, width = place.source
    if place.cropped:
        picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((place.target[3], place.target[2]), Image.Resampling.BILINEAR)
    if not place.padded:
        return picture
    padded = Image.new("RGB", (place.size[1], place.size[0]), PADDING)
    padded.paste(picture, (place.target[1], place.target[0]))
    return padded


def _in_picture(mask: Array, place: Placement) -> Array:
    """A mask of the network's image in the picture's own pixels; 0 where the network saw nothing."""
    top, left, height, width = place.target
    mask = _resized(mask[top : top + height, left : left + width], (place.source[3], place.source[2]))
    if not place.cropped:
        return mask
    whole = np.zeros(place.picture, dtype=np.float32)
    top, left, height, width = place.source
    whole[top : top + height, left : left + width] = mask
    return whole


def answered(compute: Callable[[], Mapping[str, Any]], description: dict[str, Any], images: Array, path: Any) -> dict[str, Array]:
    """What a model answers, masks at the images' size.

    Args:
        compute: asks the runtime; outputs by name.
        description: stored with the file, see :func:`check_description`.
        images: ``[B,3,H,W]`` that it is asked about.
        path: path of the file.

    Raises:
        CheckpointError: the runtime fails, or the answer has not the form that the description promises.
    """
    again = "The file is damaged, or made for other images: export it again."
    try:
        result = {name: np.asarray(value) for name, value in compute().items()}
    except Exception as error:  # runtimes raise their own types
        raise CheckpointError(f"{path} failed on images {images.shape} ({' '.join(str(error).split())[:300]}). {again}") from error
    batch, names = len(images), len(description["classes"]) or -1  # a module that is only timed names none
    own = description.get("top") or names
    forms = {"masks": (batch, own, -1, -1), "probabilities": (batch, names), "areas": (batch, own), "merged": (batch, -1, -1)}
    for name, form in {**forms, "classes": (batch, own)}.items():
        if name not in result and name not in description["outputs"]:
            continue
        shape = result[name].shape if name in result else ()
        numbers = name in result and result[name].dtype.kind in "fiu"
        if not numbers or len(shape) != len(form) or 0 in shape or any(n not in (-1, m) for n, m in zip(form, shape, strict=True)):
            raise CheckpointError(f"{path} answers {name} {shape}, expected {form} (-1: any) of numbers. {again}")
    if "classes" in result and names > 0 and not ((result["classes"] >= 0) & (result["classes"] < names)).all():
        raise CheckpointError(f"{path} answers class numbers beyond its {names} classes. {again}")
    return full_size(result, images.shape[2:])


def full_size(result: dict[str, Array], size: Sequence[int]) -> dict[str, Array]:
    """The outputs of a model, masks at the image's ``(height, width)``: files may hold a decoder's smaller ones."""
    return {name: enlarged(value, size) if name in ("masks", "merged") else value for name, value in result.items()}


def enlarged(masks: Array, size: Sequence[int]) -> Array:
    """``[...,h,w]`` -> ``[...,H,W]``, bilinear, corners not aligned; as it is where the size fits."""
    if masks.shape[-2:] == tuple(size):
        return masks
    rows, columns = (_weights(length, out) for length, out in zip(masks.shape[-2:], size, strict=True))
    return rows @ (masks @ columns.T)


def _weights(length: int, out: int) -> Array:
    """``[out,length]``: row i weighs the two positions beside ``(i + 1/2) length / out - 1/2``, at the border the one."""
    source = ((np.arange(out) + 0.5) * length / out - 0.5).clip(0, length - 1)
    return (1 - np.abs(source[:, None] - np.arange(length))).clip(0).astype(np.float32)


def check_description(values: Any, path: Any) -> dict[str, Any]:
    """The description stored with an exported file, once the parts that are relied on are known to be of their kinds.

    Raises:
        CheckpointError: not so.
    """

    def side(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    description: dict[str, Any] = values if isinstance(values, dict) else {}
    classes, outputs, size, trained, threshold = (description.get(key) for key in ("classes", "outputs", "size", "image_size", "threshold"))
    known = description.get("geometry") in (None, *GEOMETRIES)  # files of older versions do not say
    names = [v for v in (classes, outputs) if isinstance(v, list) and all(isinstance(name, str) for name in v)]
    fits = size is None or (isinstance(size, list) and as_size(size) is not None)
    top = description.get("top")
    fits = fits and (top is None or (side(top) and isinstance(classes, list) and top <= len(classes)))
    share = threshold is None or (isinstance(threshold, int | float) and 0 <= threshold <= 1)
    if len(names) != 2 or not fits or not (trained is None or as_size(trained) is not None) or not share or not known:
        raise CheckpointError(
            f"{path} has no usable description of its classes, outputs and size: it was not written by `explainer export`."
        )
    return description


def _resized(mask: Array, shape: tuple[int, int]) -> Array:
    """A mask at ``(width, height)``, bilinear."""
    return np.asarray(Image.fromarray(mask.astype(np.float32)).resize(shape, Image.Resampling.BILINEAR), dtype=np.float32).clip(0, 1)


def _picture(image: Any) -> Image.Image:
    """RGB, upright, from any of the accepted inputs, by the rules of :func:`explainer.data.decoding.read_image`."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(_pixels(image))
    if isinstance(image, Image.Image):
        return _rgb(image, "the image")
    try:
        if Path(image).stat().st_size > _MAX_BYTES:
            raise CorruptSampleError(f"{image}: the file has more than the limit of {_MAX_BYTES} bytes. Re-encode it.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own, lower limit follows
            opened = Image.open(image, formats=_FORMATS)
        with opened:
            if opened.width * opened.height > _MAX_PIXELS or max(opened.size) > _MAX_SIDE:
                raise CorruptSampleError(
                    f"{image}: {opened.width} x {opened.height} pixels are over the limit of {_MAX_PIXELS} or {_MAX_SIDE} a side."
                )
            return _rgb(opened, image)
    except CorruptSampleError:
        raise
    except Exception as error:  # codecs raise whatever they like
        raise CorruptSampleError(f"{image}: not a readable image ({str(error)[:200]}). Known formats: {', '.join(_FORMATS)}.") from error


def _pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    """An array as 8 bits: uint16 is scaled, other whole numbers must already be 0..255, floats must lie in [0,1]."""
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ShapeError(f"an array must be [H,W,3], received {array.shape}.")
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return ((array.astype(np.int64) + 128) // 257).astype(np.uint8)
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    if np.issubdtype(array.dtype, np.floating) and low >= -1e-6 and high <= 1 + 1e-6:
        pixels: NDArray[np.uint8] = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
        return pixels
    raise ShapeError(
        f"an array must be uint8, uint16, whole numbers in 0..255 or floats in [0,1], received {array.dtype} in {low}..{high}. Scale it."
    )


def _rgb(image: Image.Image, name: Any) -> Image.Image:
    image.load()
    try:
        upright = ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        upright = image
    if upright.mode == "F":
        raise CorruptSampleError(f"{name}: the image has float pixels of unknown range. Save it with 8 or 16 bits.")
    if upright.mode.startswith("I"):
        values = np.asarray(upright).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise CorruptSampleError(f"{name}: grey values {values.min()} to {values.max()} exceed 16 bits. Save it with 8 or 16 bits.")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    return upright.convert("RGB")
