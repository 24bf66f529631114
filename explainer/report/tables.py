"""The tables of an evaluation, built once from ``summary.json`` and its rows; as Markdown, LaTeX or JSON (HTML: ``html.py``)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from explainer import plugins
from explainer.errors import ConfigError
from explainer.evaluation.protocol import PACKAGE, Column, Protocol
from explainer.evaluation.results import Row, decode, encode, read_rows
from explainer.evaluation.statistics import paired_difference
from explainer.files import parse_json
from explainer.vocabulary import todays

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Cell:
    """One number: already scaled to what is shown; NaN bounds where there is no interval."""

    value: float
    low: float = math.nan
    high: float = math.nan
    digits: int = 2
    note: str = ""
    best: bool = False
    verdict: str = ""

    @property
    def number(self) -> str:
        """The value as text."""
        return _text(self.value, self.digits)

    @property
    def interval(self) -> str:
        """The interval as text, empty where there is none."""
        return "" if math.isnan(self.low) or math.isnan(self.high) else f"{_text(self.low, self.digits)} to {_text(self.high, self.digits)}"

    def text(self) -> str:
        """Value and interval on one line."""
        parts = [self.number, f"[{self.interval.replace(' to ', ', ')}]" if self.interval else "", self.note, self.verdict]
        return " ".join(p for p in parts if p)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        key: stable name.
        title, caption: plain words.
        header: titles of the columns after the first.
        directions: True: higher is better, False: lower, None: neither; one per column.
        lines: ``(label, cells)``; a cell is None where there is no number.
        first: header of the first column.
    """

    key: str
    title: str
    caption: str
    header: list[str]
    directions: list[bool | None]
    lines: list[tuple[str, list[Cell | None]]]
    first: str = "method"


