"""The store: rows survive a kill, several writers and undefined numbers."""

from __future__ import annotations

import json
import math

import pytest

from explainer.errors import ConfigError
from explainer.evaluation.results import Row, RowStore, Unit, read_rows, write_rows


def row(index: int = 0, **values: float) -> Row:
    return Row("m", "raw", "p", f"test/{index}", index, None, values or {"a": 0.1 + 0.2}, {"curve": [1.0, math.nan]})


def unit(key: str, *rows: Row) -> Unit:
    return Unit(key, "m", "p", 0, rows, 0.5)


def test_numbers_come_back_bit_for_bit_and_nan_is_null(tmp_path):
    rows = [row(0, a=0.1 + 0.2, b=math.nan, c=math.inf, d=-math.inf), row(1, a=1e-300)]
    write_rows(tmp_path, rows)
    back = read_rows(tmp_path)
    assert back[0].values["a"] == 0.1 + 0.2 and back[1].values["a"] == 1e-300
    assert math.isnan(back[0].values["b"]) and back[0].values["c"] == math.inf and back[0].values["d"] == -math.inf
    line = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0], parse_constant=lambda name: pytest.fail(name))
    assert line["values"] == {"a": 0.30000000000000004, "b": None, "c": "Infinity", "d": "-Infinity"}
    assert line["vectors"] == {"curve": [1.0, None]} and line["class"] is None and line["index"] == 0


def test_a_partial_last_line_is_dropped_and_the_next_writer_starts_afresh(tmp_path, caplog):
    first = RowStore(tmp_path)
    first.append([unit("k0", row(0)), unit("k1", row(1))])
    (file,) = (tmp_path / "rows").glob("*.jsonl")
    content = file.read_bytes()
    file.write_bytes(content[:-25])
    assert set(RowStore(tmp_path).load()) == {"k0"}
    assert "incomplete" in caplog.text
    second = RowStore(tmp_path)
    second.append([unit("k1", row(1))])
    assert len(list((tmp_path / "rows").glob("*.jsonl"))) == 2
    assert RowStore(tmp_path).load()["k1"].rows[0].index == 1


def test_two_writers_lose_nothing(tmp_path):
    stores = [RowStore(tmp_path, rank) for rank in (0, 1)]
    for i in range(6):
        stores[i % 2].append([unit(f"k{i}", row(i))])
    assert set(RowStore(tmp_path).load()) == {f"k{i}" for i in range(6)}


def test_a_unit_without_rows_counts_as_done(tmp_path):
    RowStore(tmp_path).append([unit("empty")])
    assert RowStore(tmp_path).load()["empty"].rows == ()


def test_reading_what_is_not_there_or_no_row(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_rows(tmp_path)
    (tmp_path / "results.jsonl").write_text('{"method": 1}\n{}\n')
    with pytest.raises(ConfigError, match="line 1 is not a row"):
        read_rows(tmp_path)
