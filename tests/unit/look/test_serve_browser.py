"""The local page in a real browser. Run with: pytest -m browser (needs chromium).

Screenshots are written to the folder named by SCREENSHOTS, or to the test's own temporary folder. With SERVE_MODEL and SERVE_CLASSIFIER
(checkpoints) and SERVE_IMAGE the screenshots show these; the assertions are about the tiny network in any case.
"""

from __future__ import annotations

import base64
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explainer.commands.parsing import command_parser
from explainer.commands.serve import COMMAND, make_server
from explainer.look.server import Server
from tests.browser import Page, screenshots
from tests.unit.look.conftest import encoded, photograph

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]

OWN = '[data-method="explainer"]'


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(photograph()))
    return path


def start(page: Page, server: Server, width: int = 1280) -> None:
    page.errors.clear()
    page.requests.clear()
    page.dark(False)
    page.size(width, 900)
    page.open(server.url)
    page.wait("document.body.dataset.ready === 'model'")


def upload(page: Page, photo: Path) -> None:
    page.choose_file("#file", photo)
    page.wait("document.body.dataset.ready !== 'model' && !document.querySelector('#panels .stale')")


def drawn(page: Page, state: str, method: str = "explainer") -> np.ndarray:
    """Pixels of a panel, once it shows ``class/threshold/view``."""
    page.wait(f"document.querySelector('[data-method={method}]').dataset.drawn === '{state}'")
    data = page.run(f"document.querySelector('[data-method={method}] canvas').toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")).astype(int)


def downloaded(page: Page, method: str, kind: str) -> np.ndarray:
    """The file behind a panel's link, as the browser gets it."""
    data = page.run(
        f"fetch(document.querySelector('[data-method={method}] [data-kind={kind}]').href).then(r => r.arrayBuffer())"
        ".then(b => btoa(String.fromCharCode(...new Uint8Array(b))))"
    )
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def test_upload_class_change_and_threshold(page: Page, server: Server, photo: Path) -> None:
    start(page, server)
    assert page.run("document.title") == "run" == page.run("document.querySelector('#title').textContent")
    assert page.run("document.querySelector('#result').hidden") is True
    upload(page, photo)
    first = int(page.run("document.querySelector('#classes [aria-pressed=true]').dataset.class"))
    shown = drawn(page, f"{first}/0/kept")
    assert shown.shape == (40, 48, 3) and np.abs(shown - downloaded(page, "explainer", "overlay")).max() <= 2
    names = page.run("Array.from(document.querySelectorAll('#classes b')).map(b => b.textContent)")
    assert set(names) - {"All predicted"} == {"red", "green", "a/b blue"}

    other = (first + 1) % 3
    page.point(f"[data-class='{other}']")  # hovering shows a class for the moment
    hovered = drawn(page, f"{other}/0/kept")
    assert np.abs(hovered - shown).max() > 20
    page.point("#title")
    assert np.array_equal(drawn(page, f"{first}/0/kept"), shown)
    page.click(f"[data-class='{other}']")  # clicking keeps it
    page.point("#title")
    assert np.array_equal(drawn(page, f"{other}/0/kept"), hovered)
    assert page.run("document.querySelectorAll('#classes [aria-pressed=true]').length") == 1

    page.click("[data-class='0']")
    page.click("[data-view=mask]")
    soft = drawn(page, "0/0/mask")
    assert len(np.unique(soft)) > 10 and np.abs(soft - downloaded(page, "explainer", "mask")).max() <= 2
    page.run("document.querySelector('#cut').focus()")
    for _ in range(10):
        page.key("ArrowRight")
    hard = drawn(page, "0/0.5/mask")
    assert page.run("document.querySelector('#cut-text').textContent") == "binary, from 0.50"
    assert set(np.unique(hard)) == {0, 255} and ((hard == 255) == (soft > 127)).mean() > 0.99
    assert (hard == downloaded(page, "explainer", "mask")).mean() > 0.99
    words = page.wait(f"(t => t.includes('removed') && t)(document.querySelector('{OWN} small').textContent)")
    assert words.startswith("red · area ") and "shown alone p 0." in words
    assert page.errors == [] and all(r.startswith((server.url, "data:")) for r in page.requests), page.requests


