"""Similarities of concepts that come from outside the network: a table in a file, or a hierarchy of labels.

Fong and Vedaldi (CVPR 2018, section 5) compare concept spaces of networks with those of WordNet and Word2Vec. Nothing is downloaded here:
the numbers come from the user's own files.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from explainer.errors import ConfigError


def read_similarity(path: Path, names: Sequence[str]) -> Tensor:
    """A symmetric table of similarities, ``[C,C]`` in the order of ``names``.

    Args:
        path: CSV; its first row names the columns after an empty corner, its first column the rows. Concepts that are not asked for may
            stand in it, too.
        names: the concepts.

    Raises:
        ConfigError: the file cannot be read, misses a concept, holds something that is no number, or is not symmetric.
    """
    rows = _rows(path)
    columns = [cell.strip() for cell in rows[0][1:]]
    values: dict[str, dict[str, float]] = {}
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(columns) + 1:
            raise ConfigError(f"{path}, line {line}: {len(row) - 1} numbers for {len(columns)} columns.")
        try:
            values[row[0].strip()] = dict(zip(columns, map(float, row[1:]), strict=True))
        except ValueError as error:
            raise ConfigError(f"{path}, line {line}: {error}. Every cell after the row's name must be a number.") from error
    missing = [n for n in names if n not in values or n not in columns]
    if missing:
        raise ConfigError(f"{path} has no row and column for {', '.join(map(repr, missing))}: every concept that is compared needs both.")
    table = torch.tensor([[values[a][b] for b in names] for a in names], dtype=torch.float32)
    if not torch.isfinite(table).all() or not torch.allclose(table, table.T, atol=1e-5):
        raise ConfigError(
            f"{path} must hold finite numbers and be symmetric: the similarity of two concepts does not depend on their order."
        )
    return table


def path_similarity(path: Path, names: Sequence[str]) -> Tensor:
    """``1 / (1 + edges)`` between two labels of a hierarchy, ``[C,C]``; 0 where no path joins them.

    Args:
        path: CSV of two columns, child and parent, one edge a line, no heading. Parents need not be concepts.
        names: the concepts.

    Raises:
        ConfigError: the file cannot be read, a line has not two names, or a concept stands in no line.
    """
    neighbours: dict[str, set[str]] = {}
    for line, row in enumerate(_rows(path), 1):
        pair = [cell.strip() for cell in row]
        if len(pair) != 2 or not all(pair):
            raise ConfigError(f"{path}, line {line}: expected a child and its parent, received {row}.")
        for a, b in (pair, pair[::-1]):
            neighbours.setdefault(a, set()).add(b)
    missing = [n for n in names if n not in neighbours]
    if missing:
        raise ConfigError(f"{path} says nothing of {', '.join(map(repr, missing))}: every concept that is compared needs a line.")
    table = torch.zeros(len(names), len(names))
    for i, start in enumerate(names):
        steps = _steps(neighbours, start)
        for j, end in enumerate(names):
            if end in steps:
                table[i, j] = 1 / (1 + steps[end])
    return table


def _steps(neighbours: dict[str, set[str]], start: str) -> dict[str, int]:
    """Edges from ``start`` to every label that a path leads to, breadth first."""
    found, waiting = {start: 0}, deque([start])
    while waiting:
        here = waiting.popleft()
        for there in neighbours[here] - found.keys():
            found[there] = found[here] + 1
            waiting.append(there)
    return found


def _rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [row for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a CSV file in UTF-8.") from error
    if not rows:
        raise ConfigError(f"{path} is empty: give a CSV file with the concepts' similarities, or with child and parent in each line.")
    return rows
