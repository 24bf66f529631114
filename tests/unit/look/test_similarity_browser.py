"""The similarity page in a real browser: what is bright when a patch is pointed at. Run with: pytest -m browser (needs chromium)."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explainer.look.similarity import Options, write_overlay
from explainer.models.explanandum import Explanandum
from tests.browser import Page, screenshots
from tests.unit.look.quadrants import QUADRANTS, Colors, quadrants

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for n in range(2):
        Image.fromarray(quadrants(shift=n)).save(tmp_path / f"{n}.png")
    model = Explanandum(Colors(), 3, mean=0.0, std=1.0)
    return write_overlay([tmp_path], model, tmp_path / "o.html", Options(["features.0", "act"], side=8, grid=2))


def selector(layer: str, image: int) -> str:
    return f'canvas[data-layer="{layer}"][data-image="{image}"]'


def brightness(page: Page, layer: str, image: int) -> np.ndarray:
    """Share of its light that each quadrant keeps, ``[4]``; nan for the black one. Measured in its middle, away from the outline."""
    data = page.run(f"document.querySelector('{selector(layer, image)}').toDataURL()")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")).astype(float)
    assert pixels.shape == (256, 256, 3)
    middles = np.array([pixels[64 + 128 * (k // 2), 64 + 128 * (k % 2)].max() for k in range(4)])
    full = np.array([max(QUADRANTS[(k + image) % 4]) for k in range(4)], dtype=float)
    return np.divide(middles, full, out=np.full(4, np.nan), where=full > 0)


def shown(*similarities: float) -> list[float]:
    """Light that is left at these similarities."""
    return [1 - 0.88 * (1 - s) for s in similarities]


def test_pointing_at_a_patch_lights_what_is_similar(page: Page, file: Path) -> None:
    half = 0.5**0.5
    page.dark(False)
    page.size(1280, 900)
    page.open(file.as_uri())
    page.wait("document.body.dataset.drawn")
    page.point(selector("features.0", 0), 0.25, 0.25)  # red
    page.wait("document.body.dataset.drawn.startsWith('0/0/0/')")
    for layer in ("features.0", "act"):  # the same place in every layer, and in every image
        assert brightness(page, layer, 0)[:3] == pytest.approx(shown(1, 0, half), abs=0.02)
        assert brightness(page, layer, 1)[[0, 1, 3]] == pytest.approx(shown(0, half, 1), abs=0.02)
    assert page.run(f"document.querySelector('{selector('act', 0)}').dataset.best") == "0.7071", "the patch itself does not count"
    assert page.run(f"document.querySelector('{selector('act', 1)}').dataset.best") == "1.0000"

    page.point(selector("act", 1), 0.75, 0.25)  # yellow, in the other image and layer
    page.wait("document.body.dataset.drawn.startsWith('1/0/1/')")
    assert brightness(page, "features.0", 0)[:3] == pytest.approx(shown(half, half, 1), abs=0.02)

    page.run("(e => { e.value = 50; e.dispatchEvent(new Event('input')); })(document.querySelector('#low'))")
    page.wait("document.body.dataset.drawn.endsWith('/0.5')")
    assert brightness(page, "features.0", 0)[:3] == pytest.approx(shown((half - 0.5) / 0.5, (half - 0.5) / 0.5, 1), abs=0.02)
    assert page.errors == [] and all(r.startswith(("file:", "data:")) for r in page.requests), page.requests


def test_a_click_keeps_the_patch_and_arrows_move_it(page: Page, file: Path) -> None:
    page.size(1280, 900)
    page.open(file.as_uri())
    page.wait("document.body.dataset.drawn")
    page.click(selector("act", 0), 0.25, 0.25)
    page.wait("document.body.dataset.drawn.startsWith('0/0/0/') && document.querySelector('#where').textContent.includes('kept')")
    page.point(selector("act", 0), 0.75, 0.75)
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.run("document.body.dataset.drawn").startswith("0/0/0/"), "a kept patch does not follow the pointer"
    page.key("ArrowRight")
    page.wait("document.body.dataset.drawn.startsWith('0/0/1/')")
    assert brightness(page, "act", 0)[:3] == pytest.approx(shown(0, 1, 0.5**0.5), abs=0.02)
    page.click(selector("act", 0), 0.75, 0.75)
    page.point(selector("act", 0), 0.25, 0.75)
    page.wait("document.body.dataset.drawn.startsWith('0/1/0/')")
    assert page.errors == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits(page: Page, file: Path, tmp_path: Path, width: int) -> None:
    page.size(width, 900)
    page.open(file.as_uri())
    page.wait("document.body.dataset.drawn")
    assert page.run("document.documentElement.scrollWidth") <= width and page.errors == []
    page.screenshot(screenshots(tmp_path) / f"overlay_{width}.png")


def test_components_neighbours_and_charts(page: Page, tmp_path: Path) -> None:
    for n in range(3):
        Image.fromarray(quadrants(shift=n)).save(tmp_path / f"{n}.png")
    model = Explanandum(Colors(), 3, mean=0.0, std=1.0)
    options = Options(["act"], side=8, grid=2, limit=1, components=2, data=tmp_path, neighbors=2)
    page.size(1280, 900)
    page.open(write_overlay([tmp_path], model, tmp_path / "o.html", options).as_uri())
    page.wait("document.body.dataset.drawn")
    page.point(selector("act", 0), 0.25, 0.25)  # red
    page.wait("document.body.dataset.drawn.startsWith('0/0/0/')")
    assert page.run("[...document.querySelectorAll('.near canvas')].map(c => c.dataset.found.split('/')[2]).join()") == "1000,1000"
    before = brightness(page, "act", 0)
    page.run("(e => { e.checked = true; e.dispatchEvent(new Event('change')); })(document.querySelector('#parts'))")
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert not np.allclose(before[:3], brightness(page, "act", 0)[:3], atol=0.02)
    shares = page.run("[...document.querySelectorAll('.legend span')].map(s => s.textContent).join()")
    assert shares.startswith("1: ") and ",2: " in shares
    page.open(write_overlay([tmp_path / "0.png"], model, tmp_path / "r.html", Options(["act"], side=8, grid=2, rotate=90)).as_uri())
    page.wait("document.body.dataset.drawn")
    page.point(selector("act", 1), 0.25, 0.25)
    page.wait("document.body.dataset.drawn.startsWith('1/0/0/')")
    assert page.run("document.querySelector('.plot').dataset.values") == "1.00 1.00 1.00 1.00"
    assert page.errors == []
