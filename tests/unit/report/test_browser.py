"""The report in a real browser, at the width of a phone and of a desktop. Run with: pytest -m browser (needs chromium).

Screenshots are written to the folder named by SCREENSHOTS, or to the test's own temporary folder; REPORT names a report that they show
instead of the test's own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from html import unescape
from pathlib import Path

import pytest
from PIL import Image

from explainer.report.write import write
from tests.browser import FLAGS, program, screenshots
from tests.unit.report.results_folder import make_results

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]

# Before anything else: remember errors. After everything: try the controls, open all details, and leave what was found in the page.
FIRST = """<script>
window.found = {errors: []};
window.onerror = function (message) { found.errors.push(String(message)); };
document.addEventListener('securitypolicyviolation', function (e) { found.errors.push('blocked ' + e.blockedURI); });
</script>"""
LAST = """<script>
function values(table, column) {
  return Array.from(table.tBodies[0].rows).map(function (r) { return Number(r.cells[column].dataset.value); });
}
var root = document.documentElement, table = document.querySelectorAll('table.sortable')[1];
found.title = document.title;
found.before = root.scrollWidth;
table.querySelectorAll('thead button')[2].click();
found.down = values(table, 2);
table.querySelectorAll('thead button')[2].click();
found.up = values(table, 2);
var gallery = document.querySelector('.gallery'), data = JSON.parse(gallery.querySelector('script').textContent);
function visible() {
  return Array.from(gallery.querySelectorAll('.card')).filter(function (c) { return !c.hidden; }).map(function (c) {
    return data.cards[Number(c.dataset.card)][gallery.querySelector('.method').value][gallery.querySelector('.metric').value]; });
}
found.best = visible();
gallery.querySelector('[data-order=worst]').click();
found.worst = visible();
gallery.querySelector('[data-order=all]').click();
found.all = visible().length;
var legend = document.querySelector('.legend button');
legend.click();
found.highlighted = document.querySelectorAll('.plots.chosen .curve.on').length;
legend.click();
gallery.querySelector('[data-order=best]').click();
document.querySelectorAll('details').forEach(function (d) { d.open = true; });
found.width = root.scrollWidth;
found.inner = root.clientWidth;
found.wide = Array.from(document.querySelectorAll('main *')).filter(function (e) {
  return !e.closest('.scroll') && e.getBoundingClientRect().right > root.clientWidth + 0.5;
}).map(function (e) { return e.tagName + '.' + e.className; });
found.images = Array.from(document.images).filter(function (i) { return !i.closest('[hidden]') && !(i.complete && i.naturalWidth);
}).length;
document.querySelectorAll('details').forEach(function (d, i) { d.open = i < 2; });
parent.postMessage(JSON.stringify(found), '*');
</script>"""
# A browser window cannot be narrower than 500 px, a frame can; its page sees the frame's width as the screen's.
FRAME = """<!doctype html><style>body{{margin:0}} iframe{{border:0;display:block}}</style><pre id="found" hidden></pre>
<script>onmessage = function (e) {{ document.getElementById('found').textContent = e.data; }};</script>
<iframe src="{source}" width="{width}" height="{height}"></iframe>"""


def chromium(url: str, profile: Path, *options: str) -> str:
    command = [program(), *FLAGS, f"--user-data-dir={profile}", *options, url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=240).stdout


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    folder = make_results(root / "results", images=10, gallery=10)
    return write([folder], root / "report.html", bootstrap=50)[0]


@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_and_works(report_file, tmp_path, width):
    text = report_file.read_text()
    probe, frame = tmp_path / "probe.html", tmp_path / "frame.html"
    probe.write_text(text.replace("<head>", f"<head>{FIRST}", 1).replace("</body>", f"{LAST}</body>", 1))
    frame.write_text(FRAME.format(source=probe.as_uri(), width=width, height=900))
    dom = chromium(frame.as_uri(), tmp_path / "profile", "--window-size=1280,900", "--virtual-time-budget=10000", "--dump-dom")
    found = json.loads(unescape(re.search(r'<pre id="found"[^>]*>(.*?)</pre>', dom, re.DOTALL).group(1)))
    assert found["errors"] == []
    assert found["title"] == "Evaluation report", "a class name must not run as a script"
    assert found["inner"] == width
    assert found["before"] <= width and found["width"] <= width and found["wide"] == [], found["wide"][:5]
    assert found["images"] == 0, "a picture could not be decoded"
    assert found["down"] == sorted(found["down"], reverse=True) != found["up"] == sorted(found["up"])
    assert found["best"] == sorted(found["best"], reverse=True) and found["worst"] == sorted(found["worst"])
    assert len(found["best"]) == 6 < found["all"] and found["best"][0] > found["worst"][0]
    assert found["highlighted"] == 2, "insertion and deletion of one method"
    target = screenshots(tmp_path) / f"report_{width}.png"
    shown = Path(os.environ.get("REPORT", report_file)).absolute()
    frame.write_text(FRAME.format(source=shown.as_uri(), width=width, height=2400))
    chromium(frame.as_uri(), tmp_path / "profile2", "--window-size=1280,2400", f"--screenshot={target}")
    picture = Image.open(target).crop((0, 0, width, 2400))
    picture.save(target)
    picture = picture.convert("L")
    assert len(picture.resize((64, 64)).getcolors()) > 8, "the screenshot is blank"
