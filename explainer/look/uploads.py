"""What the local page shows: uploaded pictures with their masks, and maps of other methods computed when they are asked for."""

from __future__ import annotations

import io
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from explainer import baselines
from explainer.data.decoding import image_size
from explainer.errors import ConfigError, CorruptSampleError, DatasetNotFoundError
from explainer.fills import judging_fill
from explainer.inference.explaining import choose, finite, geometry_of, in_picture, network_size, overlaid, safe_name, scores_of, upsample
from explainer.inference.formats import Array, Runtime
from explainer.inference.pictures import Picture, load_picture
from explainer.inference.refinement import quality, refine

OWN, REFINED, ALL = "explainer", "refined", "all"
_LABELS = {OWN: "Explainer", REFINED: "Refined mask", "grad_cam": "Grad-CAM", "srd": "SRD", "rise": "RISE"}
_KEPT = 8  # pictures remembered, and their bytes; an older one has to be uploaded again
_KEPT_BYTES = 600_000_000
_PREVIEW = 1280  # longest side of the picture that the page draws on; files for download have the picture's own size


@dataclass
class Map:
    """One class's map of one method.

    Attributes:
        values: ``[h,w]`` in [0,1], at the network's size.
        seconds: that it took; 0 for the Explainer's own, which come with the upload.
        note: what was done to the values, in words.
    """

    values: Array
    seconds: float = 0.0
    note: str = ""


@dataclass
class Upload:
    """A picture with its masks.

    Attributes:
        key: unguessable name.
        picture: decoded.
        masks: ``[n,h,w]``.
        classes: class number of each mask; all K, except of a file of the most probable classes.
        scores: probabilities ``[K]``, or None without classifier.
        chosen: predicted classes (without classifier: those with a visible mask).
        maps: other methods' results so far, by method and class.
    """

    key: str
    picture: Picture
    masks: Array
    classes: list[int]
    scores: Array | None
    chosen: list[int]
    maps: dict[tuple[str, int], Map] = field(default_factory=dict)

    def mask(self, k: int) -> Array:
        """The mask ``[h,w]`` of class ``k``.

        Raises:
            ConfigError: the model's file computes those of the most probable classes only, and it is none of them.
        """
        if k not in self.classes:
            raise ConfigError(f"This file has the masks of a picture's {len(self.classes)} most probable classes; {k} is none of them.")
        mask: Array = self.masks[self.classes.index(k)]
        return mask

    @property
    def size(self) -> int:
        """Bytes in memory."""
        own = self.picture.pixels.numel() + self.picture.small.nbytes + self.masks.nbytes
        return own + sum(found.values.nbytes for found in self.maps.values())

    @property
    def areas(self) -> Array:
        """Mean of each mask over the part of the network's image that shows the picture, ``[n]`` in [0,1]."""
        areas: Array = self.masks[:, *self.picture.inside].mean(axis=(1, 2))
        return areas

    @property
    def box(self) -> tuple[float, float, float, float]:
        """The part of the picture that the network saw: (top, left, height, width) as shares of the picture."""
        (height, width), (top, left, h, w) = self.picture.size, self.picture.place.source
        return top / height, left / width, h / height, w / width


