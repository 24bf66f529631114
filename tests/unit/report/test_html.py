"""The page: self-contained, well-formed, nothing of the user's breaks out of its place; the charts show the numbers."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.evaluation import gallery
from explainer.report import cards, svg
from explainer.report.cards import data_url, palette
from explainer.report.html import _heat, report
from explainer.report.tables import load_results
from tests.unit.report.results_folder import EVIL, EVIL_METHOD, make_results

_VOID = {"meta", "link", "img", "wbr", "line", "br"}


class Reader(HTMLParser):
    """Checks nesting; collects tags, attributes, texts."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.embedded = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.stack and self.stack[-1] == "script":
            self.embedded = self.embedded or data
        elif self.stack and self.stack[-1] != "style":
            self.texts.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("report") / "results")


@pytest.fixture(scope="module")
def page(folder):
    text = report([load_results(folder)], title=f"Report {EVIL}", bootstrap=20)
    reader = Reader()
    reader.feed(text)
    assert reader.stack == []
    return text, reader


def test_the_page_needs_no_network_and_runs_no_foreign_script(page):
    text, reader = page
    assert EVIL not in text and "<img src=x" not in text
    scripts = [attributes for tag, attributes in reader.tags if tag == "script"]
    assert scripts == [{"type": "application/json"}, {}]
    for tag, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    assert not re.search(r"https?://|url\(", text)
    assert EVIL in reader.texts and any(EVIL_METHOD in t for t in reader.texts), "names are shown as they are"
    targets = {attributes.get("id") for _, attributes in reader.tags}
    assert all(a["href"][1:] in targets for tag, a in reader.tags if tag == "a")


def test_all_parts_are_there(page, folder):
    text, reader = page
    words = " ".join(reader.texts)
    for part in (
        "At a glance",
        "Checks for cheating",
        "Insertion and deletion",
        "Class-specific masking",
        "Gallery",
        "Hardware",
        "Configuration",
    ):
        assert part in words, part
    assert text.count('class="curve"') >= 2 * 3 and 'class="heat"' in text and "badge fail" in text
    assert "it reads the ground truth, not the classifier" in words, "what was left out is told"
    data = json.loads(reader.embedded)
    assert "segmentation_per_class.iou" in data["metrics"] and len(data["cards"]) == text.count('class="card"')
    rows = {
        (r.index, r.class_index): r.values["iou"]
        for r in load_results(folder).rows
        if (r.method, r.protocol, r.scale) == ("explainer", "segmentation_per_class", "raw") and "iou" in r.values
    }
    pairs = sorted(p for p in rows if p[0] in (0, 2, 4, 5, 7, 9))
    assert [card["0"]["segmentation_per_class.iou"] for card in data["cards"]] == [pytest.approx(rows[p], abs=1e-5) for p in pairs]


def test_an_unfinished_run_without_pictures_says_so(folder):
    results = load_results(folder)
    results.summary.update(complete=False, failures={"srd": "no rule for <Conv>"})
    results.folder = folder / "elsewhere"
    text = report([results, results], bootstrap=0)
    assert "not complete" in text and "no rule for &lt;Conv&gt;" in text and "No pictures were stored" in text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "two sections share no anchor"


def test_curves_stand_where_the_numbers_are():
    text = svg.curves([0, 0.5, 1], [("a<b", [0.0, float("nan"), 1.0], 0), ("c", [1.0, 1.0, 0.0], 11)], "x", "y")
    lines = re.findall(r'data-label="([^"]+)" points="([^"]+)"', text)
    assert [label for label, _ in lines] == ["a&lt;b", "a&lt;b", "c"], "NaN breaks a line"
    (x0, y0), (x1, y1), (x2, y2) = (tuple(float(v) for v in p.split(",")) for p in lines[2][1].split())
    assert x0 < x1 < x2 and x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 == y1 < y2, "larger is higher on the page"
    assert (x0, y2) == tuple(float(v) for v in lines[0][1].split(",")), "0 at the left of a is as low as 0 at the right of c"
    assert svg.style(0) != svg.style(10) and svg.style(0)[0] == svg.style(10)[0]
    assert svg._ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0] and svg._ticks(-0.3, 0.9)[0] <= -0.3


