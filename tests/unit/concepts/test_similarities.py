"""Similarities from files: by hand, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from explainer.concepts.similarities import path_similarity, read_similarity
from explainer.errors import ConfigError


def file(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_comes_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    path = file(tmp_path, ",cat,dog,car\ncar,0.1,0.2,1\ncat,1,0.8,0.1\ndog,0.8,1,0.2\n")
    assert torch.equal(read_similarity(path, ["dog", "car"]), torch.tensor([[1.0, 0.2], [0.2, 1.0]]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",a,b\na,1,0.5\nb,0.4,1\n", "symmetric"),
        (",a,b\na,1,nan\nb,nan,1\n", "finite"),
        (",a\na,1\n", "no row and column for 'b'"),
        (",a,b\na,1\nb,1,1\n", "line 2: 1 numbers for 2 columns"),
        (",a,b\na,1,x\nb,1,1\n", "line 2: could not convert.*must be a number"),
        ("", "empty"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_similarity(file(tmp_path, text), ["a", "b"])


def test_steps_in_a_hierarchy(tmp_path: Path) -> None:
    """animal - (cat, dog - poodle), and a car apart: poodle to cat is three edges."""
    path = file(tmp_path, "cat,animal\ndog,animal\npoodle,dog\ncar,vehicle\n")
    expected = [[1, 1 / 4, 0], [1 / 4, 1, 0], [0, 0, 1]]
    assert torch.allclose(path_similarity(path, ["poodle", "cat", "car"]), torch.tensor(expected, dtype=torch.float32))
    assert path_similarity(path, ["dog", "animal"])[0, 1] == 0.5


def test_hierarchies_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1: expected a child and its parent"):
        path_similarity(file(tmp_path, "cat\n"), ["cat"])
    with pytest.raises(ConfigError, match="says nothing of 'dog'"):
        path_similarity(file(tmp_path, "cat,animal\n"), ["cat", "dog"])
    with pytest.raises(ConfigError, match="cannot be read"):
        path_similarity(tmp_path / "none.csv", ["cat"])
