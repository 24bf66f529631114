"""``summary.json``, ``summary.csv``, ``table.md`` and the printed tables, all from rows.

``summary.json``::

    {"schema": 1, "complete": true, "images": 500, "split": "test", "class_names": [...],
     "methods": {"<label>": {"scales": [...], "needs_truth": false, "reference": false, "signed": true,
                              "seconds": 12.3}},    seconds: spent on maps
     "protocols": {"<label>": {"name", "source", "mode", "columns": {"<column>": {"title", "higher_is_better", "percent", ...}},
                               "axes": {"<vector>": [...]}}},
     "results": [{"method", "scale", "protocol", "column", "value", "low", "high", "used", "excluded", "images",
                  "per_class": {name: value}}],
     "vectors": [{"method", "scale", "protocol", "vector", "mean": [...], "per_class": {name: [...]}, "rows": 12}],
     "conclusions": ["what a trained Explainer beats, what beats it, what its numbers warn of: sentences"],
     "verdicts": [{"protocol", "check", "method", "scale", "value", "threshold", "rule", "passed", "sentence", "details"}],
     "skipped": [{"method", "protocol", "reason"}], "gallery": {...}, "failures": {"<method>": "message"}, "notices": [...],
     "provenance": {...}}

null stands for NaN. ``per_class`` of the vector "masking" is the class x class matrix.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from explainer.evaluation.conclusions import conclusions
from explainer.evaluation.protocol import Protocol
from explainer.evaluation.results import Row, Unit, encode
from explainer.evaluation.runner import CLASSIFIER, Outcome, Runner
from explainer.evaluation.statistics import mean_vector, statistic
from explainer.evaluation.verdict import verdicts_of
from explainer.files import write_text
from explainer.models.explainer import TrainedExplainer

SUMMARY, CSV, TABLE = "summary.json", "summary.csv", "table.md"


def group(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by (method, scale, protocol), in the order of their first row."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.scale, row.protocol), []).append(row)
    return found


def summarize(
    rows: Sequence[Row],
    protocols: Mapping[str, Protocol],
    class_names: tuple[str, ...],
    *,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lists ``results`` and ``vectors`` of the module's text."""
    results, vectors = [], []
    for (method, scale, label), part in group(rows).items():
        if label not in protocols:
            continue
        protocol = protocols[label]
        place = {"method": method, "scale": scale, "protocol": label}
        for name, column in protocol.columns().items():
            s = statistic(part, name, column, protocol=protocol, bootstrap=bootstrap, confidence=confidence, seed=seed)
            results.append(
                {
                    **place,
                    "column": name,
                    **{k: encode(getattr(s, k)) for k in ("value", "low", "high")},
                    **{k: getattr(s, k) for k in ("used", "excluded", "images")},
                    "per_class": {class_names[k]: encode(v) for k, v in s.per_class.items()},
                }
            )
        for vector in sorted({name for row in part for name in row.vectors}):
            own = [r for r in part if vector in r.vectors]
            labels = sorted({r.class_index for r in own if r.class_index is not None})
            per_class = {class_names[k]: [encode(x) for x in mean_vector([r for r in own if r.class_index == k], vector)] for k in labels}
            mean = [encode(x) for x in mean_vector(own, vector)]
            vectors.append({**place, "vector": vector, "mean": mean, "per_class": per_class, "rows": len(own)})
    return results, vectors


def build(
    runner: Runner, rows: Sequence[Row], outcome: Outcome, provenance: Mapping[str, Any], *, bootstrap: int, confidence: float
) -> dict[str, Any]:
    """The content of ``summary.json``."""
    names = tuple(runner.explanandum.class_names)
    units, _ = runner.collect()
    results, vectors = summarize(rows, runner.protocols, names, bootstrap=bootstrap, confidence=confidence, seed=runner.settings.seed)
    seconds = {
        m.label: _seconds([unit for label in runner.protocols for unit in units.get(f"{m.label}/{label}", [])]) for m in runner.methods
    }
    return {
        "schema": 1,
        "complete": outcome.complete,
        "images": runner.images,
        "split": runner.settings.split,
        "class_names": list(names),
        "confidence": confidence if bootstrap else None,
        "methods": {
            m.label: {
                "scales": list(m.scales),
                "needs_truth": m.needs_truth,
                "reference": m.reference,
                "signed": m.signed,
                "seconds": round(seconds[m.label], 3),
            }
            for m in runner.methods
        },
        "protocols": {
            label: {
                "name": p.name,
                "source": p.source,
                "mode": p.mode,
                "columns": {name: c.record() for name, c in p.columns().items()},
                "axes": p.axes(names),
            }
            for label, p in runner.protocols.items()
        },
        "results": results,
        "vectors": vectors,
        "conclusions": conclusions(
            group(rows),
            runner.protocols,
            [m.label for m in runner.methods if isinstance(m.attributor, TrainedExplainer)],
            [m.label for m in runner.methods if m.reference and not m.needs_truth],
            confidence=confidence,
            seed=runner.settings.seed,
            bootstrap=bootstrap,
        ),
        "verdicts": [{**v.record(), "protocol": label} for label, v in verdicts_of(runner.protocols, rows)],
        "skipped": [{"method": m, "protocol": p, "reason": reason} for (m, p), reason in {**outcome.skipped, **outcome.refused}.items()]
        + _empty(runner, rows, outcome),
        "gallery": runner.gallery.record(),
        "failures": outcome.failures,
        "notices": outcome.notices,
        "provenance": dict(provenance),
    }


def _seconds(units: Sequence[Unit]) -> float:
    """Time spent on maps; the units of one batch share their maps and so the time."""
    return sum({u.batch: u.seconds for u in units if not math.isnan(u.seconds)}.values())


