"""``shapes``: images whose evidence is planted, so that the right explanation is known to the pixel. Nothing is downloaded.

A class is the TEXTURE inside an object. Silhouettes are random blobs, alike for all classes and for the texture-free distractors, so
neither an outline nor a hole of a certain form tells a class: cutting an object out removes its evidence completely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from explainer.data.contract import ExplainerDataset, Sample
from explainer.errors import ConfigError

Array = NDArray[np.float32]
_SPLIT_CODE = {"train": 0, "val": 1, "test": 2}
_SPLIT_SIZE = {"train": 4000, "val": 400, "test": 1000}


def _square(wave: Array, sharpness: float | Array) -> Array:
    """A wave in [-1,1] as two colours with a soft edge about one pixel wide: values in [0,1]."""
    stripes: Array = np.clip(0.5 + sharpness * wave, 0.0, 1.0)
    return stripes


# Each texture maps coordinates (pixels from the object's centre, rotated), a period in pixels and one free phase to values in [0,1].
def _stripes(u: Array, v: Array, period: float, phase: float) -> Array:
    return _square(np.sin(2 * np.pi * (u / period + phase)), period / 6)


def _checks(u: Array, v: Array, period: float, phase: float) -> Array:
    return _square(np.sin(2 * np.pi * (u / period + phase)) * np.sin(2 * np.pi * v / period), period / 5)


def _dots(u: Array, v: Array, period: float, phase: float) -> Array:
    du = (u / period + phase) % 1.0 - 0.5
    dv = (v / period) % 1.0 - 0.5
    dots: Array = np.clip(0.5 + (0.3 - np.hypot(du, dv)) * period, 0.0, 1.0)
    return dots


def _rings(u: Array, v: Array, period: float, phase: float) -> Array:
    return _square(np.sin(2 * np.pi * (np.hypot(u, v) / period + phase)), period / 6)


def _grid(u: Array, v: Array, period: float, phase: float) -> Array:
    du = np.abs((u / period + phase) % 1.0 - 0.5)
    dv = np.abs((v / period) % 1.0 - 0.5)
    lines: Array = np.clip(0.5 + (0.14 - np.minimum(du, dv)) * period, 0.0, 1.0)
    return lines


def _wedges(u: Array, v: Array, period: float, phase: float) -> Array:
    return _square(np.sin(5 * np.arctan2(v, u) + 2 * np.pi * phase), (1.0 + np.hypot(u, v) / 5).astype(np.float32))


def _waves(u: Array, v: Array, period: float, phase: float) -> Array:
    return _square(np.sin(2 * np.pi * (u / period + phase + 0.35 * np.sin(2 * np.pi * v / (1.6 * period)))), period / 6)


def _triangles(u: Array, v: Array, period: float, phase: float) -> Array:
    return np.clip(0.5 + ((u / period + phase) % 1.0 - (v / period) % 1.0) * period, 0.0, 1.0)


TEXTURES: dict[str, Callable[[Array, Array, float, float], Array]] = {
    "stripes": _stripes,
    "checks": _checks,
    "dots": _dots,
    "rings": _rings,
    "grid": _grid,
    "wedges": _wedges,
    "waves": _waves,
    "triangles": _triangles,
}
DEFAULT_CLASSES = ("stripes", "checks", "dots", "rings", "grid", "wedges")


def _symmetry(x: torch.Tensor, element: int) -> torch.Tensor:
    """One of the eight symmetries of the square applied to ``[C,H,W]``."""
    turned = torch.rot90(x, element % 4, (1, 2))
    return turned.flip(2) if element >= 4 else turned


class Shapes(ExplainerDataset):
    """Planted-evidence images, generated from ``(seed, split, index)`` alone: the same on every machine and for any worker count.

    Args:
        split: ``train``, ``val`` or ``test``.
        size: side in pixels, 32 to 512. All lengths scale with it.
        length: number of images; default 4000 / 400 / 1000 for train / val / test.
        seed: random seed of the whole data set.
        class_names: textures that are classes, out of :data:`TEXTURES`.
        max_objects: 1 to ``max_objects`` objects an image.
        max_distractors: 0 to ``max_distractors`` texture-free blobs an image.
        unlabelled: textures drawn on the distractors (unseen classes); empty keeps them texture-free.
        shortcut_class: name of a class with which a small cue co-occurs, or None.
        shortcut_probability: P(cue | class present).
        shortcut_leak: P(cue | class absent).
        contrast: smallest distance between the two colours of a texture (RGB, Euclidean, at most 1.7).
        augment: ``none``, or ``symmetry``: a random one of the square's eight flips and turns (textures and silhouettes have no
            preferred direction).
        cache: keep generated images in memory (uint8).
    """

    name = "shapes"
    task: Literal["multilabel", "multiclass"] = "multilabel"
    size: int  # its pictures are squares

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        *,
        length: int | None = None,
        seed: int = 0,
        class_names: tuple[str, ...] | list[str] = DEFAULT_CLASSES,
        max_objects: int = 3,
        max_distractors: int = 2,
        unlabelled: tuple[str, ...] | list[str] = (),
        shortcut_class: str | None = None,
        shortcut_probability: float = 0.9,
        shortcut_leak: float = 0.0,
        contrast: float = 0.6,
        augment: Literal["none", "symmetry"] = "none",
        cache: bool = True,
    ) -> None:
        super().__init__(split, size)
        if not isinstance(self.size, int) or not 32 <= self.size <= 512:
            raise ConfigError(f"shapes: size must be one side in 32..512 px, for its pictures are squares; received {size}.")
        for texture in (*class_names, *unlabelled):
            if texture not in TEXTURES:
                raise ConfigError(f"shapes: unknown class {texture!r}. Textures: {', '.join(TEXTURES)}.")
        if len(set(class_names)) != len(class_names) or not class_names:
            raise ConfigError(f"shapes: class_names must be distinct and not empty, received {list(class_names)}.")
        if shortcut_class is not None and shortcut_class not in class_names:
            raise ConfigError(f"shapes: shortcut_class must be one of {', '.join(class_names)}, received {shortcut_class!r}.")
        if length is not None and length < 1:
            raise ConfigError(f"shapes: length must be at least 1, received {length}.")
        if max_objects < 1 or max_distractors < 0:
            raise ConfigError(f"shapes: max_objects must be >= 1 and max_distractors >= 0, received {max_objects} and {max_distractors}.")
        if augment not in ("none", "symmetry"):
            raise ConfigError(f"shapes: augment must be none or symmetry, received {augment!r}.")
        self.seed, self.contrast, self.augment = seed, contrast, augment
        self.length = _SPLIT_SIZE[split] if length is None else length
        self.class_names = tuple(class_names)
        self.max_objects, self.max_distractors, self.unlabelled = max_objects, max_distractors, tuple(unlabelled)
        self.shortcut_class, self.shortcut_probability, self.shortcut_leak = shortcut_class, shortcut_probability, shortcut_leak
        self._cache: dict[int, tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_] | None]] | None = {} if cache else None

    def __len__(self) -> int:
        return self.length

    def keep(self, indices: Sequence[int]) -> None:
        """So many images: they are independent of each other, so that the first ones are a sample like any other."""
        self.length = len(indices)

    def __getitem__(self, index: int) -> Sample:
        """One image with exact masks; with ``shortcut_class`` also the cue's pixels."""
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._cache is not None and index in self._cache:
            image, labels, cue = self._cache[index]
        else:
            image, labels, cue = self._draw(index)
            if self._cache is not None:
                self._cache[index] = image, labels, cue
        label_map = torch.from_numpy(labels)
        masks = (label_map[None] == torch.arange(1, self.num_classes + 1)[:, None, None]).float()
        cues = None
        if self.shortcut_class is not None:
            cues = torch.zeros_like(masks)
            if cue is not None:
                cues[self.class_names.index(self.shortcut_class)] = torch.from_numpy(cue).float()
        picture = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        target = masks.flatten(1).amax(dim=1)
        if self.augment == "symmetry":
            element = int(torch.randint(8, (1,), generator=self.generator(index)))
            picture, masks = _symmetry(picture, element), _symmetry(masks, element)
            cues = None if cues is None else _symmetry(cues, element)
        return Sample(image=picture, target=target, id=self.sample_id(index), masks=masks, void=None, cues=cues)

    def augmented_maps(self, index: int, maps: torch.Tensor, epoch: int) -> torch.Tensor:
        """See :meth:`ExplainerDataset.augmented_maps`."""
        if self.augment != "symmetry":
            return maps
        return _symmetry(maps, int(torch.randint(8, (1,), generator=self.generator(index, epoch))))

    def identity(self) -> dict[str, Any]:
        """Everything that decides the images; ``version`` changes when the drawing does."""
        options = (
            "length",
            "seed",
            "max_objects",
            "max_distractors",
            "unlabelled",
            "shortcut_class",
            "shortcut_probability",
            "shortcut_leak",
            "contrast",
        )
        return {
            "name": self.name,
            "version": 1,
            "split": self.split,
            "size": self.size,
            "classes": list(self.class_names),
            **{option: getattr(self, option) for option in options},
        }

    # ------------------------------------------------------------------ drawing
    def _draw(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_] | None]:
        """(RGB image [H,W,3], label map [H,W] with 0 = background, cue pixels or None)."""
        rng = np.random.default_rng([self.seed, _SPLIT_CODE[self.split], index])
        n = self.size
        canvas = self._background(rng)
        labels = np.zeros((n, n), np.uint8)
        taken = np.zeros((n, n), bool)
        classes = [int(k) for k in rng.integers(0, self.num_classes, rng.integers(1, self.max_objects + 1))]
        # Objects first, so that a class is never lost to a distractor that took the place.
        for label in [*classes, *[-1] * int(rng.integers(0, self.max_distractors + 1))]:
            inside, u, v = self._place_blob(rng, taken)
            if inside is None:
                continue
            texture = self.class_names[label] if label >= 0 else None
            if label < 0 and self.unlabelled:
                texture = self.unlabelled[int(rng.integers(len(self.unlabelled)))]
            canvas[inside] = self._paint(rng, texture, u[inside], v[inside])
            taken |= inside
            if label >= 0:
                labels[inside] = label + 1
        cue = self._draw_cue(rng, canvas, labels, taken)
        canvas += rng.normal(0, 0.02, canvas.shape).astype(np.float32)
        return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), labels, cue

    def _background(self, rng: np.random.Generator) -> Array:
        """Two random colours mixed by smooth noise of three coarse scales (a cloudy surface without any regular texture)."""
        n = self.size
        mix = np.zeros((n, n), np.float32)
        for cells, weight in ((3, 1.0), (6, 0.5), (12, 0.25)):
            noise = torch.from_numpy(rng.random((1, 1, cells, cells), np.float32))
            mix += weight * torch.nn.functional.interpolate(noise, (n, n), mode="bicubic", align_corners=True)[0, 0].numpy()
        mix = (mix / 1.75)[..., None]
        first, second = rng.random((2, 3), np.float32)
        mixed: Array = (first * mix + second * (1 - mix)).astype(np.float32)
        return mixed

    def _place_blob(self, rng: np.random.Generator, taken: NDArray[np.bool_]) -> tuple[NDArray[np.bool_] | None, Array, Array]:
        """A random silhouette that touches no other: (inside, u, v) with rotated coordinates; inside is None if no place was found."""
        n = self.size
        rows, columns = np.mgrid[0:n, 0:n].astype(np.float32)
        for _ in range(20):
            radius = rng.uniform(0.13, 0.24) * n
            cy, cx = rng.uniform(0.8 * radius, n - 0.8 * radius, 2)
            dy, dx = rows - np.float32(cy), columns - np.float32(cx)
            angle = np.arctan2(dy, dx)
            outline = np.ones_like(angle)
            for k in (2, 3, 4, 5):
                outline += np.float32(rng.uniform(0, 0.34 / k)) * np.cos(k * angle + np.float32(rng.uniform(0, 2 * np.pi)))
            distance = np.hypot(dy, dx)
            inside = distance < radius * outline
            if not (taken & (distance < radius * outline + 2)).any():
                turn = rng.uniform(0, np.pi)
                c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
                return inside, c * dx + s * dy, c * dy - s * dx
        return None, columns, rows

    def _paint(self, rng: np.random.Generator, texture: str | None, u: Array, v: Array) -> Array:
        """Colours [N,3] of an object's pixels; None paints one plain colour."""
        first, second = self._two_colors(rng)
        period, phase = rng.uniform(0.10, 0.15) * self.size, rng.uniform()
        if texture is None:
            return np.broadcast_to(first, (u.size, 3))
        mix = TEXTURES[texture](u, v, period, phase)[:, None].astype(np.float32)
        return first * mix + second * (1 - mix)

    def _two_colors(self, rng: np.random.Generator) -> tuple[Array, Array]:
        while True:
            first, second = rng.random((2, 3), np.float32)
            if np.linalg.norm(first - second) >= self.contrast:
                return first, second

    def _draw_cue(
        self, rng: np.random.Generator, canvas: Array, labels: NDArray[np.uint8], taken: NDArray[np.bool_]
    ) -> NDArray[np.bool_] | None:
        """A small magenta-and-green bar in free background; its probability depends on the shortcut class alone."""
        if self.shortcut_class is None:
            return None
        present = bool((labels == self.class_names.index(self.shortcut_class) + 1).any())
        if rng.random() >= (self.shortcut_probability if present else self.shortcut_leak):
            return None
        side = max(4, round(0.11 * self.size))
        for _ in range(50):
            y, x = (int(k) for k in rng.integers(0, self.size - side + 1, 2))
            if not taken[y : y + side, x : x + side].any():
                break
        cue = np.zeros((self.size, self.size), bool)
        cue[y : y + side, x : x + side] = True
        canvas[y : y + side, x : x + side] = (1.0, 0.0, 1.0)
        canvas[y : y + side, x : x + side // 2] = (0.0, 1.0, 0.0)
        labels[cue] = 0
        return cue
