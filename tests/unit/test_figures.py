"""Sheets that can be read: maps made ready for the eye, titles that keep apart."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.figures import _fitted, mask_sheet, panel_sheet, visible


def test_a_few_large_values_do_not_hide_the_rest() -> None:
    values = torch.zeros(100, 100)
    values[30:60, 30:60] = 1
    values[70:90, 70:90] = -1
    values[5, 5] = 1000
    shown = visible(values, (100, 100))
    assert shown.min() >= -1 and shown.max() <= 1
    assert shown[35:55, 35:55].min() > 0.9 and shown[75:85, 75:85].max() < -0.9 and float(shown[65, 10]) == 0
    assert torch.equal(visible(torch.zeros(8, 8), (8, 8)), torch.zeros(8, 8))


def test_a_coarse_map_is_shown_at_the_size_of_the_picture() -> None:
    values = torch.zeros(7, 7)
    values[1, 5] = 1e-6
    shown = visible(values, (56, 112))
    assert shown.shape == (56, 112) and float(shown[12, 88]) == pytest.approx(1) and float(shown[40, 20]) == 0


def test_titles_keep_to_their_panel(tmp_path: Path) -> None:
    assert _fitted("channel 3: no slope") == "channel 3: no slope"
    lines = _fitted("a very long name of a class that nobody would have chosen: attribution").split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 28 and lines[1].endswith("...")
    panels = [(f"${i}$ and {i} dollars", np.full((224, 224, 3), 40 * i, np.uint8)) for i in range(5)]
    panel_sheet(panels, tmp_path / "sheet.png", columns=4)
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width > 4 * 224 and height > 2 * 224, "no panel is made smaller than its picture"


def test_a_name_that_the_font_lacks_is_no_warning_for_each_letter(tmp_path: Path) -> None:
    images, masks, targets = torch.rand(1, 3, 8, 8), torch.rand(1, 1, 8, 8), torch.ones(1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask_sheet(images, masks, targets, ["\u732b"], tmp_path / "sheet.png", titles=["\u65e5\u672c.jpg"])
    assert (tmp_path / "sheet.png").is_file()