def _empty(runner: Runner, rows: Sequence[Row], outcome: Outcome) -> list[dict[str, Any]]:
    """Combinations that were computed and gave no row."""
    units, _ = runner.collect()
    present = {(r.method, r.protocol) for r in rows}
    found = []
    for method, label in runner.combinations():
        name = CLASSIFIER if method is None else method.label
        if units[f"{name}/{label}"] and (name, label) not in present and (name, label) not in outcome.refused:
            found.append({"method": name, "protocol": label, "reason": "no image had what it needs (ground truth, labels, a second image)"})
    return found


def cell(entry: Mapping[str, Any], percent: bool, bounds: bool) -> str:
    """One number as text, with its interval where there is one."""
    value = entry["value"]
    if value is None:
        return "-"
    numbers = [float(x) * (100 if percent else 1) for x in (value, entry["low"], entry["high"]) if x is not None]
    digits = 2 if percent or abs(numbers[0]) >= 10 else 3 if abs(numbers[0]) >= 0.01 or numbers[0] == 0 else 6
    if not bounds or len(numbers) < 3 or not all(math.isfinite(x) for x in numbers):
        return f"{numbers[0]:.{digits}f}"
    return f"{numbers[0]:.{digits}f} [{numbers[1]:.{digits}f}, {numbers[2]:.{digits}f}]"


def rows_of_table(summary: Mapping[str, Any], label: str, bounds: bool = True, hidden: bool = False) -> tuple[list[str], list[list[str]]]:
    """``(header, lines)`` of one protocol's table: a line per method and scale, a column per number; ``n`` is the number of rows
    behind them (less where a value is undefined: told in its cell).

    Args:
        summary: content of ``summary.json``.
        label: label of the protocol.
        bounds: with intervals.
        hidden: also columns that are not shown by default.
    """
    columns = {name: c for name, c in summary["protocols"][label]["columns"].items() if hidden or c["shown"]}
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in summary["results"]:
        if entry["protocol"] == label:
            entries.setdefault((entry["method"], entry["scale"]), {})[entry["column"]] = entry
    arrow = {True: " ↑", False: " ↓", None: ""}
    header = ["method", *(c["title"] + (" %" if c["percent"] else "") + arrow[c["higher_is_better"]] for c in columns.values()), "n"]
    lines = []
    for (method, scale), found in entries.items():
        number = max(found[name]["used"] for name in columns)
        cells = []
        for name, column in columns.items():
            fewer = f" (n={found[name]['used']})" if 0 < found[name]["used"] < number else ""
            cells.append(cell(found[name], column["percent"], bounds) + fewer)
        lines.append([method if scale == "raw" else f"{method} (min-max)", *cells, str(number)])
    return header, lines


def markdown(summary: Mapping[str, Any]) -> str:
    """All tables as Markdown."""
    parts = [f"# Evaluation: {summary['images']} images of the {summary['split']} split"]
    if not summary["complete"]:
        parts.append("**Incomplete: run the same command again to go on.**")
    for label, protocol in summary["protocols"].items():
        header, lines = rows_of_table(summary, label)
        if lines:
            parts.append(f"## {label}\n\n{protocol['source']}; mode {protocol['mode']}.")
            table = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
            parts.append("\n".join("| " + " | ".join(row) + " |" for row in table))
    for entry in summary["vectors"]:
        if entry["vector"] == "masking":
            parts.append(_matrix(summary, entry))
    if summary.get("conclusions"):
        parts.append("## In words\n\n" + "\n".join(f"- {sentence}" for sentence in summary["conclusions"]))
    missing = [f"- {s['method']}, {s['protocol']}: {s['reason']}" for s in summary["skipped"]]
    missing += [f"- {method}: {message}" for method, message in summary["failures"].items()]
    if missing:
        parts.append("## Left out\n\n" + "\n".join(missing))
    if summary["confidence"]:
        parts.append(f"Brackets: {100 * summary['confidence']:g} % bootstrap interval over images.")
    return "\n\n".join(parts) + "\n"


def _matrix(summary: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    axis = summary["protocols"][entry["protocol"]]["axes"]["masking"]
    head = ["class \\ mask of", *axis]
    lines = [[name, *("-" if x is None else f"{float(x):.1f}" for x in row)] for name, row in entry["per_class"].items()]
    table = [head, ["---"] + ["---:"] * len(axis), *lines]
    title = f"### {entry['protocol']}, {entry['method']} ({entry['scale']}), %"
    return title + "\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in table)


def as_csv(summary: Mapping[str, Any]) -> str:
    """One line per number."""
    fields = ("protocol", "method", "scale", "column", "value", "low", "high", "used", "excluded", "images")
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary["results"])
    return text.getvalue()


def write(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the three files."""
    write_text(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False, default=str) + "\n")
    write_text(folder / CSV, as_csv(summary))
    write_text(folder / TABLE, markdown(summary))


def show(summary: Mapping[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for label, protocol in summary["protocols"].items():
        header, lines = rows_of_table(summary, label, bounds=False)
        if not lines:
            continue
        table = Table(title=f"{label} ({protocol['source']})", title_justify="left")
        for i, title in enumerate(header):
            table.add_column(title, justify="right" if i else "left")
        for line in lines:
            table.add_row(*line)
        # Squeezed into a narrow terminal or a log of 80 columns, rich cuts every number; a long line can still be read.
        Console(width=max(console.width, Console(width=1000).measure(table).maximum)).print(table)
    for sentence in summary.get("conclusions", []):
        print(sentence)
