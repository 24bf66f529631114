"""The page of ``explainer concepts``: combination against single filter, filters needed, sharing, concept vectors, pictures."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from explainer.concepts.statistics import mean_and_error, spearman
from explainer.errors import ConfigError
from explainer.files import parse_json, write_text
from explainer.report.cards import data_url
from explainer.report.html import table
from explainer.report.page import page
from explainer.report.svg import curves, swatch
from explainer.report.tables import Cell, Table, markdown, plain

_STYLE = (
    ".strips{display:flex;flex-wrap:wrap;gap:.6rem;margin:.4rem 0 1rem}.strips figure{margin:0}"
    ".strips img{height:112px;border-radius:.3rem;display:block;max-width:100%}"
    ".strips figcaption{font-size:.78rem;color:var(--muted)}.map{max-width:40rem}.map circle{fill:var(--accent)}"
    ".map text{font-size:13px;fill:var(--ink)}"
)
Row = dict[str, Any]


def load(folder: Path) -> dict[str, Any]:
    """``concepts.json`` of a results folder.

    Raises:
        ConfigError: there is none.
    """
    path = folder / "concepts.json"
    if not path.is_file():
        raise ConfigError(f"{folder} holds no concepts.json. Write it with: explainer concepts fit --out {folder} ...")
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}). Write it anew with: explainer concepts fit --out {folder} ...") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected the results of explainer concepts fit.")
    stored: dict[str, Any] = content
    return stored


def write(folder: Path, out: Path, title: str) -> Path:
    """Write the page (.html) or the tables (.md); returns the file."""
    summary = load(folder)
    if out.suffix == ".md":
        tables = [t for layer in summary["layers"] for t in layer_tables(summary, layer)]
        write_text(out, "\n".join([f"# {plain(title)}\n", markdown(overview(summary)), *map(markdown, [*tables, spaces(summary)])]))
    else:
        write_text(out, html(summary, folder, title))
    return out


def _number(value: float | None, digits: int = 3, low: float | None = None, high: float | None = None, note: str = "") -> Cell | None:
    if value is None:
        return None
    return Cell(value, math.nan if low is None else low, math.nan if high is None else high, digits, note)


def _rows(summary: dict[str, Any], layer: str, task: str) -> list[tuple[dict[str, Any], Row]]:
    found = summary["layers"][layer].get(task, {}).get("rows", {})
    return [(summary["concepts"][int(c)], row) for c, row in found.items()]


def _pair(task: str, row: Row) -> tuple[float | None, float | None]:
    """Score of the combination and of the single filter."""
    return (row["combination"][0], row["single"][0]) if task == "segmentation" else (row["accuracy"], row["single"])


def overview(summary: dict[str, Any]) -> Table:
    """Per layer, task and category: mean over concepts with its standard error, and how often the combination wins (figure 2)."""
    lines: list[tuple[str, list[Cell | None]]] = []
    for layer in summary["layers"]:
        for task in ("segmentation", "classification"):
            rows = _rows(summary, layer, task)
            categories = sorted({fact["category"] for fact, _ in rows})
            for category in ["all", *categories] if len(categories) > 1 else categories:
                pairs = [_pair(task, row) for fact, row in rows if category in ("all", fact["category"])]
                sound = [(a, b) for a, b in pairs if a is not None and b is not None]
                if not sound:
                    continue
                means = [mean_and_error([p[side] for p in sound]) for side in (0, 1)]
                wins = 100 * sum(a >= b for a, b in sound) / len(sound)
                label = f"{layer}, {task}" + (f", {category}" if len(categories) > 1 else "")
                cells = [Cell(m, digits=3, note="" if math.isnan(e) else f"± {e:.3f}") for m, e in means]
                told = [row["pearson"][1] for fact, row in rows if category in ("all", fact["category"]) and "pearson" in row]
                agree = None if not told else Cell(100 * sum(p is not None and p < 0.01 for p in told) / len(told), digits=1)
                lines.append((label, [*cells, Cell(wins, digits=1), agree, Cell(len(sound), digits=0)]))
    return Table(
        "overview",
        "Combination against single filter",
        "Mean over concepts ± standard error on validation images: set IoU (segmentation) or accuracy on as many images with the concept "
        "as without (classification). The single filter is chosen on training images: the best by IoU, or the largest weight. The last but "
        "one column: concepts whose positive weights and the filters' own IoU correlate (Pearson, p < .01).",
        ["combination", "single filter", "combination at least as good, % of concepts", "weight and IoU agree, % of concepts", "concepts"],
        [True, True, True, None, None],
        lines,
        "layer",
    )


def layer_tables(summary: dict[str, Any], layer: str) -> list[Table]:
    """The tables of one layer."""
    found = []
    if rows := _rows(summary, layer, "segmentation"):
        found.append(_segmentation(layer, rows))
    if rows := _rows(summary, layer, "classification"):
        found.append(_classification(layer, rows))
    found += [_vectors(summary, layer, task) for task in ("segmentation", "classification") if _rows(summary, layer, task)]
    return found


def _segmentation(layer: str, rows: list[tuple[dict[str, Any], Row]]) -> Table:
    lines = []
    for fact, row in rows:
        images = row["images"]["combination"]
        hits = [v for v in images if v > 0]
        lines.append(
            (
                fact["name"] + (" (few images)" if fact["few"] else ""),
                [
                    _number(*_bounds(row["combination"])),
                    _number(*_bounds(row["single"])),
                    _number(*_bounds(row["difference"])),
                    Cell(row["filter"], digits=0),
                    _number(row.get("n95"), 0),
                    _number(row["effective"], 1),
                    _number(row["exclusivity"], 2),
                    _number(100 * (1 - len(hits) / len(images)), 0),
                    _number(mean_and_error(hits)[0] if hits else None, 2),
                    _number(row["pearson"][0], 2, note="" if row["pearson"][1] is None or row["pearson"][1] >= 0.01 else "p < .01"),
                    Cell(fact["masks_train"], digits=0),
                    Cell(fact["masks_val"], digits=0),
                    _number(100 * (fact["size"] or 0), 1),
                ],
            )
        )
    return Table(
        f"segmentation-{layer}",
        f"{layer}: segmentation",
        "IoU over the set of validation images, with intervals over images; filters needed for 95 % of the best score; effective number of "
        "filters (exponential of the weights' entropy); exclusivity: single over combination; share of images without any overlap and mean "
        "IoU of the others; correlation over filters of positive weight and IoU; images with masks; mean size in % of the image.",
        [
            "combination",
            "single filter",
            "difference",
            "filter",
            "filters for 95 %",
            "effective filters",
            "exclusivity",
            "missed, %",
            "IoU where hit",
            "weight and IoU",
            "train",
            "val",
            "size, %",
        ],
        [True, True, None, None, False, None, None, False, True, None, None, None, None],
        lines,
        "concept",
    )


def _bounds(triple: list[float | None]) -> tuple[float | None, int, float | None, float | None]:
    return triple[0], 3, triple[1], triple[2]


def _classification(layer: str, rows: list[tuple[dict[str, Any], Row]]) -> Table:
    lines = []
    for fact, row in rows:
        cells = [_number(row["accuracy"]), _number(row["single"]), _number(row["auc"]), _number(row["single_auc"])]
        cells += [Cell(row["filter"], digits=0), _number(row.get("n95"), 0), _number(row["effective"], 1)]
        cells += [Cell(fact["train"], digits=0), Cell(fact["val"], digits=0)]
        lines.append((fact["name"] + (" (few images)" if fact["few"] else ""), cells))
    return Table(
        f"classification-{layer}",
        f"{layer}: classification",
        "Accuracy at 1/2 on as many validation images with the concept as without; area under the ROC curve on all of them.",
        ["accuracy", "single filter", "AUC", "AUC of the single", "filter", "filters for 95 %", "effective filters", "train", "val"],
        [True, True, True, True, None, False, None, None, None],
        lines,
        "concept",
    )


def _vectors(summary: dict[str, Any], layer: str, task: str) -> Table:
    found = summary["layers"][layer][task]
    groups = found["clusters"]
    pure = "" if groups.get("purity") is None else f"; {groups['purity']:.0%} of the concepts belong to their cluster's commonest category"
    lines: list[tuple[str, list[Cell | None]]] = []
    for name, near in found["nearest"].items():
        cells: list[Cell | None] = [Cell(s, digits=2, note=other) for other, s in near[:5]]
        lines.append((name, [*cells, *[None] * (5 - len(cells)), Cell(groups["of"][name], digits=0)]))
    for answer in found["queries"]:
        near = [Cell(s, digits=2, note=n) for n, s in answer["answers"][:5]]
        lines.append((answer["query"], [*near, *[None] * (6 - len(near))]))
    return Table(
        f"vectors-{task}-{layer}",
        f"{layer}: nearest concepts by {task}",
        f"Cosine of the concept vectors; the most similar first. Clusters by k-means (inertia {groups['inertia']:.3g}{pure}).",
        ["1st", "2nd", "3rd", "4th", "5th", "cluster"],
        [None] * 6,
        lines,
        "concept",
    )


def spaces(summary: dict[str, Any]) -> Table:
    """How far apart the concept spaces are."""
    own = summary["spaces"]
    lines = []
    for name, row in zip(own["names"], own["distances"], strict=True):
        halves = own["halves"].get(name)
        lines.append((name, [*(_number(v, 2) for v in row), _number(halves, 2)]))
    return Table(
        "spaces",
        "How alike the concept spaces are",
        "Squared difference of all cosines between concepts: 0 where two spaces arrange the concepts alike. The last column is the "
        "distance of two fits on either half of the training images: differences below it say nothing.",
        [*own["names"], "two halves"],
        [None] * (len(own["names"]) + 1),
        lines,
        "space",
    )


# ---------------------------------------------------------------------- the page
def html(summary: dict[str, Any], folder: Path, title: str) -> str:
    """The page."""
    settings, images = summary["settings"], summary["images"]
    first = overview(summary)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{len(summary["concepts"])} concepts, {images["train"]} images to fit and {images["val"]} to score; preset '
        f"{escape(settings['preset'])}, tau {settings['tau']:g}, masks of {settings['mask_side']} px. A heading sorts its table.</p>",
        _menu(summary),
        f'<h2 id="overview">{escape(first.title)}</h2><p class="muted">{escape(first.caption)}</p>{table(first)}',
        _dropped(summary),
    ]
    for number, layer in enumerate(summary["layers"]):
        parts.append(f'<h2 id="layer{number}">{escape(layer)}</h2>' + _layer(summary, layer, folder))
    if summary["spaces"]["names"]:
        last = spaces(summary)
        parts.append(f'<h2 id="spaces">{escape(last.title)}</h2><p class="muted">{escape(last.caption)}</p>{table(last)}')
    text = escape(json.dumps(summary["provenance"], indent=1))
    parts.append(
        f'<h2 id="provenance">Where these numbers come from</h2><details><summary>All settings</summary><pre>{text}</pre></details>'
    )
    return page(title, "".join(parts), _STYLE)


def _menu(summary: dict[str, Any]) -> str:
    links = [("overview", "Overview"), *((f"layer{i}", layer) for i, layer in enumerate(summary["layers"])), ("spaces", "Spaces")]
    return "<nav>" + "".join(f'<a href="#{a}">{escape(t)}</a>' for a, t in links) + "</nav>"


def _dropped(summary: dict[str, Any]) -> str:
    if not summary["dropped"]:
        return ""
    items = "".join(f"<li>{escape(d['concept'])}, {escape(d['task'])}: {escape(d['reason'])}</li>" for d in summary["dropped"])
    return f"<details><summary>{len(summary['dropped'])} left out</summary><ul>{items}</ul></details>"


def _layer(summary: dict[str, Any], layer: str, folder: Path) -> str:
    parts = []
    for found in layer_tables(summary, layer):
        parts.append(f'<h3>{escape(found.title)}</h3><p class="muted">{escape(found.caption)}</p>{table(found)}')
    for task in ("segmentation", "classification"):
        rows = _rows(summary, layer, task)
        if rows:
            parts += [_needed(task, rows), _sharing(summary, layer, task), _failures(task, rows), _plane(summary, layer, task)]
    parts.append(_pictures(summary, layer, folder))
    return "".join(parts)


def _needed(task: str, rows: list[tuple[dict[str, Any], Row]]) -> str:
    """Score against the number of filters, by category (fig. 3)."""
    known = [(fact["category"], row["curve"]) for fact, row in rows if "curve" in row]
    if not known:
        return ""
    sizes = sorted({int(f) for _, curve in known for f in curve})
    lines = []
    for number, category in enumerate(sorted({c for c, _ in known})):
        own = [curve for c, curve in known if c == category]
        means = [mean_and_error([curve[str(f)] for curve in own if curve.get(str(f)) is not None])[0] for f in sizes]
        lines.append((category, means, number))
    chart = curves([math.log2(f) for f in sizes], lines, "number of filters (log2)", f"mean score, {task}")
    legend = "".join(f"<span>{swatch(n)}{escape(label)}</span>" for label, _, n in lines) if len(lines) > 1 else ""
    return f'<h3>How many filters {task} needs</h3><div class="charts"><figure>{chart}</figure></div><div class="legend">{legend}</div>'


def _sharing(summary: dict[str, Any], layer: str, task: str) -> str:
    found = summary["layers"][layer][task]["sharing"]
    content = Table(
        f"sharing-{task}-{layer}",
        "",
        "",
        ["filters"],
        [None],
        [(name, [Cell(n, digits=0)]) for name, n in found["bins"]],
        "concepts served",
    )
    most = ", ".join(f"filter {k}: {n}" for n, k in found["most"][:5])
    return f"<h3>Filters shared by concepts ({task})</h3><p>Single best for the most concepts: {most}.</p>{table(content)}"


def _failures(task: str, rows: list[tuple[dict[str, Any], Row]]) -> str:
    """Concepts whose single filter wins, and whether scores follow the number of images and the size."""
    count = "masks_train" if task == "segmentation" else "train"
    lost = []
    for fact, row in rows:
        combined, single = _pair(task, row)
        if combined is not None and single is not None and single > combined:
            size = f", mean size {100 * (fact['size'] or 0):.1f} %" if task == "segmentation" else ""
            lost.append(f"{fact['name']} ({fact[count]} training images{size}; {single:.3f} against {combined:.3f})")
    scores = [value if (value := _pair(task, row)[0]) is not None else math.nan for _, row in rows]
    by_number = spearman([f[count] for f, _ in rows], scores)
    by_size = spearman([f["size"] or 0.0 for f, _ in rows], scores)
    text = "The single filter wins for: " + "; ".join(lost) + "." if lost else "The combination is at least as good for every concept."
    ranks = [
        f"{v:.2f} with {what}" for v, what in ((by_number, "the number of training images"), (by_size, "mean size")) if math.isfinite(v)
    ]
    return f"<p>{escape(text)}{' Rank correlation of the scores: ' + ', '.join(ranks) + '.' if ranks else ''}</p>"


def _plane(summary: dict[str, Any], layer: str, task: str) -> str:
    """The concept vectors in two principal components."""
    placed = summary["layers"][layer][task]["plane"]
    if len(placed) < 3:
        return ""
    reach = max(abs(v) for p in placed.values() for v in p) or 1.0
    dots = []
    for name, (x, y) in placed.items():
        px, py = 300 + 240 * x / reach, 170 - 140 * y / reach
        dots.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4"/><text x="{px + 7:.1f}" y="{py + 4:.1f}">{escape(name)}</text>')
    chart = f'<svg class="map" viewBox="0 0 640 340" role="img" aria-label="Concept vectors in a plane">{"".join(dots)}</svg>'
    return f"<h3>Concept vectors by {task}, two principal components</h3>{chart}"


def _pictures(summary: dict[str, Any], layer: str, folder: Path) -> str:
    titles = {
        "ranked": "Largest masks among all validation images: image, truth, combination, single filter",
        "deciles": "From good to bad by IoU: image, truth, combination, single filter",
        "classified": "Highest scores of the classification probe",
    }
    parts = []
    for name, kinds in summary["pictures"].get(layer, {}).items():
        body = ""
        for kind, title in titles.items():
            if not kinds.get(kind):
                continue
            figures = []
            for e in kinds[kind]:
                caption = f"{e['value']:.2f}" + (f", better than {100 * e['share']:.0f} %" if "share" in e else "")
                caption += "" if e["shows"] else " (not labelled)"
                url = data_url(folder / e["file"])
                figures.append(f'<figure><img src="{url}" alt="{escape(e["id"])}"><figcaption>{escape(caption)}</figcaption></figure>')
            body += f'<p class="muted">{title}</p><div class="strips">{"".join(figures)}</div>'
        parts.append(f"<details><summary>{escape(name)}</summary>{body}</details>")
    return f"<h3>Pictures</h3>{''.join(parts)}" if parts else ""