class Uploads:
    """The pictures of one running page. Not thread-safe: the server calls it from one thread.

    Args:
        runtime: an opened model (:func:`explainer.inference.runtime.open_model`).
        explanandum: the classifier; gives probabilities and what other methods need.
        compare: names of per-image methods, and ``refined``; None: those the classifier allows.
        side: at which the network runs, for models that take any size.
        threshold: probability from which a class counts as predicted.
        max_pixels: largest number of pixels of a picture.
        refine_iterations, refine_budget: most iterations and seconds of ``refined``.
    """

    def __init__(
        self,
        runtime: Runtime,
        explanandum: Any = None,
        *,
        compare: Sequence[str] | None = None,
        side: int | None = None,
        threshold: float = 0.5,
        max_pixels: int = 25_000_000,
        refine_iterations: int = 24,
        refine_budget: float | None = 20.0,
    ) -> None:
        if explanandum is not None and explanandum.num_classes != len(runtime.classes):
            raise ConfigError(f"the classifier has {explanandum.num_classes} classes, the model {len(runtime.classes)}. Name its own.")
        self.runtime, self.explanandum, self.threshold, self.max_pixels = runtime, explanandum, threshold, max_pixels
        self.size = network_size(runtime, side)
        self.refine_iterations, self.refine_budget = refine_iterations, refine_budget
        self.fill = judging_fill(runtime.description.get("fill"))  # by which masks are refined and judged
        self.methods = self._methods(compare)
        self._kept: OrderedDict[str, Upload] = OrderedDict()

    def _methods(self, compare: Sequence[str] | None) -> dict[str, Any]:
        """Other methods by name, built once so that a wrong name is answered at the start."""
        e = self.explanandum
        if e is None:
            if compare:
                raise ConfigError(f"comparing with {', '.join(compare)} asks the classifier: name its checkpoint with --classifier.")
            return {}
        if compare is None:
            compare = ("grad_cam", "srd", REFINED) if e.differentiable else ("occlusion",)
        found: dict[str, Any] = {}
        for name in compare:
            found[name] = None if name == REFINED else baselines.build(name, e)
            gradients = name == REFINED or found[name].needs_gradients
            if gradients and not e.differentiable:
                raise ConfigError(f"{name} needs gradients, and this classifier gives scores only. Compare with occlusion or rise.")
            if name != REFINED and found[name].needs_masks:
                raise ConfigError(f"{name} needs ground truth, which an uploaded picture does not have.")
        return found

    def describe(self) -> dict[str, Any]:
        """Facts for the page."""
        d = self.runtime.description
        return {
            "classes": self.runtime.classes,
            "methods": [{"name": name, "label": label(name)} for name in self.methods],
            "judged": self.explanandum is not None,
            "size": list(self.size),
            "precision": d.get("precision"),
            "threshold": self.threshold,
            "task": self.explanandum.task if self.explanandum is not None else d.get("task"),
        }

    def add(self, data: bytes) -> Upload:
        """Decode and explain one picture, and remember it; see :meth:`explain`."""
        upload = self.explain(data)
        self._kept[upload.key] = upload
        self._forget()
        return upload

    def explain(self, data: bytes, threshold: float | None = None) -> Upload:
        """Decode and explain one picture.

        Args:
            data: content of an image file.
            threshold: probability from which a class counts as predicted; None: the server's own.

        Raises:
            CorruptSampleError: not an image, damaged, or too many pixels.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "upload"
            path.write_bytes(data)
            try:
                height, width = image_size(path)
                if height * width > self.max_pixels:
                    raise CorruptSampleError(
                        f"The picture has {width} x {height} pixels, more than the limit of {self.max_pixels / 1e6:g} million. Resize it "
                        "first, or start with a larger --max_megapixels."
                    )
                picture = load_picture("upload", path, self.size, geometry_of(self.runtime))
            except CorruptSampleError as error:
                raise CorruptSampleError(str(error).replace(f"{path}: ", "").replace("the image", "The file", 1)) from error
        images = picture.small[None]
        result = finite(self.runtime.run(images), self.runtime)
        scores = scores_of(result, images, self.explanandum)
        row = None if scores is None else scores[0]
        chosen = choose(
            result["masks"][0], row, self.explanandum, self.runtime, threshold=self.threshold if threshold is None else threshold
        )
        classes = [int(k) for k in result["classes"][0]] if "classes" in result else list(range(len(self.runtime.classes)))
        chosen = [k for k in chosen if k in classes]
        return Upload(secrets.token_urlsafe(16), picture, result["masks"][0], classes, row, chosen)

    def _forget(self) -> None:
        """Let the pictures go that were not looked at for longest, until the rest are few and small enough; the last always stays."""
        while len(self._kept) > _KEPT or (len(self._kept) > 1 and sum(u.size for u in self._kept.values()) > _KEPT_BYTES):
            self._kept.popitem(last=False)

    def find(self, key: str) -> Upload:
        """The upload of that name.

        Raises:
            DatasetNotFoundError: never uploaded, or too long ago.
        """
        if key not in self._kept:
            raise DatasetNotFoundError("This picture is no longer kept (only the last few are). Upload it again.")
        self._kept.move_to_end(key)
        return self._kept[key]

    def map(self, upload: Upload, method: str, chosen: int | str) -> Map:
        """The map of one class (or of ``all`` predicted classes, the Explainer's only).

        Raises:
            ConfigError: no such method or class.
        """
        if chosen == ALL:
            if method != OWN:
                raise ConfigError("Other methods explain one class at a time: choose a class.")
            empty = np.zeros_like(upload.masks[0])
            return Map(np.stack([upload.mask(k) for k in upload.chosen]).max(axis=0) if upload.chosen else empty)
        if not isinstance(chosen, int) or not 0 <= chosen < len(self.runtime.classes):
            raise ConfigError(f"class must be a number in 0..{len(self.runtime.classes) - 1} or {ALL!r}, received {chosen!r}.")
        if method == OWN:
            return Map(upload.mask(chosen))
        if method not in self.methods:
            raise ConfigError(f"method must be one of {', '.join([OWN, *self.methods])}, received {method!r}.")
        if (method, chosen) not in upload.maps:
            upload.maps[method, chosen] = self._compute(upload, method, chosen)
            self._forget()
        return upload.maps[method, chosen]

    def _compute(self, upload: Upload, method: str, chosen: int) -> Map:
        images = torch.from_numpy(upload.picture.small)[None]
        began = time.monotonic()
        if method == REFINED:
            start = torch.from_numpy(upload.mask(chosen))[None].float()
            done = refine(
                None,
                self.explanandum,
                images,
                chosen,
                iterations=self.refine_iterations,
                budget_s=self.refine_budget,
                start=start,
                fill=self.fill,
            )
            values = done.masks[0]
            note = "" if bool(done.improved) else "not better than the Explainer's, which is shown"
        else:
            values = _scaled(self.methods[method](images, chosen)[0])
            note = "positive part, divided by its maximum"
        return Map(values.numpy().astype(np.float32), time.monotonic() - began, note)

    def judge(self, upload: Upload, found: Map, chosen: int | str, cut: float = 0.0) -> dict[str, float]:
        """Probability of the class when only the map's part is shown (``kept``) and when it is removed (``left``).

        Raises:
            ConfigError: there is no classifier, or no single class.
        """
        if self.explanandum is None or not isinstance(chosen, int):
            raise ConfigError("Only the classifier (--classifier) can judge a mask, and of one class.")
        images, mask = torch.from_numpy(upload.picture.small)[None], cut_at(torch.from_numpy(found.values), cut)
        q = quality(self.explanandum, images, mask[None], torch.tensor([chosen]), fill=self.fill)
        return {"kept": float(q.kept), "left": float(q.left)}

    def preview(self, upload: Upload) -> tuple[bytes, str]:
        """The picture as decoded, at most :data:`_PREVIEW` pixels a side: (file, type)."""
        image = Image.fromarray(upload.picture.pixels.permute(1, 2, 0).numpy())
        image.thumbnail((_PREVIEW, _PREVIEW))
        small = image.width * image.height <= 512 * 512
        buffer = io.BytesIO()
        image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 92}))
        return buffer.getvalue(), "image/png" if small else "image/jpeg"

    def png(self, upload: Upload, kind: str, found: Map, cut: float) -> bytes:
        """A file at the picture's own size.

        Args:
            kind: ``mask`` (grey) or ``overlay`` (what the mask keeps).
            cut: 0 leaves the mask soft; above, it is 1 where it reaches ``cut`` and 0 elsewhere.
        """
        if kind not in ("mask", "overlay"):
            raise ConfigError(f"kind must be mask or overlay, received {kind!r}.")
        mask = in_picture(found.values[None], upload.picture)
        if kind == "overlay":  # very large pictures are kept reduced
            mask = upsample(mask.numpy(), (int(upload.picture.pixels.shape[1]), int(upload.picture.pixels.shape[2])))
        mask = cut_at(mask[0], cut)
        return png_of(mask) if kind == "mask" else _png(overlaid(upload.picture, mask))

    def file_name(self, kind: str, method: str, chosen: int | str) -> str:
        """Of a download."""
        name = chosen if isinstance(chosen, str) else safe_name(self.runtime.classes[chosen])
        return f"{kind}_{name}_{method}.png"


def _scaled(values: Tensor) -> Tensor:
    """Positive part divided by its maximum; zeros stay zeros."""
    positive = values.detach().float().cpu().clamp(min=0)
    return positive / positive.max().clamp(min=torch.finfo(torch.float32).tiny)


def png_of(mask: Tensor) -> bytes:
    """A mask ``[H,W]`` in [0,1] as a file: 8-bit grey, 255 where it is 1."""
    return _png((mask * 255).round().to(torch.uint8).numpy())


def _png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cut_at(mask: Tensor, cut: float) -> Tensor:
    """The mask itself for 0; above, 1 where it reaches ``cut`` and 0 elsewhere."""
    return mask if cut <= 0 else (mask >= cut).to(mask.dtype)


def label(method: str) -> str:
    """A method's name for people."""
    return _LABELS.get(method, method.replace("_", " ").capitalize())
