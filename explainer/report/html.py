"""The report: one HTML file that needs no network, made from results folders."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from explainer.evaluation.results import decode
from explainer.report.cards import gallery
from explainer.report.page import page
from explainer.report.svg import curves, swatch
from explainer.report.tables import (
    Cell,
    Results,
    Table,
    difference_table,
    label_of,
    names_of,
    protocol_table,
    reference_method,
    title_of,
    verdict_table,
)

_BADGES = {"pass": "pass", "FAIL": "fail", "undecided": "open", "better": "better", "worse": "worse"}
#: Title and horizontal axis of curves; others go by their name, over the share of the pixels.
_VECTORS = {
    "insertion": ("Insertion: score as the highest pixels appear", "share of the pixels"),
    "deletion": ("Deletion: score as the highest pixels vanish", "share of the pixels"),
    "negative": ("Negative: accuracy as the lowest pixels vanish", "share of the pixels"),
    "positive": ("Positive: accuracy as the highest pixels vanish", "share of the pixels"),
    "spearman": ("Rank correlation with the original map", "share of the layers below the head that are random"),
    "ssim": ("Structural similarity to the original map", "share of the layers below the head that are random"),
}
_SIGNS = {True: " ↑", False: " ↓", None: ""}


def report(results: Sequence[Results], title: str = "Evaluation report", bootstrap: int = 1000) -> str:
    """The whole file.

    Args:
        results: one section each.
        title: title of the page.
        bootstrap: resamples behind the intervals of differences.
    """
    sections, links = [], []
    for number, (name, r) in enumerate(zip(names_of(results), results, strict=True)):
        body, contents = section(r, f"r{number}-", bootstrap, name if len(results) > 1 else "")
        sections.append(body)
        links += contents
    menu = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in links)
    intro = (
        '<p class="muted">Small print under a number is its interval over images. ↑ higher is better, ↓ lower is better; the best value '
        "of a column is coloured. A heading sorts its table.</p>"
    )
    return page(title, f"<h1>{escape(title)}</h1>{intro}<nav>{menu}</nav>{''.join(sections)}")


def section(results: Results, prefix: str, bootstrap: int, heading: str = "") -> tuple[str, list[tuple[str, str]]]:
    """``(HTML, [(anchor, text)])`` of one results folder; anchors start with ``prefix``, headings with ``heading``."""
    summary, parts, links = results.summary, [], []
    reference = reference_method(results)
    where = f"{heading}: " if heading else ""

    def start(key: str, text: str, level: str = "h2") -> None:
        links.append((prefix + key, where + text))
        parts.append(f'<{level} id="{prefix}{key}">{escape(where + text)}</{level}>')

    start("overview", "At a glance")
    parts.append(_overview(results))
    checks = verdict_table(results)
    if checks is not None:
        start("checks", "Checks for cheating")
        parts.append(f"<p>{escape(checks.caption)}</p>{table(checks)}{_findings(summary['verdicts'])}")
    for number, protocol in enumerate(summary["protocols"]):
        numbers = protocol_table(results, protocol)
        if not numbers.lines:
            continue
        start(f"p{number}", numbers.title)
        parts.append(f'<p class="muted">{escape(numbers.caption)}</p>{table(numbers)}')
        differences = difference_table(results, protocol, reference, bootstrap) if reference is not None else None
        if differences is not None and differences.lines:
            parts.append(
                f"<details><summary>Differences to {escape(str(reference))}, image by image</summary>"
                f'<p class="muted">{escape(differences.caption)}</p>{table(differences)}</details>'
            )
        parts.append(_charts(summary, protocol) + _heat_maps(summary, protocol, reference))
    start("gallery", "Gallery")
    parts.append('<p class="muted">Each card is one class of one image. Light is important, dark is not.</p>' + gallery(results))
    start("provenance", "Where these numbers come from")
    parts.append(_provenance(summary))
    return f"<section>{''.join(parts)}</section>", links


def table(content: Table) -> str:
    """A sortable table in a box of its own that scrolls sideways on a narrow screen."""
    head = [
        f'<th scope="col"><button type="button" data-column="{i}">{escape(text)}{_SIGNS[direction]}</button></th>'
        for i, (text, direction) in enumerate(zip([content.first, *content.header], [None, *content.directions], strict=True))
    ]
    lines = [f'<tr><th scope="row">{_breakable(label)}</th>{"".join(_cell(c) for c in cells)}</tr>' for label, cells in content.lines]
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(head)}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _breakable(text: str) -> str:
    """Escaped, with line breaks allowed after underscores."""
    return escape(text).replace("_", "_<wbr>")


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td class="muted">-</td>'
    value = f' data-value="{cell.value!r}"' if math.isfinite(cell.value) else ""
    small = " ".join(p for p in (cell.interval, cell.note) if p)
    badge = f'<span class="badge {_BADGES[cell.verdict]}">{cell.verdict.lower()}</span> ' if cell.verdict else ""
    tail = f"<small>{escape(small)}</small>" if small else ""
    number = "" if badge and math.isnan(cell.value) else cell.number
    return f"<td{value}{' class=best' if cell.best else ''}>{badge}{number}{tail}</td>"


def _overview(results: Results) -> str:
    summary = results.summary
    provenance = summary.get("provenance", {})
    seconds = provenance.get("seconds")
    facts = [
        (str(summary["images"]), f"images of {results.name}, {summary['split']} split"),
        (str(len(summary["methods"])), "methods"),
        (
            str(len(summary["class_names"])),
            "classes: " + ", ".join(summary["class_names"][:12]) + (" …" if len(summary["class_names"]) > 12 else ""),
        ),
        (f"{100 * summary['confidence']:g} %" if summary.get("confidence") else "none", "intervals"),
    ]
    if seconds is not None:
        facts.append((f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s", "time of the last run"))
    parts = ['<ul class="facts">' + "".join(f"<li><b>{escape(b)}</b>{escape(t)}</li>" for b, t in facts) + "</ul>"]
    if not summary["complete"]:
        parts.append('<p class="warn">The evaluation is not complete: run the same command again to go on.</p>')
    left_out = [f"{m} could not be evaluated: {text}" for m, text in summary["failures"].items()]
    parts += [f'<p class="warn">{escape(text)}</p>' for text in left_out]
    quiet = [f"{s['method']}, {title_of(summary, s['protocol'])[0]}: {s['reason']}" for s in summary["skipped"]] + list(summary["notices"])
    if quiet:
        items = "".join(f"<li>{escape(text)}</li>" for text in quiet)
        parts.append(f"<details><summary>Left out and notices ({len(quiet)})</summary><ul>{items}</ul></details>")
    return "".join(parts)


def _findings(verdicts: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for check in dict.fromkeys(v["check"] for v in verdicts):
        own = [v for v in verdicts if v["check"] == check]
        failed = sum(v["passed"] is False for v in own)
        lines = []
        for v in own:
            word, kind = {True: ("pass", "pass"), False: ("fail", "fail"), None: ("undecided", "open")}[v["passed"]]
            who = escape(label_of(v["method"], v["scale"]))
            lines.append(f'<li><span class="badge {kind}">{word}</span> <b>{who}</b>: {escape(v["sentence"])}</li>')
        count = f"{failed} of {len(own)} fail" if failed else f"{len(own)} looked at"
        head = f"{check[:1].upper()}{check[1:]} ({count})"
        parts.append(f'<details><summary>{escape(head)}</summary><ul class="checks">{"".join(lines)}</ul></details>')
    return "".join(parts)


def _charts(summary: Mapping[str, Any], protocol: str) -> str:
    """Every vector of the protocol whose axis is made of numbers."""
    axes = summary["protocols"][protocol]["axes"]
    methods = list(summary["methods"])
    charts: dict[str, list[tuple[str, list[float], int]]] = {}
    for entry in summary["vectors"]:
        axis = axes.get(entry["vector"])
        if (
            entry["protocol"] != protocol
            or not axis
            or not all(isinstance(x, (int, float)) for x in axis)
            or len(axis) != len(entry["mean"])
        ):
            continue
        number = methods.index(entry["method"]) if entry["method"] in methods else len(methods)
        label = label_of(entry["method"], entry["scale"])
        charts.setdefault(entry["vector"], []).append((label, [decode(v) for v in entry["mean"]], number))
    if not charts:
        return ""
    figures = []
    for vector, lines in charts.items():
        title, across = _VECTORS.get(vector, (vector.replace("_", " ").capitalize(), "share of the pixels"))
        figures.append(f"<figure><figcaption><b>{escape(title)}</b></figcaption>{curves(axes[vector], lines, across, title)}</figure>")
    known = {label: number for lines in charts.values() for label, _, number in lines}
    legend = "".join(
        f'<button type="button" aria-pressed="false" data-label="{escape(label)}">{swatch(number)}{escape(label)}</button>'
        for label, number in known.items()
    )
    return f'<div class="plots"><div class="charts">{"".join(figures)}</div><div class="legend">{legend}</div></div>'


def _heat_maps(summary: Mapping[str, Any], protocol: str, reference: str | None) -> str:
    """Class x class matrices: every vector whose axis is made of names."""
    axes = summary["protocols"][protocol]["axes"]
    grids = []
    for entry in summary["vectors"]:
        axis = axes.get(entry["vector"])
        if entry["protocol"] != protocol or not axis or not all(isinstance(x, str) for x in axis) or not entry["per_class"]:
            continue
        head = "".join(f'<th scope="col">{escape(x)}</th>' for x in axis)
        lines = []
        for name, values in entry["per_class"].items():
            cells = "".join(_heat(decode(v)) for v in values)
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
        label = escape(label_of(entry["method"], entry["scale"]))
        opened = " open" if entry["method"] == reference and entry["scale"] == "raw" else ""
        grids.append(
            f"<details{opened}><summary>Score of each class under each mask: {label}</summary>"
            f'<div class="scroll"><table class="heat"><thead><tr><th scope="col">class \\ mask of</th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div></details>"
        )
    return f'<div class="heats">{"".join(grids)}</div>' if grids else ""


def _heat(value: float) -> str:
    if not math.isfinite(value):
        return '<td class="muted">-</td>'
    return f'<td style="background:rgba(var(--heat),{min(max(value, 0), 100) / 100 * 0.75:.3f})">{value:.1f}</td>'


def _provenance(summary: Mapping[str, Any]) -> str:
    provenance = summary.get("provenance", {})
    parts = []
    for key, title, opened in (
        ("hardware", "Hardware", True),
        ("versions", "Versions", True),
        ("fingerprints", "Fingerprints of classifier, data and methods", False),
        ("config", "Configuration", False),
    ):
        content = provenance.get(key)
        if not content:
            continue
        if opened:
            text = "; ".join(f"{k} {v}" for k, v in content.items() if v is not None)
            parts.append(f"<p><b>{title}</b>: {escape(text)}</p>")
        else:
            text = json.dumps(content, indent=2, ensure_ascii=False)
            parts.append(f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>")
    if provenance.get("finished"):
        parts.insert(0, f"<p><b>Finished</b>: {escape(str(provenance['finished']))}</p>")
    return "".join(parts) or '<p class="muted">Nothing was recorded.</p>'
