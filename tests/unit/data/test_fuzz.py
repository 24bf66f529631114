"""Mutated annotations, lists, masks and images: each data set either serves a sample or raises one of the project's errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explainer import plugins
from explainer.errors import ExplainerError
from tests.factories import dataset_options

NASTY: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1e400,
    float("nan"),
    "",
    "../../x",
    "a\0b",
    "1e9",
    [],
    {},
    [[]],
    [None],
    {"id": 1},
    "x" * 5000,
]
# file patterns whose bytes are mutated, by data set
TARGETS = {
    "voc": ("Annotations/*.xml", "ImageSets/Main/train.txt", "SegmentationClass/*.png", "JPEGImages/*.jpg"),
    "coco": ("annotations/*.json", "train2014/*.jpg"),
    "cub": ("*.txt", "segmentations/*/*.png", "images/*/*.jpg"),
    "image_folder": ("train/*/*.png",),
    "csv": ("labels.csv", "masks/photos/*.png"),
}


def mutate(data: bytes, random: np.random.Generator) -> bytes:
    """Flip, delete, duplicate or insert a few bytes, or cut the end off."""
    array = bytearray(data)
    for _ in range(int(random.integers(1, 6))):
        if not array:
            break
        at, kind = int(random.integers(len(array))), int(random.integers(5))
        if kind == 0:
            array[at] = int(random.integers(256))
        elif kind == 1:
            del array[at : at + int(random.integers(1, 30))]
        elif kind == 2:
            array[at:at] = array[at : at + int(random.integers(1, 30))]
        elif kind == 3:
            array[at:at] = [b"\0", b"\xff", b"<", b'"', b"99999999999999999999", b"../", b"\n", b"&x;"][int(random.integers(8))]
        elif random.random() < 0.3:
            del array[at:]
    return bytes(array)


def use(name: str, options: dict[str, Any]) -> str:
    """Build the data set and read what it has."""
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


def fuzz(name: str, root: Path, trials: int, seed: int = 0) -> dict[str, int]:
    random = np.random.default_rng(seed)
    options = dataset_options(name, root)
    files = [sorted(root.rglob(pattern)) for pattern in TARGETS[name]]
    assert all(files), "a pattern matches nothing"
    outcomes = {"served": 0, "partly": 0, "refused": 0}
    for trial in range(trials):
        group = files[trial % len(files)]
        path = group[int(random.integers(min(len(group), 12)))]
        original = path.read_bytes()
        path.write_bytes(mutate(original, random))
        outcomes[use(name, options)] += 1
        path.write_bytes(original)
    assert use(name, options) == "served"
    return outcomes


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_mutated_files_end_in_samples_or_in_our_own_errors(name: str, tmp_path: Path) -> None:
    outcomes = fuzz(name, tmp_path / "data", 24)
    assert outcomes["served"] < 24, "no mutation had an effect: the fuzzing does not reach the reader"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_thousand_mutated_files(name: str, tmp_path: Path) -> None:
    outcomes = fuzz(name, tmp_path / "data", 250, seed=1)
    assert outcomes["refused"] + outcomes["partly"] > 20


def leaves(node: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below ``node``."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        found.append((node, key))
        leaves(value, found)
    return found


def test_every_field_of_a_coco_file_can_be_nonsense(tmp_path: Path) -> None:
    root = tmp_path / "data"
    options = dataset_options("coco", root)
    path = root / "annotations" / "instances_train2014.json"
    original = path.read_text()
    random = np.random.default_rng(0)
    places = len(leaves(json.loads(original), []))
    outcomes = {"served": 0, "partly": 0, "refused": 0}
    for trial in range(60):
        content = json.loads(original)
        top = (
            [(content, key) for key in content]
            + [(content[k], 0) for k in content]
            + [(content[k][0], f) for k in content for f in content[k][0]]
        )
        container, key = top[trial] if trial < len(top) else leaves(content, [])[int(random.integers(places))]
        container[key] = NASTY[int(random.integers(len(NASTY)))]
        path.write_text(json.dumps(content))
        outcomes[use("coco", options)] += 1
    assert outcomes["refused"] > 10 and outcomes["served"] + outcomes["partly"] > 5, outcomes


def test_every_element_of_a_voc_annotation_can_be_nonsense(tmp_path: Path) -> None:
    root = tmp_path / "data"
    options = dataset_options("voc", root)
    path = root / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"
    original = path.read_text()
    changes: list[Callable[[str], str]] = [
        lambda t, v=v: t.replace("<xmin>", f"<xmin>{v}") for v in ("nan", "inf", "1e400", "-9", "9" * 400)
    ]
    changes += [lambda t, v=v: t.replace("<difficult>0", f"<difficult>{v}") for v in ("", "x", "1e400")]
    changes += [lambda t: t.replace("object>", "thing>"), lambda t: "", lambda t: "<a/>"]
    outcomes = []
    for change in changes:
        path.write_text(change(original))
        outcomes.append(use("voc", options))
    # a box that is no box, or no XML at all; marks other than 1 are not difficult, and an image may have no object
    assert outcomes == ["partly"] * 5 + ["served"] * 4 + ["partly", "served"], outcomes
