"""``explainer maps --share I --shares N``: jobs that do not know of each other fill one cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from explainer.cli import main
from explainer.models.classifiers import SmallVGG

DATA = ["--data.name", "shapes", "--data.options", "{size: 32, length: 10}", "--split", "val", "--batch_size", "2", "--device", "cpu"]


def maps_in(folder: Path) -> list[tuple[tuple[str, int], bytes]]:
    """Image, class and stored values of every map."""
    found = []
    for path in sorted(folder.rglob("shard-*.npz")):
        with np.load(path) as shard:
            pairs = zip(shard["ids"].tolist(), shard["classes"].tolist(), strict=True)
            found += [(pair, shard["maps"][i].tobytes()) for i, pair in enumerate(pairs)]
    return sorted(found)


def test_shares_are_the_whole_and_none_is_computed_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    torch.save(SmallVGG(6, (4,)).state_dict(), tmp_path / "classifier.pt")
    arguments = ["maps", "--method.name", "gradient", *DATA, "--classifier.checkpoint", str(tmp_path / "classifier.pt")]
    arguments += ["--classifier.arch", "small_vgg", "--classifier.options", "{widths: [4]}"]
    assert main([*arguments, "--cache.folder", str(tmp_path / "whole")]) == 0
    for share in ("2", "0", "1"):
        assert main([*arguments, "--cache.folder", str(tmp_path / "parts"), "--share", share, "--shares", "3"]) == 0
    whole, parts = maps_in(tmp_path / "whole"), maps_in(tmp_path / "parts")
    assert len(whole) >= 10 and parts == whole
    assert len({p.parent for p in (tmp_path / "parts").rglob("*.npz")}) == 1, "one cache"
    assert main([*arguments, "--cache.folder", str(tmp_path / "parts"), "--share", "3", "--shares", "3"]) == 2
    assert "share must lie in 0..shares-1, received share 3 of 3 shares" in capsys.readouterr().err
