"""The progress bar where nobody watches: lines in a log."""

import threading
import time

import pytest

from explainer.evaluation import progress
from explainer.evaluation.progress import Progress


@pytest.fixture(autouse=True)
def always_time_for_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", -1.0)


def test_a_known_total(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(4) as shown:
        assert shown.remaining() == float("inf")
        shown.advance(3)
    assert capsys.readouterr().err.startswith("evaluate: 3 of 4 done, ")


def test_a_total_that_is_said_on_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, what="explaining") as shown:
        assert shown.remaining() == float("inf")
        shown.reach(2, 8)
        shown.reach(6, 8)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("explaining: 2 of 8 done, ") and second.startswith("explaining: 6 of 8 done, ")


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None, enabled=False) as shown:
        shown.reach(1, 2)
    assert capsys.readouterr().err == ""


def test_a_unit_that_lasts_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """RISE on a batch of 50 images printed nothing for half an hour."""
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 60.0)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_SIGNS", 0.05)
    with Progress(210) as p:
        p.show("srd")
        p.advance(13)
        p.show("rise")
        deadline = time.monotonic() + 10
        while "at rise for" not in (printed := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "evaluate: 13 of 210 done" in printed and "at rise for" in printed
    assert not [t for t in threading.enumerate() if t.name == "progress"]
    with Progress(0), Progress(3, enabled=False):
        assert not [t for t in threading.enumerate() if t.name == "progress"], "nothing to say"