@dataclass
class Results:
    """One results folder.

    Attributes:
        folder: where it is.
        summary: content of ``summary.json``.
        rows: rows of ``results.jsonl``.
        groups: rows by (method, scale, protocol).
    """

    folder: Path
    summary: dict[str, Any]
    rows: list[Row]
    groups: dict[tuple[str, str, str], list[Row]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            self.groups.setdefault((row.method, row.scale, row.protocol), []).append(row)

    @property
    def name(self) -> str:
        """The folder's name, with the data set's where it says more: two evaluations may use the same kind of data."""
        folder, data = self.folder.resolve().name, str(self._config.get("data", {}).get("name") or "")
        return folder if not data or data in folder else f"{folder} ({data})"

    @property
    def seed(self) -> int:
        """Of the evaluation's resamples."""
        return int(self._config.get("seed") or 0)

    @property
    def _config(self) -> Mapping[str, Any]:
        return self.summary.get("provenance", {}).get("config") or {}


def load_results(folder: str | Path) -> Results:
    """Read a results folder.

    Raises:
        ConfigError: it is not one, or it is damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        folder = folder.parent
    path = folder / SUMMARY
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no results folder: {path.name} is missing. Evaluate first: python evaluate.py --config FILE --out {folder}"
        )
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
        assert summary["schema"] == 1
        return Results(folder, summary, read_rows(folder))
    except (ValueError, KeyError, AssertionError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no summary of this version ({error}). Run the evaluation again; finished batches stay.") from error


def names_of(results: Sequence[Results]) -> list[str]:
    """A name of its own for each of several results: folders that share one are called by their path."""
    names = [r.name for r in results]
    return [name if names.count(name) == 1 else str(r.folder) for name, r in zip(names, results, strict=True)]


def label_of(method: str, scale: str) -> str:
    """A line's label."""
    return method if scale == "raw" else f"{method} (rescaled)"


def title_of(summary: Mapping[str, Any], protocol: str) -> tuple[str, str]:
    """``(title, question)`` of a protocol's label in plain words; a label that differs from the protocol's name is added."""
    known = plugins.discover(PACKAGE)
    # Rows may be older than the spelling, or of a protocol that is not here.
    name = todays(summary["protocols"][protocol]["name"], known)
    cls = known.get(name, Protocol)
    title = cls.heading or name.replace("_", " ").capitalize()
    return (title if todays(protocol, known) == name else f"{title} ({protocol})"), cls.question


def protocol_table(results: Results, protocol: str) -> Table:
    """The numbers of one protocol: a line per method and scale. The best value of each column is marked (rows that ask no
    classifier, constants and ground truth among them, are out of competition).
    """
    summary = results.summary
    entry = summary["protocols"][protocol]
    columns = {name: c for name, c in entry["columns"].items() if c["shown"]}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in summary["results"]:
        if line["protocol"] == protocol and line["column"] in columns:
            found.setdefault((line["method"], line["scale"]), {})[line["column"]] = line
    lines: list[tuple[str, list[Cell | None]]] = []
    best = {name: _best(name, c, found, summary) for name, c in columns.items()}
    for (method, scale), numbers in found.items():
        most = max(n["used"] for n in numbers.values())
        cells = [_cell(numbers.get(name), c, most, best[name] == (method, scale)) for name, c in columns.items()]
        lines.append((label_of(method, scale), cells))
    title, question = title_of(summary, protocol)
    caption = " ".join(p for p in (question, f"Source: {entry['source']}; mode: {entry['mode']}." if entry["source"] else "") if p)
    header = [c["title"] + (" %" if c["percent"] else "") for c in columns.values()]
    return Table(protocol, title, caption, header, [c["higher_is_better"] for c in columns.values()], lines)


def reference_method(results: Results) -> str | None:
    """The method that others are compared with: the first trained Explainer, else the first method."""
    config = results.summary.get("provenance", {}).get("config", {}).get("methods") or {}
    methods: list[str] = list(results.summary["methods"])
    trained = [m for m in methods if (config.get(m) or {}).get("name") == "explainer" or m == "explainer"]
    return next(iter(trained or methods), None)


def difference_table(results: Results, protocol: str, reference: str, bootstrap: int = 1000) -> Table | None:
    """Paired differences "reference - method" over the rows that both have, with intervals; None where there is nothing to compare.

    The reference is taken raw, or rescaled where it has no raw rows; each method gives a line for every scale it has. The resamples are
    the evaluation's own.
    """
    summary = results.summary
    confidence = summary.get("confidence") or 0.95
    columns = {
        name: c
        for name, c in summary["protocols"][protocol]["columns"].items()
        if c["shown"] and c["counts"] is None and c["higher_is_better"] is not None
    }
    scale_of_reference = "raw" if (reference, "raw", protocol) in results.groups else "minmax"
    own = results.groups.get((reference, scale_of_reference, protocol))
    others = [m for m in summary["methods"] if m != reference]
    if not own or not columns or not others:
        return None
    lines: list[tuple[str, list[Cell | None]]] = []
    for method in others:
        for scale in ("raw", "minmax"):
            rows = results.groups.get((method, scale, protocol))
            if not rows:
                continue
            cells: list[Cell | None] = []
            for name, c in columns.items():
                known = {k: v for k, v in c.items() if k in Column.__dataclass_fields__ and k != "counts"}
                s = paired_difference(own, rows, name, Column(**known), bootstrap=bootstrap, confidence=confidence, seed=results.seed)
                factor, digits = (100.0 if c["percent"] else 1.0), (2 if c["percent"] else 3)
                verdict = "" if not (s.low > 0 or s.high < 0) else "better" if (s.low > 0) == c["higher_is_better"] else "worse"
                cell = Cell(s.value * factor, s.low * factor, s.high * factor, digits, verdict=verdict)
                cells.append(None if math.isnan(s.value) else cell)
            lines.append((label_of(method, scale), cells))
    title, _ = title_of(summary, protocol)
    first = label_of(reference, scale_of_reference)
    caption = f"{first} minus each method, same images; {100 * confidence:g} % interval. Better or worse: it excludes 0."
    header = [c["title"] + (" %" if c["percent"] else "") for c in columns.values()]
    directions = [c["higher_is_better"] for c in columns.values()]
    return Table(f"{protocol}_differences", f"{title}: differences", caption, header, directions, lines)


def verdict_table(results: Results) -> Table | None:
    """Checks for cheating: a line per method, a column per check; the cell tells pass, fail or undecided, value and bar."""
    verdicts = results.summary.get("verdicts") or []
    if not verdicts:
        return None
    checks = list(dict.fromkeys(v["check"] for v in verdicts))
    by: dict[tuple[str, str], dict[str, Any]] = {}
    for v in verdicts:
        by.setdefault((v["method"], v["scale"]), {})[v["check"]] = v
    lines = [(label_of(*who), [_verdict_cell(found.get(check)) for check in checks]) for who, found in by.items()]
    caption = "Pass or fail, the value and the bar it is held against."
    return Table("checks", "Checks for cheating", caption, checks, [None] * len(checks), lines)


def all_tables(results: Results, bootstrap: int = 1000) -> list[Table]:
    """Every table of a results folder: checks first, then each protocol and its differences."""
    found: list[Table | None] = [verdict_table(results)]
    reference = reference_method(results)
    for protocol in results.summary["protocols"]:
        found.append(protocol_table(results, protocol))
        if reference is not None:
            found.append(difference_table(results, protocol, reference, bootstrap))
    return [t for t in found if t is not None and t.lines]


def markdown(table: Table) -> str:
    """As a Markdown table under a heading."""
    head = [table.first, *(plain(h) + _ARROWS[d] for h, d in zip(table.header, table.directions, strict=True))]
    lines = [head, ["---", *["---:"] * len(table.header)]]
    for label, cells in table.lines:
        texts = ["-" if c is None else f"**{c.text()}**" if c.best else c.text() for c in cells]
        lines.append([plain(label), *texts])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"### {plain(table.title)}\n\n{plain(table.caption)}\n\n{body}\n"


def as_json(tables: Sequence[tuple[str, Table]]) -> str:
    """``(data name, table)`` pairs as JSON; null stands for "no number"."""

    def numbers(cell: Cell | None) -> dict[str, Any] | None:
        if cell is None:
            return None
        plain = {"value": encode(cell.value), "low": encode(cell.low), "high": encode(cell.high), "best": cell.best}
        return {**plain, **({"verdict": cell.verdict} if cell.verdict else {}), **({"note": cell.note} if cell.note else {})}

    content = [
        {
            "data": data,
            "key": t.key,
            "title": t.title,
            "caption": t.caption,
            "columns": t.header,
            "higher_is_better": t.directions,
            "rows": [{"label": label, "cells": [numbers(c) for c in cells]} for label, cells in t.lines],
        }
        for data, t in tables
    ]
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


_ARROWS = {True: " ↑", False: " ↓", None: ""}


def _text(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return "∞" if value == math.inf else "-∞" if value == -math.inf else f"{value:.{digits}f}"


def _cell(line: Mapping[str, Any] | None, column: Mapping[str, Any], most: int, best: bool) -> Cell | None:
    if line is None or line["value"] is None:
        return None
    factor = 100.0 if column["percent"] else 1.0
    value, low, high = (decode(line[k]) * factor for k in ("value", "low", "high"))
    digits = 2 if column["percent"] or abs(value) >= 10 else 3 if abs(value) >= 0.01 or value == 0 else 6
    return Cell(value, low, high, digits, f"(n={line['used']})" if line["used"] < most else "", best)


def _best(name: str, column: Mapping[str, Any], found: Mapping[tuple[str, str], Any], summary: Mapping[str, Any]) -> tuple[str, str] | None:
    if column["higher_is_better"] is None or len(found) < 2:
        return None
    values = {
        who: decode(numbers[name]["value"])
        for who, numbers in found.items()
        if name in numbers and numbers[name]["value"] is not None and not _reference(summary["methods"].get(who[0], {}))
    }
    if len(values) < 2:
        return None
    return (max if column["higher_is_better"] else min)(values, key=lambda who: values[who])


def _reference(method: Mapping[str, Any]) -> bool:
    """Whether the row is out of competition. Older summaries only know which rows read ground truth."""
    return bool(method.get("reference", method.get("needs_truth")))


def _verdict_cell(verdict: Mapping[str, Any] | None) -> Cell | None:
    if verdict is None:
        return None
    word = {True: "pass", False: "FAIL", None: "undecided"}[verdict["passed"]]
    bar = decode(verdict["threshold"])
    return Cell(decode(verdict["value"]), digits=3, note="" if math.isnan(bar) else f"({verdict['rule']} {bar:.3f})", verdict=word)


def plain(text: str) -> str:
    """Text that Markdown shows as it is: no table border, no HTML."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
