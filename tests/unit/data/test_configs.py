"""The fragments under configs/data: each says where the data come from, and each loads the data set it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from explainer.data.datamodule import DataModule
from tests.factories import make_coco, make_csv, make_cub, make_image_folder, make_voc

FOLDER = Path(__file__).parents[3] / "configs" / "data"
STREET = ("sky", "building", "road", "pavement", "tree", "car", "fence", "person")
MAKERS: dict[str, Any] = {
    "voc2007": make_voc,
    "voc2012": lambda root: make_voc(root, year=2012, counts=(10, 4, 3)),
    "coco2014": make_coco,
    "cub": lambda root: make_cub(root, per_class=8),
    "street": lambda root: make_voc(root, names=STREET[:4]),
    "image_folder": lambda root: make_image_folder(root, splits=False, per_class=10),
    "csv": make_csv,
}


def test_every_fragment_is_tested() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.yaml") if p.stem in MAKERS) == sorted(MAKERS)


@pytest.mark.parametrize("stem", sorted(MAKERS))
def test_a_fragment_loads_its_data_set(stem: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{stem}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any("Layout:" in line for line in header) and len(header) >= 3
    config = yaml.safe_load(text)
    assert {"name", "batch_size", "num_workers", "options"} <= set(config)
    MAKERS[stem](tmp_path)
    config["options"] |= {"root": str(tmp_path), "size": 16}
    data = DataModule(**{**config, "num_workers": 0, "batch_size": 2})
    data.setup()
    assert len(next(iter(data.train_dataloader()))) == 2
    assert next(iter(data.test_dataloader())).targets.shape[1] == data.num_classes
