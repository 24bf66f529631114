"""Mutations of bytes and values, and files that are read mutated and then put back."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from explainer.errors import ExplainerError

Case = tuple[str, Callable[[], object]]  # what was mutated, and its use
Kind = Callable[[Path, np.random.Generator], Iterator[Case]]

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
DEEP = 100_000  # levels of nesting at which recursion ends in an error


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


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested dictionaries and lists."""
    items = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    return [place for key, value in items for place in ((node, key), *places(value))]


def mutated_tree(tree: Any, random: np.random.Generator, values: list[Any]) -> Any:
    """One value replaced, one key dropped, renamed or added."""
    tree = copy.deepcopy(tree)
    every = places(tree)
    container, key = every[int(random.integers(len(every)))]
    kind, value = int(random.integers(5)), values[int(random.integers(len(values)))]
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif kind == 2 and isinstance(container, dict):
        container["extra_key"] = value
    else:
        container[key] = value
    return tree


def each(*uses: Callable[[], object]) -> None:
    """Use in several ways, each of which may be refused; refused as a whole where all are."""
    refusals = []
    for use in uses:
        try:
            use()
        except ExplainerError as error:
            refusals.append(error)
    if len(refusals) == len(uses):
        raise refusals[-1]


def replaced(path: Path, content: bytes, use: Callable[[], object]) -> Callable[[], None]:
    """Use a file of other content; it is as before afterwards, except after a fault, so that it can be looked at."""

    def act() -> None:
        original = path.read_bytes()
        path.write_bytes(content)
        try:
            use()
        except ExplainerError:
            path.write_bytes(original)
            raise
        path.write_bytes(original)

    return act


def bytewise(paths: Sequence[Path], use: Callable[[], object], random: np.random.Generator) -> Iterator[Case]:
    """Files as they are, then ever again one of them with other bytes."""
    yield "nothing", use
    while True:
        path = paths[int(random.integers(len(paths)))]
        yield path.name, replaced(path, mutate(path.read_bytes(), random), use)


def valuewise(path: Path, use: Callable[[], object], random: np.random.Generator, values: Sequence[Any] = NASTY) -> Iterator[Case]:
    """A JSON file as it is, then ever again with another value, and now and then nested too deeply."""
    tree = json.loads(path.read_text())
    yield "nothing", use
    for i in itertools.count():
        text = json.dumps(mutated_tree(tree, random, list(values)))
        if i % 12 == 0:
            container, key = places(tree)[int(random.integers(len(places(tree))))]
            kept, container[key] = container[key], "DEEP"
            text, container[key] = json.dumps(tree).replace('"DEEP"', "[" * DEEP + "]" * DEEP), kept
        yield f"{path.name}: {text[:1500]}", replaced(path, text.encode(), use)


def alternately(*kinds: Iterator[Case]) -> Iterator[Case]:
    """One of each in turn; the first of all together."""
    whole = [next(kind)[1] for kind in kinds]
    yield "nothing", lambda: [use() for use in whole]
    for kind in itertools.cycle(kinds):
        yield next(kind)