def test_comparison_is_computed_when_asked_for(page: Page, server: Server, photo: Path) -> None:
    start(page, server)
    upload(page, photo)
    assert not any("method=grad_cam" in r for r in page.requests)
    page.click("[data-class='1']")
    for method in ("grad_cam", "srd", "refined"):
        page.click(f"[data-compare={method}]")
        assert drawn(page, "1/0/kept", method).shape == (40, 48, 3)
    assert page.run("Array.from(document.querySelectorAll('#panels b')).map(b => b.textContent)") == [
        "Picture",
        "Explainer",
        "Grad-CAM",
        "SRD",
        "Refined mask",
    ]
    assert np.abs(drawn(page, "1/0/kept", "grad_cam") - downloaded(page, "grad_cam", "overlay")).max() <= 2
    page.click("[data-class='2']")
    page.wait("!document.querySelector('#panels .stale')")
    assert drawn(page, "2/0/kept", "srd").shape == (40, 48, 3)
    page.click("[data-compare=srd]")
    page.wait("!document.querySelector('[data-method=srd]')")
    assert page.errors == []


def test_errors_are_shown_and_the_last_result_stays(page: Page, server: Server, photo: Path, tmp_path: Path) -> None:
    start(page, server)
    text, big, wide = tmp_path / "notes.png", tmp_path / "big.png", tmp_path / "wide.png"
    text.write_text("no image")
    big.write_bytes(b"x" * (server.application.intake.max_bytes + 1))
    wide.write_bytes(encoded(np.zeros((101, 200, 3), np.uint8)))

    def error() -> str:
        return page.wait("(e => !e.hidden && e.textContent)(document.querySelector('#error'))")

    page.choose_file("#file", text)
    assert "The file is not a readable image" in error()
    assert page.run("document.querySelector('#result').hidden") is True
    upload(page, photo)
    assert page.run("document.querySelector('#error').hidden") is True
    page.choose_file("#file", big)
    assert error() == "The file has 0.1 MB, more than the limit of 0.1 MB."
    page.choose_file("#file", wide)
    page.wait("document.querySelector('#error').textContent.includes('200 x 101 pixels')")
    assert page.run("document.querySelector('#result').hidden") is False
    assert page.run(f"document.querySelector('{OWN}').dataset.drawn").endswith("/0/kept")
    assert page.errors == []


def test_a_dropped_picture_is_explained_and_class_names_do_not_run(page: Page, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.uploads.runtime.description, "classes", ["<img src=x onerror=alert(1)>", "</script><b>green", "blue"])
    start(page, server)
    data = base64.b64encode(encoded(photograph())).decode()
    page.run(
        f"(d => {{ const t = new DataTransfer(); t.items.add(new File([Uint8Array.from(atob('{data}'), c => c.charCodeAt(0))], 'a.png'));"
        " d.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true})); })(document.body)"
    )
    page.wait("document.body.dataset.ready !== 'model'")
    names = page.run("Array.from(document.querySelectorAll('#classes b')).map(b => b.textContent)")
    assert "<img src=x onerror=alert(1)>" in names and "</script><b>green" in names
    assert page.run("document.images.length") == 0 and page.errors == []


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits(page: Page, server: Server, photo: Path, tmp_path: Path, width: int, dark: bool) -> None:
    wanted = [os.environ.get(name) for name in ("SERVE_MODEL", "SERVE_CLASSIFIER", "SERVE_IMAGE")]
    if all(wanted):
        model, classifier, image = (str(w) for w in wanted)
        server = make_server(command_parser(COMMAND, "explainer serve").parse_args([model, "--classifier", classifier, "--port", "0"]))
        threading.Thread(target=server.run, daemon=True).start()
        photo = Path(image)
    start(page, server, width)
    page.dark(dark)
    upload(page, photo)
    for method in ("grad_cam", "srd", "refined"):
        page.click(f"[data-compare={method}]")
    page.wait("document.querySelectorAll('#panels figure').length === 5 && !document.querySelector('#panels .stale')")
    page.wait("Array.from(document.querySelectorAll('#panels figure small')).slice(1).every(s => s.textContent.includes('removed'))")
    page.point("#title")
    page.run("scrollTo(0, 0); document.activeElement.blur()")
    assert page.run("document.documentElement.scrollWidth") <= width
    outside = page.run(
        "Array.from(document.querySelectorAll('main *')).filter(e => !e.closest('#classes') && "
        "e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.tagName + '#' + e.id)"
    )
    assert outside == [] and page.errors == []
    small = page.run("Array.from(document.querySelectorAll('button')).filter(b => b.getBoundingClientRect().height < 28).length")
    assert small == 0, "too small for a finger"
    target = page.screenshot(screenshots(tmp_path) / f"serve_{width}{'_dark' if dark else ''}.png")
    assert len(Image.open(target).convert("L").resize((64, 64)).getcolors()) > 8, "the screenshot is blank"
    if all(wanted):
        server.stop()
