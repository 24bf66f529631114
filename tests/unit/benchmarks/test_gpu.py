"""The script for machines with a GPU: every part runs here in small, and one failure is a row."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import gpu


def test_every_part_runs_in_small(tmp_path: Path) -> None:
    report = gpu.run(gpu.parse(["--small", "--out", str(tmp_path)]))
    assert json.loads((tmp_path / "gpu.json").read_text())["device"] == report["device"] and "CPU" in report["device"]
    rows = {(row["part"], row["name"]): row for row in report["rows"]}
    assert {part for part, _ in rows} == set(gpu.PARTS)
    failed = {name for name, row in rows.items() if "error" in row}
    assert failed == {("onnx", "CPUExecutionProvider"), ("onnx", "CUDAExecutionProvider"), ("processes", "nccl")}
    assert rows["training", "small_vgg, float32"]["images/s"] > 0 and rows["training", "small_vgg, float32"]["GiB"] is None
    assert all(row["largest difference"] == 0 for (part, _), row in rows.items() if part == "parity"), "the CPU is equal to itself"
    assert rows["methods", "gradient"]["forward"] == rows["methods", "gradient"]["with gradient"] == 1
    assert rows["processes", "gloo"]["relative difference"] < 1e-6
    table = (tmp_path / "gpu.md").read_text()
    assert table.startswith(f"# {report['device']}") and "## parity" in table and "| nccl | RuntimeError: nccl needs a GPU |" in table


def test_a_failure_and_a_spent_budget_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("out of\n memory")

    monkeypatch.setitem(gpu.PARTS, "onnx", lambda o: iter([("first", broken), ("second", lambda: {"ms": 1.0})]))
    o, rows = gpu.parse(["--small", "--out", str(tmp_path)]), []
    gpu.measure("onnx", o, time.monotonic() + 60, rows.append)
    assert rows == [
        {"part": "onnx", "name": "first", "error": "RuntimeError: out of memory"},
        {"part": "onnx", "name": "second", "ms": 1.0},
    ]
    rows.clear()
    gpu.measure("onnx", o, time.monotonic() - 1, rows.append)
    assert [row["error"] for row in rows] == ["left out: the part's time is spent"] * 2
    assert sum(gpu.SHARES.values()) <= 1 and set(gpu.SHARES) == set(gpu.PARTS)
