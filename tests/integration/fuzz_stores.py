"""What evaluations, runs and caches keep, whole and mutated."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.integration.fuzz_models import small_classifier
from tests.integration.fuzz_mutations import NASTY, Case, alternately, bytewise, mutated_tree, replaced, valuewise


def results(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """A results folder, as ``explainer report`` reads it and as an evaluation goes on with it."""
    from explainer.evaluation.results import RowStore
    from explainer.report.write import write
    from tests.unit.report.results_folder import make_results

    made = make_results(folder / "results", images=4, gallery=1)
    rows = sorted((made / "rows").glob("*.jsonl"))
    assert rows
    line = folder / "line.json"
    line.write_text((made / "results.jsonl").read_text().splitlines()[0])

    def report() -> None:
        write([made], folder / "report.html", ["md", "tex", "json"], bootstrap=5)

    def one_line() -> None:
        original = (made / "results.jsonl").read_text()
        replaced(made / "results.jsonl", (line.read_text() + "\n" + original.partition("\n")[2]).encode(), report)()

    def go_on() -> None:
        RowStore(made).load()

    return alternately(
        bytewise([made / "summary.json", made / "results.jsonl"], report, random),
        valuewise(made / "summary.json", report, random),
        valuewise(line, one_line, random),
        bytewise(rows, go_on, random),
        _unit_lines(rows[0], go_on, random),
    )


def _unit_lines(path: Path, use: Callable[[], object], random: np.random.Generator) -> Iterator[Case]:
    """A file of finished batches in which one batch has another value."""
    lines = path.read_text().splitlines()
    yield "nothing", use
    while True:
        at = int(random.integers(len(lines)))
        changed = [*lines[:at], json.dumps(mutated_tree(json.loads(lines[at]), random, NASTY)), *lines[at + 1 :]]
        yield f"{path.name}, line {at + 1}: {changed[at][:1000]}", replaced(path, "\n".join(changed).encode(), use)


def run_files(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """What a run keeps beside its checkpoints: numbers, precision, decisions of the classifier, who writes there, cached maps."""
    from explainer.attribution.map_cache import MapCache
    from explainer.config import RunConfig
    from explainer.data.datamodule import DataModule
    from explainer.files import Owner
    from explainer.locks import IN_USE, claimed
    from explainer.tasks.csv_log import read_rows
    from explainer.tasks.precision import FILE, settled
    from explainer.tasks.predicted import predict_targets

    data, judged = DataModule("shapes", 4, options={"size": 32, "length": 8}), small_classifier()
    (folder / "metrics.csv").write_text("step,train/loss,val/loss\n0.0,1.5,\n1.0,1.25,0.5\n")
    (folder / FILE).write_text(json.dumps({"precision": "32-true", "channels_last": False, "seconds": {"32-true": 0.1}}))
    maps, pairs = torch.rand(2, 4, 4), (["a", "b"], [0, 1])
    stored = MapCache(folder / "maps", {"a": 1}).put(*pairs, maps)
    (shard,) = (folder / "maps").rglob("shard-*.npz")
    expected = predict_targets(judged, data, "val", folder=folder).classes
    (folder / IN_USE).write_text(f"{Owner.this()}\nfit\n")

    def numbers() -> None:
        assert all(isinstance(v, float) for row in read_rows(folder / "metrics.csv") for v in row.values())

    def precision() -> None:
        config = RunConfig(run_dir=str(folder))
        config.trainer.precision = "auto"
        settled(config, None, 16, resumes=True, alone=True, by_rule="32-true")  # type: ignore[arg-type]

    def decisions() -> None:
        assert predict_targets(judged, data, "val", folder=folder).classes == expected

    def claim() -> None:
        with claimed(folder, "fit"):
            pass

    def cached() -> None:
        cache = MapCache(folder / "maps", {"a": 1})
        for one, known in zip(cache.get(*pairs), stored, strict=True):
            assert one is None or torch.equal(one, known)
        for path in (folder / "maps").rglob("*.rejected"):
            path.replace(shard)

    return alternately(
        bytewise([folder / "metrics.csv"], numbers, random),
        bytewise([folder / FILE], precision, random),
        valuewise(folder / FILE, precision, random),
        bytewise([folder / "predicted_val.json"], decisions, random),
        valuewise(folder / "predicted_val.json", decisions, random),
        bytewise([folder / IN_USE], claim, random),
        bytewise([shard, shard, shard.with_name("key.json")], cached, random),
    )


# ---------------------------------------------------------------------- SQLite
def databases(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """The memory of digests, and the answers of a classifier that gives scores."""
    from explainer.data.content import content_digests, memory_file
    from explainer.models.black_box import BlackBox

    files = [folder / f"{i}.bin" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(bytes([i]) * 100)
        os.utime(file, (1, 1))
    images = torch.linspace(0, 1, 3 * 4 * 4 * 5).reshape(5, 3, 4, 4)
    store = folder / "answers.sqlite"

    def digests() -> None:
        assert content_digests(files) == expected

    def answers() -> None:
        box = BlackBox(lambda x: x.mean((2, 3)), 3, cache_file=str(store), identity="mean", budget=10**6)
        assert box(images).shape == (5, 3)
        box.classifier.cache.paid()

    expected = content_digests(files)
    memory = memory_file()
    memory.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(memory)) as file, file:
        import explainer.data.content as content

        file.execute("DROP TABLE IF EXISTS content")
        file.commit()
        content._remember(
            [
                (content.hashlib.blake2b(content.os.fsencode(f.absolute()), digest_size=16).digest(), content._stamp(f), d)
                for f, d in zip(files, expected, strict=True)
            ]
        )
    answers()
    return alternately(
        bytewise([memory], digests, random),
        _tables(memory, {"content": ("key", "stamp", "digest")}, digests, random),
        bytewise([store], answers, random),
        _tables(store, {"answers": ("key", "scores"), "paid": ("identity", "number")}, answers, random),
    )


def _tables(path: Path, tables: dict[str, tuple[str, ...]], use: Callable[[], object], random: np.random.Generator) -> Iterator[Case]:
    """A database whose values, tables or columns are others."""
    values: list[Any] = [None, -1, 2**62, 1e308, float("inf"), "", "x" * 50, b"", b"\0\0\xc0\x7f", b"\0" * 12, b"\0" * 8, b"x" * 10**6]
    yield "nothing", use
    while True:
        table = list(tables)[int(random.integers(len(tables)))]
        column = tables[table][int(random.integers(len(tables[table])))]
        value = values[int(random.integers(len(values)))]
        statement: tuple[str, tuple[Any, ...]] = (f"UPDATE OR IGNORE {table} SET {column} = ?", (value,))
        kind = int(random.integers(8))
        if kind == 0:
            statement = (f"DROP TABLE {table}", ())
        elif kind == 1:
            statement = (f"ALTER TABLE {table} RENAME COLUMN {column} TO other", ())
        elif kind == 2:
            statement = (f"CREATE TRIGGER t BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'no'); END", ())
        copy = path.with_name("copy.sqlite")
        shutil.copyfile(path, copy)
        with closing(sqlite3.connect(copy)) as file, file:
            file.execute(*statement)
        yield f"{path.name}: {statement[0]} {str(statement[1])[:60]}", replaced(path, copy.read_bytes(), use)
