"""The report's gallery: image, objects and every method's map, with the numbers that the page sorts by."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from explainer.evaluation.gallery import Gallery, evenly
from explainer.report.tables import Results, reference_method, title_of

#: Black, violet, red, orange, pale yellow at equal distances: dark is 0, light is 1, also in grey print.
_ANCHORS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
#: Per-image numbers that are offered for sorting, best known first.
_METRICS = (
    "segmentation_per_class.iou",
    "segmentation.iou",
    "insertion_deletion.insertion_minus_deletion",
    "sufficiency_necessity.sufficiency",
)


def palette() -> list[int]:
    """256 colours for maps."""
    stops = np.array(_ANCHORS, dtype=float)
    position = np.linspace(0, len(stops) - 1, 256)
    colors = np.stack([np.interp(position, np.arange(len(stops)), stops[:, c]) for c in range(3)], axis=1)
    return [int(v) for v in colors.round().astype(int).reshape(-1)]


def data_url(path: Path, colored: bool = False) -> str:
    """A picture file as a data URL; ``colored``: grey levels in the colours of :func:`palette`."""
    content, kind = path.read_bytes(), "jpeg" if path.suffix == ".jpg" else "png"
    if colored:
        grey = Image.open(io.BytesIO(content)).convert("L")
        indexed = Image.frombytes("P", grey.size, grey.tobytes())
        indexed.putpalette(palette())
        buffer = io.BytesIO()
        indexed.save(buffer, "PNG", optimize=True)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def gallery(results: Results, most: int = 48) -> str:
    """The gallery as HTML; a sentence where there is none.

    Args:
        results: results of one folder.
        most: cards (pairs of image and class).
    """
    stored = Gallery.of(results.folder, results.summary)
    names: Sequence[str] = results.summary["class_names"]
    methods = [m for m in results.summary["methods"] if m in stored.methods]
    pairs = sorted({(r.index, r.class_index, r.image) for r in results.rows if r.class_index is not None})
    chosen = set(stored.indices) if stored.indices is not None else {p[0] for p in pairs}
    pictured = [
        p for p in pairs if p[0] in chosen and stored.image(p[0]).is_file() and any(stored.map(m, p[0], p[1]).is_file() for m in methods)
    ]
    shown = [pictured[i] for i in evenly(len(pictured), most)]
    if not shown:
        return '<p class="muted">No pictures were stored with these results (option gallery of the evaluation).</p>'
    metrics = _metrics(results)
    numbers = _numbers(results, metrics, {p[0] for p in shown})
    cards, values = [], []
    for card, (index, label, image) in enumerate(shown):
        figures = [_figure(stored.image(index), "image")]
        if stored.truth(index, label).is_file():
            figures.append(_figure(stored.truth(index, label), "object"))
        for number, method in enumerate(methods):
            # A row that reads the ground truth would show the object a second time.
            again = results.summary["methods"][method].get("needs_truth")
            if not again and stored.map(method, index, label).is_file():
                figures.append(_figure(stored.map(method, index, label), method, number))
        head = f"<header>{escape(names[label])}<small>{escape(image)}</small></header>"
        cards.append(f'<article class="card" data-card="{card}">{head}<div class="pictures">{"".join(figures)}</div></article>')
        values.append(
            {
                str(n): {
                    key: found
                    for key in metrics
                    if (found := numbers.get((m, key, index, label), numbers.get((m, key, index, None)))) is not None
                }
                for n, m in enumerate(methods)
            }
        )
    data = {"metrics": {k: {"title": v["title"], "up": v["up"]} for k, v in metrics.items()}, "cards": values}
    # "<" must not appear inside a script element, or a class name could close it.
    embedded = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<p class="muted">{_selection(stored, int(results.summary["images"]), shown, pictured, pairs)}</p>'
        f'<div class="gallery">{_controls(metrics, methods, reference_method(results))}<div class="cards">{"".join(cards)}</div>'
        f'<script type="application/json">{embedded}</script></div>'
    )


def _selection(stored: Gallery, images_of_run: int, shown: Sequence[Any], pictured: Sequence[Any], pairs: Sequence[Any]) -> str:
    """What best, worst and random choose from, in words."""
    images = len({p[0] for p in shown})
    evaluated = len({p[0] for p in pairs})
    text = (
        f"Best, worst and random choose among {len(shown)} pairs of image and class from {images} images; "
        f"{len(pairs)} pairs from {evaluated} images were evaluated. "
    )
    if stored.indices is None:
        return text + "The images are the first of the split."
    text += (
        f"Pictures were kept of {len(stored.indices)} images, evenly spread over the {'' if stored.reach == images_of_run else 'first '}"
    )
    text += f"{stored.reach} (option gallery of the evaluation)"
    if len(shown) < len(pictured):
        text += f"; of their {len(pictured)} pairs the page has {len(shown)}, evenly spread"
    return text + "."


def _figure(path: Path, caption: str, method: int | None = None) -> str:
    own = "" if method is None else f' data-method="{method}"'
    number = "" if method is None else "<small></small>"
    text = escape(caption)
    label = text.replace("_", "_<wbr>")
    url = data_url(path, colored=method is not None)
    return f'<figure{own}><img src="{url}" alt="{text}"><figcaption>{label}{number}</figcaption></figure>'


def _controls(metrics: dict[str, Any], methods: Sequence[str], reference: str | None) -> str:
    if not metrics:
        return ""
    options = "".join(f'<option value="{escape(k)}">{escape(v["long"])}</option>' for k, v in metrics.items())
    chosen = "".join(f'<option value="{n}"{" selected" if m == reference else ""}>{escape(m)}</option>' for n, m in enumerate(methods))
    orders = (("best", "Best"), ("worst", "Worst"), ("random", "Random"), ("all", "All"))
    buttons = "".join(f'<button type="button" data-order="{o}">{title}</button>' for o, title in orders)
    return (
        f'<div class="controls" hidden><label>Sort by <select class="metric">{options}</select></label>'
        f'<label>of <select class="method">{chosen}</select></label>{buttons}</div>'
    )


def _metrics(results: Results) -> dict[str, dict[str, Any]]:
    """Sortable numbers by ``protocol.column``."""
    found = {}
    for label, protocol in results.summary["protocols"].items():
        for name, column in protocol["columns"].items():
            if column["higher_is_better"] is None or column["counts"] is not None or not column["shown"]:
                continue
            key = f"{protocol['name']}.{name}" if label == protocol["name"] else f"{label}.{name}"
            long = f"{column['title']} ({title_of(results.summary, label)[0]})"
            found[key] = {
                "title": column["title"],
                "long": long,
                "up": column["higher_is_better"],
                "protocol": label,
                "value": column["value"] or name,
            }
    return dict(sorted(found.items(), key=lambda entry: _METRICS.index(entry[0]) if entry[0] in _METRICS else len(_METRICS)))


def _numbers(results: Results, metrics: dict[str, dict[str, Any]], images: set[int]) -> dict[tuple[str, str, int, int | None], float]:
    """``(method, metric, image, class)`` -> value; of the raw maps where both scales were scored."""
    found: dict[tuple[str, str, int, int | None], float] = {}
    for row in sorted((r for r in results.rows if r.index in images), key=lambda r: r.scale != "raw"):
        for key, metric in metrics.items():
            if row.protocol == metric["protocol"]:
                value = row.values.get(metric["value"], math.nan)
                if math.isfinite(value):
                    found.setdefault((row.method, key, row.index, row.class_index), round(value, 5))
    return found
