"""Values in an annotation that are none; mutations of every kind of file are in ``tests/integration/test_fuzz.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.factories import dataset_options
from tests.integration.fuzz_data import serve


def test_every_element_of_a_voc_annotation_can_be_nonsense(tmp_path: Path) -> None:
    root = tmp_path / "data"
    options = dataset_options("voc", root)
    path = root / "VOCdevkit" / "VOC2007" / "Annotations" / "000001.xml"
    original = path.read_text()
    changes: list[Callable[[str], str]] = [
        lambda t, v=v: t.replace("<xmin>", f"<xmin>{v}") for v in ("nan", "inf", "1e400", "-9", "9" * 400)
    ]
    changes += [lambda t, v=v: t.replace("<difficult>0", f"<difficult>{v}") for v in ("", "x", "1e400")]
    changes += [lambda t: t.replace("object>", "thing>"), lambda t: "", lambda t: "<a/>"]
    outcomes = []
    for change in changes:
        path.write_text(change(original))
        outcomes.append(serve("voc", options))
    # a box that is no box, or no XML at all; marks other than 1 are not difficult, and an image may have no object
    assert outcomes == ["partly"] * 5 + ["served"] * 4 + ["partly", "served"], outcomes
