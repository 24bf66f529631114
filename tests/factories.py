"""Tiny data sets in the real layouts of VOC, COCO, CUB, class folders and CSV, written by code.

Each image of class i shows a rectangle in the colour ``COLORS[i]`` at a place that the returned object knows, so that tests can
check labels, masks and boxes against what was drawn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = (
    (220, 40, 40),
    (40, 200, 60),
    (50, 70, 230),
    (230, 200, 40),
    *((60 + 47 * i % 160, 60 + 83 * i % 160, 60 + 29 * i % 160) for i in range(16)),
)
NAMES = ("cat", "dog", "bird")


@dataclass
class Drawn:
    """One drawn image: rows/columns of each class's rectangle, half-open (y0, x0, y1, x1)."""

    id: str
    path: Path
    height: int
    width: int
    rectangles: dict[int, tuple[int, int, int, int]]


def _draw(seed: int, height: int, width: int, classes: tuple[int, ...]) -> tuple[np.ndarray, dict[int, tuple[int, int, int, int]]]:
    random = np.random.default_rng(seed)
    array = random.integers(90, 140, (height, width, 3), dtype=np.uint8)
    rectangles = {}
    for slot, label in enumerate(classes):  # side by side, so that they never overlap
        left, right = slot * width // len(classes), (slot + 1) * width // len(classes)
        box = (int(random.integers(0, height // 4)), left + 1, int(random.integers(height // 2, height)), right - 1)
        array[box[0] : box[2], box[1] : box[3]] = COLORS[label]
        rectangles[label] = box
    return array, rectangles


def _classes(i: int, count: int) -> tuple[int, ...]:
    return (i % count,) if i % 2 else tuple(sorted({i % count, (i + 1) % count}))


def make_voc(
    root: Path,
    names: tuple[str, ...] = NAMES,
    counts: tuple[int, int, int] = (6, 4, 3),
    year: int = 2007,
    height: int = 20,
    width: int = 30,
    segmented: str = "all",
) -> list[Drawn]:
    """``root/VOCdevkit/VOC<year>`` with train, val and test lists; the first object's mask has a one-pixel void border.

    ``segmented="even"`` gives only every second image a segmentation. The first image has one more object, difficult, of the last
    class, in the top-left 2 x 2 pixels (box only).
    """
    base = root / "VOCdevkit" / f"VOC{year}"
    for folder in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    drawn, start = [], 1
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        ids, with_masks = [], []
        for i in range(start, start + count):
            key = f"{i:06d}"
            ids.append(key)
            array, rectangles = _draw(i, height, width, _classes(i, len(names)))
            Image.fromarray(array).save(base / "JPEGImages" / f"{key}.jpg", quality=95)
            objects = "".join(_voc_object(names[k], box, 0) for k, box in rectangles.items())
            if i == 1:
                objects += _voc_object(names[-1], (0, 0, 2, 2), 1)
            (base / "Annotations" / f"{key}.xml").write_text(
                f"<annotation><filename>{key}.jpg</filename><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
                f"{objects}</annotation>"
            )
            if segmented == "all" or i % 2 == 0:
                with_masks.append(key)
                labels = np.zeros((height, width), dtype=np.uint8)
                for k, (y0, x0, y1, x1) in rectangles.items():
                    labels[y0:y1, x0:x1] = k + 1
                    labels[y0, x0:x1] = 255
                mask = Image.fromarray(labels, mode="P")
                mask.putpalette([v for c in range(256) for v in (c, 255 - c, c // 2)])
                mask.save(base / "SegmentationClass" / f"{key}.png")
            drawn.append(Drawn(key, base / "JPEGImages" / f"{key}.jpg", height, width, rectangles))
        (base / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(with_masks) + "\n")
        start += count
    return drawn


def _voc_object(name: str, box: tuple[int, int, int, int], difficult: int) -> str:
    y0, x0, y1, x1 = box
    return (
        f"<object><name>{name}</name><pose>Unspecified</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        f"<bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
    )


def make_coco(root: Path, train: int = 20, val: int = 4, height: int = 24, width: int = 32) -> list[Drawn]:
    """``root/{train2014,val2014,annotations}`` with three categories whose ids (3, 17, 90) are not contiguous.

    The last image of each part has no annotation; image 1 of train has a crowd (uncompressed run lengths: its left two columns).
    Objects are polygons.
    """
    categories = [{"id": c, "name": n} for c, n in zip((17, 90, 3), ("dog", "bird", "cat"), strict=True)]  # unsorted on purpose
    ids = (3, 17, 90)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    drawn = []
    for part, count, first in (("train2014", train, 100), ("val2014", val, 900)):
        (root / part).mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(first, first + count):
            array, rectangles = _draw(i, height, width, _classes(i, 3))
            file = f"COCO_{part}_{i:012d}.jpg"
            Image.fromarray(array).save(root / part / file, quality=95)
            images.append({"id": i, "file_name": file, "height": height, "width": width})
            if i == first + count - 1:
                rectangles = {}
            for k, (y0, x0, y1, x1) in rectangles.items():
                polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
                annotations.append({"image_id": i, "category_id": ids[k], "iscrowd": 0, "segmentation": [polygon]})
            if i == 101:
                runs = {"size": [height, width], "counts": [0, 2 * height, height * (width - 2)]}
                annotations.append({"image_id": i, "category_id": 90, "iscrowd": 1, "segmentation": runs})
            drawn.append(Drawn(str(i), root / part / file, height, width, rectangles))
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return drawn


def make_cub(root: Path, per_class: int = 6, height: int = 20, width: int = 26) -> list[Drawn]:
    """``root/CUB_200_2011`` and ``root/segmentations`` with two birds; of each class's images the last two are official test."""
    base = root / "CUB_200_2011"
    birds = ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    images, labels, training, drawn = [], [], [], []
    for label, bird in enumerate(birds):
        for folder in (base / "images" / bird, root / "segmentations" / bird):
            folder.mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            key = len(images) + 1
            array, rectangles = _draw(key, height, width, (label,))
            file = f"{bird}/{bird[4:]}_{i:04d}.jpg"
            Image.fromarray(array).save(base / "images" / file, quality=95)
            y0, x0, y1, x1 = rectangles[label]
            grey = np.zeros((height, width), dtype=np.uint8)
            grey[y0:y1, x0:x1] = 255
            grey[y1 - 1, x0:x1] = 102  # two of five annotators
            Image.fromarray(grey).save(root / "segmentations" / file.replace(".jpg", ".png"))
            images.append(f"{key} {file}")
            labels.append(f"{key} {label + 1}")
            training.append(f"{key} {int(i < per_class - 2)}")
            drawn.append(Drawn(str(key), base / "images" / file, height, width, rectangles))
    (base / "images.txt").write_text("\n".join(images))
    (base / "image_class_labels.txt").write_text("\n".join(labels))
    (base / "train_test_split.txt").write_text("\n".join(training))
    (base / "classes.txt").write_text("\n".join(f"{i + 1} {b}" for i, b in enumerate(birds)))
    return drawn


def make_image_folder(root: Path, names: tuple[str, ...] = ("cat", "dog"), per_class: int = 4, splits: bool = True) -> list[Drawn]:
    """``root/<split>/<class>/*.png`` (or ``root/<class>/*.png``), and masks (255 object, 128 undefined) under ``root/../masks``."""
    drawn = []
    for s, split in enumerate(("train", "val", "test") if splits else ("",)):
        for label, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                array, rectangles = _draw(100 * s + 10 * label + i, 16, 18, (label,))
                path = folder / f"{i}.png"
                Image.fromarray(array).save(path)
                y0, x0, y1, x1 = rectangles[label]
                values = np.zeros((16, 18), dtype=np.uint8)
                values[y0:y1, x0:x1] = 255
                values[y0, x0:x1] = 128
                mask = root.parent / "masks" / path.relative_to(root)
                mask.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(mask)
                drawn.append(Drawn(path.relative_to(root).as_posix(), path, 16, 18, rectangles))
    return drawn


def make_boxes(root: Path, drawn: list[Drawn]) -> None:
    """Annotations as ImageNet's localisation task has them, ``root/<split>/<class>/<image>.xml``; the object's name is a WordNet id."""
    for image in drawn:
        path = root / Path(image.id).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        objects = "".join(_voc_object("n02084071", box, 0) for box in image.rectangles.values())
        path.write_text(f"<annotation><filename>{path.stem}</filename>{objects}</annotation>")


def make_broden(root: Path) -> None:
    """``root/{index.csv,label.csv,images}`` with four images and five labels: wall above, red-c on the left, wheel (number 300) in the last
    pixel of a second map of parts, the scene abbey-s of the first, and an image with a texture and a scene but no map.
    """
    folder = root / "images" / "ade20k"
    folder.mkdir(parents=True)
    rows = ["image,split,ih,iw,sh,sw,color,object,part,material,scene,texture"]
    color, things, parts = (np.zeros((4, 4), dtype=np.int64) for _ in range(3))
    color[:, :2], things[:2], parts[3, 3] = 2, 1, 300
    for i, (split, scene) in enumerate([("train", "3"), ("train", ""), ("val", "")]):
        Image.fromarray(_draw(i, 8, 8, (i,))[0]).save(folder / f"{i}.jpg")
        for name, numbers in (("color", color), ("object", things), ("part_0", np.zeros_like(parts)), ("part_1", parts)):
            layers = np.stack([numbers % 256, numbers // 256, np.zeros_like(numbers)], 2).astype(np.uint8)
            Image.fromarray(layers).save(folder / f"{i}_{name}.png")
        files = {n: f"ade20k/{i}_{n}.png" for n in ("color", "object", "part_0", "part_1")}
        rows.append(f"ade20k/{i}.jpg,{split},8,8,4,4,{files['color']},{files['object']},{files['part_0']};{files['part_1']},,{scene},")
    rows.append("ade20k/dtd.jpg,train,8,8,4,4,,,,,3,4")
    Image.fromarray(_draw(9, 8, 8, ())[0]).save(folder / "dtd.jpg")
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    labels = ["1,wall,object(120);part(3),120,0.1,", "2,red-c,color(60),60,0.2,", "3,abbey-s,scene(10),10,,", "300,wheel,part(12),12,0.01,"]
    header = "number,name,category,frequency,coverage,syns"
    (root / "label.csv").write_text("\n".join([header, *labels, "4,banded,texture(5),5,,"]) + "\n")


def make_csv(root: Path, count: int = 10, split_column: bool = True) -> list[Drawn]:
    """``root/labels.csv`` with ``path,labels[,split]``, images in ``root/photos`` and label maps in ``root/masks/photos``."""
    (root / "photos").mkdir(parents=True, exist_ok=True)
    (root / "masks" / "photos").mkdir(parents=True, exist_ok=True)
    rows, drawn = ["path,labels" + (",split" if split_column else "")], []
    for i in range(count):
        array, rectangles = _draw(i, 16, 22, _classes(i, 3))
        Image.fromarray(array).save(root / "photos" / f"{i}.png")
        labels = np.zeros((16, 22), dtype=np.uint8)
        for k, (y0, x0, y1, x1) in rectangles.items():
            labels[y0:y1, x0:x1] = sorted(NAMES).index(NAMES[k]) + 1
        Image.fromarray(labels).save(root / "masks" / "photos" / f"{i}.png")
        split = ("train", "train", "train", "val", "test")[i % 5]
        rows.append(f"photos/{i}.png,{';'.join(NAMES[k] for k in rectangles)}" + (f",{split}" if split_column else ""))
        drawn.append(Drawn(f"photos/{i}.png", root / "photos" / f"{i}.png", 16, 22, rectangles))
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return drawn


def dataset_options(name: str, root: Path) -> dict[str, object]:
    """Write the tiny data set called ``name`` below ``root`` and return the options that load it (``{}`` for the ones without files)."""
    if name == "voc":
        make_voc(root)
        return {"root": str(root), "class_names": list(NAMES)}
    if name == "images":
        make_image_folder(root)
        return {"root": str(root), "class_names": 5, "task": "multilabel"}
    if name == "shards":
        return {"root": str(make_shards("coco", root))}
    makers = {"broden": make_broden, "coco": make_coco, "cub": make_cub, "image_folder": make_image_folder, "csv": make_csv}
    if name not in makers:
        return {}
    makers[name](root)
    extra = {"cub": {"val_fraction": 0.25}, "csv": {"mask_folder": "masks"}, "image_folder": {"mask_root": str(root.parent / "masks")}}
    return {"root": str(root), **extra.get(name, {})}


def make_shards(source: str, root: Path, samples: int = 4) -> Path:
    """``root/shards`` with the tiny data set called ``source``, in its own order; the folder."""
    from explainer import plugins
    from explainer.data.shard_writing import write_index, write_split

    options, out = dataset_options(source, root / "source"), root / "shards"
    splits = {s: plugins.build("explainer.data", source, split=s, size=32, **options) for s in ("train", "val", "test")}
    out.mkdir(parents=True, exist_ok=True)
    write_index(splits["train"], out, {s: write_split(d, out, samples, range(len(d))) for s, d in splits.items()})
    return out
