"""``explainer concepts`` from the command line to the page."""

import errno
import json
import os

import pytest
from safetensors.torch import load_file

from explainer.cli import main
from explainer.files import Owner
from explainer.locks import IN_USE

ARGUMENTS = [
    "concepts",
    "fit",
    "--data.name",
    "shapes",
    "--data.options",
    "{length: 40, size: 32}",
    "--classifier.options",
    "{widths: [8, 8, 8]}",
    "--layers",
    "[features.5, features.12]",
    "--mask_side",
    "16",
    "--pictures",
    "2",
    "--bootstrap",
    "50",
    "--tau",
    "0.05",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("concepts") / "found"
    words, tree = out.parent / "words.csv", out.parent / "tree.csv"
    words.write_text(",stripes,dots,rings\nstripes,1,0.5,0\ndots,0.5,1,0\nrings,0,0,1\n")
    tree.write_text("stripes,lines\nrings,lines\nlines,texture\ndots,texture\n")
    given = ["--concepts", "[stripes, dots, rings]", "--queries", "[stripes + dots]"]
    given += ["--similarities", f"{{words: '{words}'}}", "--hierarchy", str(tree)]
    assert main([*ARGUMENTS, "--out", str(out), *given]) == 0
    return out


def test_the_folder_holds_weights_numbers_and_pictures(folder):
    summary = json.loads((folder / "concepts.json").read_text())
    assert [c["name"] for c in summary["concepts"]] == ["stripes", "dots", "rings"] and list(summary["layers"]) == [
        "features.5",
        "features.12",
    ]
    vectors = load_file(str(folder / "weights.safetensors"))
    for layer, found in summary["layers"].items():
        assert tuple(vectors[f"segmentation/{layer}/weights"].shape) == (3, 8) == tuple(vectors[f"classification/{layer}/weights"].shape)
        for c, row in found["segmentation"]["rows"].items():
            value, low, high = row["combination"]
            assert low <= value <= high and row["difference"][0] == pytest.approx(value - row["single"][0])
            assert row["top"][0][1] == pytest.approx(float(vectors[f"segmentation/{layer}/weights"][int(c)][row["top"][0][0]]))
            assert set(row["curve"]) == {"1", "2", "4", "8"} and row["curve"]["8"] == pytest.approx(value)
            assert len(row["images"]["combination"]) == summary["concepts"][int(c)]["masks_val"]
        assert sum(n for _, n in found["segmentation"]["sharing"]["bins"]) == 8
        for kinds in summary["pictures"][layer].values():
            assert all((folder / e["file"]).is_file() for kind in kinds.values() for e in kind)
    spaces = summary["spaces"]
    names = spaces["names"]
    assert names[-3:] == ["labels together", "words", "hierarchy"] and all(row[i] == 0 for i, row in enumerate(spaces["distances"]))
    assert set(spaces["halves"]) == set(names[:-3])
    # words: 1/2, 0, 0; edges stripes - dots 3, stripes - rings 2, dots - rings 3; every pair stands twice in the table
    apart = 2 * ((1 / 2 - 1 / 4) ** 2 + (1 / 3) ** 2 + (1 / 4) ** 2)
    assert spaces["distances"][-2][-1] == pytest.approx(apart)
    assert spaces["by_category"]["concept"][-2][-1] == pytest.approx(apart / 3), "the mean over three concepts of one category"


def test_the_page_needs_no_network_and_shows_every_number(folder, capsys):
    assert main(["concepts", "report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert "http" not in page.replace("http-equiv", "") and page.count("data:image/jpeg") == 2 * 3 * 3 * 2
    summary = json.loads((folder / "concepts.json").read_text())
    for layer in summary["layers"].values():
        for row in layer["segmentation"]["rows"].values():
            assert f"{row['combination'][0]:.3f}" in page
    assert "hierarchy" in page and "Clusters by k-means (inertia" in page and "weight and IoU agree" in page
    assert main(["concepts", "report", str(folder), "--out", str(folder / "tables.md")]) == 0
    assert "| stripes |" in (folder / "tables.md").read_text()


def test_refusals_name_the_remedy(tmp_path, capsys):
    def refused(*arguments):
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    assert "layers is empty" in refused("concepts", "fit")
    assert "behind explainer concepts must be one of the commands (received 'fitt'). Did you mean fit?" in refused("concepts", "fitt")
    assert "holds no concepts.json" in refused("concepts", "report", str(tmp_path))
    assert "'strips', which the data does not have" in refused(*ARGUMENTS, "--concepts", "[strips]")
    assert "filters must not be chosen where they are scored" in refused(*ARGUMENTS, "--val_split", "train")
    assert "'features.99' is not a module" in refused(*ARGUMENTS[:-8], "--layers", "[features.99]")


def test_folders_in_use_are_refused(tmp_path, capsys):
    parent = Owner(Owner.this().host, os.getppid(), 0)
    (tmp_path / IN_USE).write_text(f"{parent}\nconcepts fit\n")
    for options in (["--out", str(tmp_path)], ["--out", f"{tmp_path}/new", "--store", str(tmp_path)]):
        assert main([*ARGUMENTS, *options]) == 2
        assert f"{tmp_path} is in use: concepts fit of process {os.getppid()}" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [IN_USE]


def test_a_store_takes_its_space_at_once(tmp_path, capsys, monkeypatch):
    """Written later into mapped memory, a full disk would end the process by SIGBUS, without a word."""

    def full(_handle, start, number):
        assert start == 0 and number > 40 * 8 * 2
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert main([*ARGUMENTS, "--out", f"{tmp_path}/out", "--store", f"{tmp_path}/store"]) == 2
    assert f"No space left on device: {tmp_path}/store/train/features.5.npy. Free some space" in capsys.readouterr().err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
