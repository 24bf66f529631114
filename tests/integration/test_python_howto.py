"""The blocks of docs/howto/python.md, run one after another as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def test_blocks_run_with_the_users_own_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/howto/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 4 and all(len([line for line in block.splitlines() if line.strip()]) <= 13 for block in blocks)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "python.md, 1", "exec"), names)
    start = {k: v.clone() for k, v in names["task"].classifier.state_dict().items()}
    exec(compile(blocks[1], "python.md, 2", "exec"), names)
    assert all(torch.equal(v, start[k]) for k, v in names["classifier"].classifier.state_dict().items()), "the classifier stays frozen"
    exec(compile(blocks[2], "python.md, 3", "exec"), names)
    exec(compile(blocks[3], "python.md, 4", "exec"), names)
    assert float(names["table"]["iou"]) == pytest.approx(float(names["each"].mean()))
    assert set(names["table"]) == {"iou", "iou_30", "pointing"}
    K = names["data"].num_classes
    batch = names["batch"]
    assert names["masks"].shape == (len(batch), K, 32, 32) and names["masks"].min() >= 0 and names["masks"].max() <= 1
    assert names["maps"].shape == (len(batch), 32, 32) and {"test/loss", "test/iou", "test/kept"} <= set(names["scores"])
    # The loss that Lightning reports is the one of the same images, computed here once more.
    with torch.no_grad():
        alone = [names["explaining"]._explanation(b, "test").target_mask.mean((1, 2)) for b in names["data"].test_dataloader()]
    assert names["scores"]["test/area"] == pytest.approx(float(torch.cat(alone).mean()), rel=1e-3)
