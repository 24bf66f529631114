"""Mutated inputs of every kind: each works or ends in one of the project's own errors, within a time and a memory; none executes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from explainer.commands.parsing import parse_evaluate, parse_run
from explainer.errors import ExplainerError
from tests.integration import fuzzing
from tests.integration.fuzz_inputs import KINDS
from tests.integration.fuzzing import endure

#: Mutations of each kind in the slow test; 160 make 2,240 of the 14.
MUTATIONS = int(os.environ.get("EXPLAINER_MUTATIONS", "160"))


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_inputs(kind: str, tmp_path: Path) -> None:
    outcomes = endure(kind, tmp_path / "inputs", 14, seed=0)
    assert outcomes["refused"], "no mutation had an effect: the fuzzing does not reach the reader"


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_inputs(kind: str, tmp_path: Path) -> None:
    outcomes = endure(kind, tmp_path / "inputs", MUTATIONS, seed=1)
    print(f"{kind}: {outcomes}")
    assert min(outcomes.values()), outcomes


@pytest.mark.parametrize(
    ("kind", "words"),
    [("sleeping", "nothing else.*takes more than 1 s"), ("greedy", "MemoryError"), ("dying", "ended the process"), ("raw", "KeyError")],
)
def test_the_bounds_hold(kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS", 1.0)
    with pytest.raises(AssertionError, match=words):
        endure(kind, tmp_path / "inputs", 3, seed=0)


def test_yaml_tags_do_not_run(tmp_path: Path) -> None:
    file, mark = tmp_path / "evil.yaml", tmp_path / "executed"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"):
        file.write_text(f"run_dir: {tag} ['{mark}']\n")
        for parse in (lambda: parse_run(["fit", "--config", str(file)]), lambda: parse_evaluate(["--config", str(file)])):
            with pytest.raises(ExplainerError):
                parse()
    assert not mark.exists()
    yaml.unsafe_load(file.read_text().replace("object/new", "object/apply"))
    assert mark.exists(), "the payload was harmless: this test proves nothing"
