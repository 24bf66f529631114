"""Images, data sets and configurations, whole and mutated."""

from __future__ import annotations

import functools
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from explainer import plugins
from explainer.commands.parsing import parse_evaluate, parse_run
from explainer.data.decoding import image_facts, read_image, read_label_map, read_scaled
from explainer.errors import CheckpointError, ExplainerError
from tests.factories import dataset_options
from tests.integration.fuzz_models import VALUES
from tests.integration.fuzz_mutations import DEEP, NASTY, Case, alternately, bytewise, each, mutate, mutated_tree, replaced, valuewise


# ---------------------------------------------------------------------- images
def _png_of(width: int, height: int, depth: int, color: int, data: bytes) -> bytes:
    """A PNG whose header says what it is told to, with right checksums."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _large(random: np.random.Generator) -> bytes:
    """The largest picture that is allowed, in a few bytes: 64 megapixels of one colour, of some mode."""
    depth, color, channels = [(8, 0, 1), (8, 2, 3), (8, 6, 4), (16, 0, 1), (16, 2, 3), (8, 4, 2)][int(random.integers(6))]
    row = b"\0" + bytes(8000 * channels * depth // 8)
    packer = zlib.compressobj(1)
    return _png_of(8000, 8000, depth, color, b"".join([*(packer.compress(row * 100) for _ in range(80)), packer.flush()]))


def pictures(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """Images of every format and mode, as training, masks, ``explain`` and the Predictor read them."""
    from explainer.inference import predictor
    from explainer.inference.pictures import load_picture

    generator = np.random.default_rng(0)
    grey = Image.fromarray(generator.integers(0, 255, (40, 56), dtype=np.uint8))
    color = Image.fromarray(generator.integers(0, 255, (40, 56, 3), dtype=np.uint8))
    made = {
        "a.jpg": color,
        "b.jpg": color.convert("CMYK"),
        "c.png": color,
        "d.png": grey,
        "e.png": color.quantize(16),
        "f.gif": grey,
        "g.png": Image.fromarray(generator.integers(0, 60000, (40, 56), dtype=np.uint16)),
        "h.bmp": color,
        "i.tif": color,
        "j.webp": color,
        "k.ppm": color,
        "l.png": color.convert("RGBA"),
        "m.tif": grey.convert("1"),
        "n.tif": grey.convert("F"),
    }
    contents = {}
    for name, image in made.items():
        image.save(folder / name, **({"compression": "tiff_lzw"} if name == "i.tif" else {}))
        contents[name] = (folder / name).read_bytes()
    path = folder / "picture"

    def use() -> None:
        each(
            lambda: read_image(path),
            lambda: image_facts(path),
            lambda: read_scaled(path, at_least=16, most=10**6),
            lambda: read_label_map(path),
            lambda: load_picture("picture", path, (32, 32)),
            lambda: predictor._picture(path),
        )

    path.write_bytes(contents["c.png"])
    yield "nothing", use
    for i in itertools.count():
        name = sorted(contents)[int(random.integers(len(contents)))]
        content = mutate(contents[name], random)
        if i % 4 == 1:  # the size that a header claims
            width, height = (int(2 ** random.uniform(0, 31)) for _ in range(2))
            content, name = _png_of(width, height, 8, 2, zlib.compress(bytes(10**6))), f"PNG of {width} x {height}"
        elif i % 40 == 22:
            content, name = _large(random), "PNG of 64 megapixels"
        yield name, replaced(path, content, use)


# ---------------------------------------------------------------------- data sets
#: Files whose bytes are mutated, by data set.
TARGETS = {
    "voc": ("Annotations/*.xml", "ImageSets/Main/train.txt", "SegmentationClass/*.png", "JPEGImages/*.jpg"),
    "coco": ("annotations/*.json", "train2014/*.jpg"),
    "cub": ("*.txt", "segmentations/*/*.png", "images/*/*.jpg"),
    "image_folder": ("train/*/*.png",),
    "csv": ("labels.csv", "masks/photos/*.png"),
}


def serve(name: str, options: dict[str, Any]) -> str:
    """Build the data set and read what it has: served, partly or refused."""
    try:
        data = plugins.build("explainer.data", name, split="train", size=16, **options)
    except ExplainerError:
        return "refused"
    served = refused = 0
    for i in range(min(len(data), 12)):
        try:
            sample = data[i]
            assert sample.image.shape == (3, 16, 16)
            data.original_masks(i)
            served += 1
        except ExplainerError:
            refused += 1
    data.fingerprint()
    return "partly" if refused and served else "served" if served else "refused"


def _served(name: str, options: dict[str, Any]) -> None:
    if serve(name, options) != "served":
        raise CheckpointError("not all samples are served")  # refused, for the count


def data_set(name: str, folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """The files of a data set, in their bytes, lists and annotations in their values."""
    options = dataset_options(name, folder / "data")
    groups = [sorted((folder / "data").rglob(pattern))[:12] for pattern in TARGETS[name]]
    assert all(groups), "a pattern matches nothing"
    use = functools.partial(_served, name, options)
    kinds = [bytewise(group, use, random) for group in groups]
    if name == "coco":
        (annotations,) = (folder / "data").rglob("instances_train2014.json")
        kinds.append(valuewise(annotations, use, random))
    if name == "csv":
        kinds.append(_cells(folder / "data" / "labels.csv", use, random))
    if name == "voc":
        kinds.append(_elements(groups[0], use, random))
    return alternately(*kinds)


def _cells(path: Path, use: Callable[[], object], random: np.random.Generator) -> Iterator[Case]:
    """A table with another cell."""
    rows = [line.split(",") for line in path.read_text().splitlines()]
    yield "nothing", use
    while True:
        changed = [list(row) for row in rows]
        row = changed[int(random.integers(len(changed)))]
        value = str(NASTY[int(random.integers(len(NASTY)))])
        row[int(random.integers(len(row)))] = value
        yield f"{path.name}: {value[:100]}", replaced(path, "\n".join(",".join(row) for row in changed).encode(), use)


def _elements(paths: Sequence[Path], use: Callable[[], object], random: np.random.Generator) -> Iterator[Case]:
    """An annotation with another text in one of its elements, or many elements inside each other."""
    yield "nothing", use
    while True:
        path = paths[int(random.integers(len(paths)))]
        parts = path.read_text().split(">")
        at = int(random.integers(len(parts)))
        value = str([*NASTY, "nan", "inf", "9" * 400, "<a>" * 5000, "<!DOCTYPE a>"][int(random.integers(len(NASTY) + 5))])
        parts[at] = value + "<" + parts[at].partition("<")[2]
        yield f"{path.name}: {value[:100]}", replaced(path, ">".join(parts).encode(), use)


# ---------------------------------------------------------------------- configurations
CONFIG: dict[str, Any] = {
    "task": "explain",
    "run_dir": "runs/fuzz",
    "seed": 3,
    "data": {"name": "shapes", "batch_size": 4, "eval_batch_size": 4, "options": {"size": 32, "length": 24}, "on_error": "raise"},
    "classifier": {"arch": "small_vgg", "options": {"widths": [8, 8]}, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    "explainer": {"network": "vgg_unet", "options": {"widths": [8, 8], "decoder_channels": [8]}, "downscale": 1, "stride": 4},
    "losses": {"classification": {"weight": 1.0}, "area_bound": {"weight": [[0, 1], [1, 0.5]], "min_area": 0.05, "max_area": 0.3}},
    "masking": {"fill": "mean", "binarize": 0.5, "subset": 0.5},
    "optimizer": {"name": "adam", "lr": 0.001, "schedule": "one_cycle", "warmup": 0.2},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "precision": "32-true", "patience": 2, "extra": {"fast_dev_run": 1}},
    "logging": {"wandb": "off", "images": 0},
}
EVALUATION: dict[str, Any] = {
    "out": "results/fuzz",
    "data": {"name": "shapes", "options": {"size": 32, "length": 8}},
    "split": "test",
    "methods": {"grad_cam": {"options": {}}, "rise": {"options": {"n_masks": 20}}},
    "protocols": ["segmentation", {"half": {"protocol": "insertion_deletion", "steps": 5}}],
    "batch_size": 4,
}


def assemble(config: Any) -> None:
    """All of a run but the training."""
    from explainer.commands.building import build_task, data_module
    from explainer.lightning_internals import quiet_lightning
    from explainer.tasks.trainer import build_trainer

    quiet_lightning()
    data = data_module(config)
    data.setup("fit")
    build_task(config, data)
    build_trainer(config)


def configurations(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """Configurations of a training, an evaluation and a check of data."""
    from explainer.commands import parsing
    from explainer.commands.data import CHECK, data_config

    file = folder / "config.yaml"
    file.write_text("")

    def fit() -> None:
        _, config, _ = parse_run(["fit", "--config", str(file), "--run_dir", str(folder / "run"), "--logging.wandb", "off"])
        assemble(config)

    def check() -> None:
        data_config(parsing.command_parser(CHECK, "explainer data check").parse_args([str(file)]))

    def evaluate() -> None:
        parse_evaluate(["--config", str(file)])

    forms: list[tuple[dict[str, Any], Callable[[], object]]] = [(CONFIG, fit), (CONFIG, check), (EVALUATION, evaluate)]

    def whole() -> None:
        for tree, use in forms:
            replaced(file, yaml.safe_dump(tree).encode(), use)()

    yield "nothing", whole
    for i in itertools.count():
        tree, use = forms[(0, 2, 0, 1)[i % 4]]
        content = yaml.safe_dump(mutated_tree(tree, random, VALUES)).encode()
        if i % 3 == 2:
            content = mutate(yaml.safe_dump(tree).encode(), random)
        elif i % 40 == 1:
            content = b"data: " + b"[" * DEEP
        elif i % 40 == 3:  # each line ten times the one before
            content = b"\n".join(b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10) if n else b"1") for n in range(9))
        yield f"{use.__name__}: {content[:1500]!r}", replaced(file, content, use)
