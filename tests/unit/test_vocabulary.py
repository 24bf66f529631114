"""The torch-free words agree with what importing everything finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from explainer import fills, plugins, vocabulary


@pytest.mark.parametrize(
    "package", [f"explainer.{p}" for p in ("baselines", "losses", "metrics", "data", "evaluation.protocols", "export")]
)
def test_names_read_from_files_are_those_of_what_is_imported(package: str) -> None:
    assert vocabulary.names(package) == list(plugins.discover(package))


def test_fills_are_one_list() -> None:
    assert fills.FillKind is vocabulary.FillKind
    assert set(vocabulary.SEARCHES) < set(get_args(vocabulary.RefineMethod))


def test_only_concrete_classes_and_declared_functions_have_names(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        'name = "module"\n\nclass A:\n    name = "a"\n\nclass B:\n    name: str = "b"\n    x = name = "c"\n\n'
        'class C:\n    name = "abstract"\n\n    @abc.abstractmethod\n    def f(self): ...\n\nclass D:\n    name: str\n'
    )
    (tmp_path / "b.txt").write_text('class E:\n    name = "e"\n')
    (tmp_path / "f.py").write_text(
        '@Facts("f", optimum=1.0)\ndef f(): ...\n\n@facts.Facts(name="g")\ndef other(): ...\n\n@cached("h")\ndef h(): ...\n'
    )
    assert vocabulary.names_in(tmp_path) == ["a", "b", "f", "g"]


def test_reading_names_imports_no_torch() -> None:
    code = "import sys; from explainer import vocabulary; assert 'rise' in vocabulary.methods(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_an_old_spelling_is_answered_only_where_today_s_is_known() -> None:
    assert vocabulary.todays("randomise", ["randomize"]) == "randomize"
    assert vocabulary.todays("randomise", ["randomise", "randomize"]) == "randomise"
    assert vocabulary.todays("licence", ["layer"]) == "licence"
    assert not set(vocabulary.FORMER) & set(vocabulary.FORMER.values())
