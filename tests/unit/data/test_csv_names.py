"""Class names of a CSV: any number where there are no label maps, 254 with them."""

from pathlib import Path

import pytest
from PIL import Image

from explainer.data.csv_table import CsvDataset
from explainer.errors import ConfigError, CorruptSampleError

NAMES = [f"class {i}, the {i}th" for i in range(300)]


def write(root: Path) -> None:
    (root / "masks").mkdir()
    Image.new("RGB", (8, 8)).save(root / "a.png")
    (root / "labels.csv").write_text('path,labels,split\na.png,"class 299, the 299th",train\n')


def test_more_classes_than_a_label_map_can_tell_apart(tmp_path: Path) -> None:
    write(tmp_path)
    data = CsvDataset("train", size=8, root=str(tmp_path), class_names=NAMES)
    assert data.num_classes == 300 and data[0].target.nonzero().flatten().tolist() == [299]
    with pytest.raises(ConfigError, match=r"list of 1 to 254 different names \(8-bit label maps tell 254 classes apart.*got 300"):
        CsvDataset("train", size=8, root=str(tmp_path), class_names=NAMES, mask_folder="masks")


def test_names_found_in_the_file_are_limited_alike(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "labels.csv").write_text("path,labels,split\n" + "".join(f'a.png,"{n}",train\n' for n in NAMES))
    assert CsvDataset("train", size=8, root=str(tmp_path)).num_classes == 300
    with pytest.raises(ConfigError, match="got 300"):
        CsvDataset("train", size=8, root=str(tmp_path), mask_folder="masks")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a.png,"cat\na.png,dog",train\n', "row 1 has a line break in a cell"),
        ('a.png,dog,train\na.png,"cat,train\na.png,dog,train\n', "not a CSV file"),
    ],
)
def test_a_quote_that_is_not_closed_swallows_no_rows(text: str, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(CorruptSampleError, match=message):
        CsvDataset("train", size=8, root=str(tmp_path))