def test_heat_cells_are_darker_for_larger_numbers():
    shade = [float(re.search(r",([\d.]+)\)", _heat(v)).group(1)) for v in (0, 50, 100, 250)]
    assert shade == [0, 0.375, 0.75, 0.75] and "background" not in _heat(float("nan"))


def test_pictures_of_the_gallery(tmp_path):
    assert gallery.shown(torch.tensor([[-1.0, 2.0]]), False).tolist() == [[0, 1]]
    assert gallery.shown(torch.tensor([[0.1, 0.5]]), True).tolist() == [[pytest.approx(0.1), 0.5]]
    assert gallery.shown(torch.zeros(1, 2), False).tolist() == [[0, 0]]
    assert gallery.picture(torch.rand(3, 300, 200)).size == (107, 160)
    values = torch.tensor([[0.0, 1.0, float("nan")]])
    path = tmp_path / "map.png"
    gallery.picture(values).save(path)
    assert np.asarray(Image.open(path)).tolist() == [[0, 255, 0]]
    colors = palette()
    light = [0.3 * r + 0.59 * g + 0.11 * b for r, g, b in zip(colors[::3], colors[1::3], colors[2::3], strict=True)]
    assert len(light) == 256 and all(a <= b + 1.5 for a, b in itertools.pairwise(light)), "larger is lighter"
    assert data_url(path, colored=True).startswith("data:image/png;base64,")


def test_pictures_are_spread_over_the_evaluated_images_and_the_page_says_so(folder, page):
    results = load_results(folder)
    stored = gallery.Gallery.of(folder, results.summary)
    assert stored.indices == (0, 2, 4, 5, 7, 9)
    images = sorted(p.name for p in (folder / "gallery" / stored.data).glob("*.jpg"))
    assert images == [f"{i:06d}.jpg" for i in stored.indices]
    maps = list((folder / "gallery" / stored.methods[EVIL_METHOD]).glob("*.png"))
    every = {(r.index, r.class_index) for r in results.rows if r.class_index is not None}
    pairs = {p for p in every if p[0] in stored.indices}
    assert len(maps) == len(pairs) == len(list((folder / "gallery" / stored.data).glob("*_truth_*.png")))
    words = " ".join(page[1].texts)
    assert f"choose among {len(pairs)} pairs of image and class from 6 images; {len(every)} pairs from 10 images were evaluated" in words
    assert "Pictures were kept of 6 images, evenly spread over the 10 (option gallery" in words
    few = cards.gallery(results, most=3)
    assert f"of their {len(pairs)} pairs the page has 3, evenly spread" in few and few.count('class="card"') == 3
    expected = [f"test/{sorted(pairs)[i][0]:06d}" for i in gallery.evenly(len(pairs), 3)]
    assert re.findall(r"<small>(test/\d+)</small>", few) == expected and expected[-1] > "test/000005"


def test_spread():
    assert gallery.evenly(500, 24)[:3] == [10, 31, 52] and gallery.evenly(500, 24)[-1] == 489
    assert gallery.evenly(3, 24) == [0, 1, 2] and gallery.evenly(5, 0) == []


def test_pictures_of_an_older_version_are_still_found(folder):
    results = load_results(folder)
    stored = gallery.Gallery.of(folder, results.summary)
    del results.summary["gallery"]
    old = gallery.Gallery.of(folder, results.summary)
    assert old.image(3) == folder / "gallery" / "000003.jpg" and old.indices is None
    old.image(2).write_bytes(stored.image(2).read_bytes())
    k = next(r.class_index for r in results.rows if r.index == 2 and r.class_index is not None)
    old.map("edges", 2, k).parent.mkdir()
    old.map("edges", 2, k).write_bytes(stored.map("edges", 2, k).read_bytes())
    text = cards.gallery(results)
    assert text.count('class="card"') == 1 and "the first of the split" in text
    old.image(2).unlink()
