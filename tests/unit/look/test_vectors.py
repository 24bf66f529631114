"""SRD's views: receptive fields, the tree of vectors, nearest vectors, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from explainer.baselines.srd import SRD
from explainer.cli import main
from explainer.look.neighbors import nearest
from explainer.look.vectors import add_neighbors, all_nodes, explain_recursively, mass_box, receptive_fields, strongest
from explainer.models.explanandum import Explanandum
from tests.unit.look.conftest import photograph


def network(kernel: int = 3) -> Explanandum:
    torch.manual_seed(3)
    padding = kernel // 2
    layers = [nn.Conv2d(3, 5, kernel, padding=padding), nn.ReLU(), nn.Conv2d(5, 4, kernel, padding=padding), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return Explanandum(net.double(), 3, mean=0.5, std=0.5)


class Residual(nn.Module):
    """A stem, and a block whose sum has two sources."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head, self.act1, self.act2, self.act3 = nn.Linear(4, 3), nn.ReLU(), nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.act1(self.stem(x))
        x = self.act3(self.last(self.act2(self.inner(x))) + x)
        return self.head(x.mean((2, 3)))


def an_image(side: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_evidence(srd: SRD, image: torch.Tensor) -> int:
    """A class that has relevance; one with a large bias may have none."""
    return max(range(3), key=lambda k: float(srd.relevance(image[None], k, ["3"])["3"].sum()))


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_field_of_one_convolution_is_its_window(kernel: int) -> None:
    srd, image = SRD(network(kernel)), an_image()
    (field,) = receptive_fields(srd, image, "0", [(2, 3)])
    reach = kernel // 2
    window = torch.zeros(6, 6, dtype=torch.bool)
    window[2 - reach : 3 + reach, 3 - reach : 4 + reach] = True
    assert torch.equal(field != 0, window) and float(field.sum()) == pytest.approx(1, abs=1e-9)
    if kernel == 1:
        assert mass_box(field) == (2, 3, 3, 4)


def test_many_fields_equal_single_ones() -> None:
    srd, image = SRD(network()), an_image()
    places = [(i, j) for i in range(3) for j in range(4)]
    fields = receptive_fields(srd, image, "3", places)
    for number in (0, 8, 11):
        assert torch.allclose(fields[number], srd.erf(image[None], "3", places[number])[0], atol=1e-12)


def test_the_box_holds_the_mass() -> None:
    field = torch.zeros(5, 7)
    field[1, 2], field[3, 4], field[0, 0], field[4, 6] = 0.6, 0.3, 0.1, -5.0
    assert mass_box(field) == (1, 2, 4, 5), "0.6 and 0.3 are 90 % of what is positive"
    assert mass_box(field, 0.5) == (1, 2, 2, 3) and mass_box(field, 1.0) == (0, 0, 4, 5)
    assert mass_box(torch.zeros(5, 7)) == (0, 0, 5, 7)


def test_the_strongest_vectors_by_hand() -> None:
    vectors = torch.zeros(2, 2, 3)
    vectors[:, 1, 2], vectors[:, 0, 1], vectors[:, 1, 0] = torch.tensor([3.0, -4]), torch.tensor([0.0, 6]), torch.tensor([1.0, 1])
    assert strongest(vectors, 3) == [(0, 1), (1, 2), (1, 0)]


@pytest.mark.parametrize("make", [network, lambda: Explanandum(Residual().double(), 3, mean=0.5, std=0.5)])
def test_shares_sum_to_one_and_mix_the_fields(make: Any) -> None:
    torch.manual_seed(5)
    model = make()
    srd, image = SRD(model), an_image()
    layer = "3" if isinstance(model.classifier, nn.Sequential) else "act3"
    row, column = strongest(srd.vectors(image[None], layer)[0], 1)[0]
    shares = srd.shares(image[None], layer, (row, column))
    assert list(shares) == (["1"] if layer == "3" else ["act1", "act2"]), "both sources of a residual sum compete"
    assert float(sum(mu.sum() for mu in shares.values())) == pytest.approx(1, abs=1e-9)
    mixed = torch.zeros(6, 6, dtype=torch.float64)
    for source, mu in shares.items():
        places = [(i, j) for i in range(6) for j in range(6) if float(mu[0, i, j]) != 0]
        weights = torch.stack([mu[0, i, j] for i, j in places])
        mixed += (weights[:, None, None] * receptive_fields(srd, image, source, places)).sum(0)
    assert torch.allclose(mixed, srd.erf(image[None], layer, (row, column))[0], atol=1e-9)


def test_the_tree_by_its_sums() -> None:
    srd, image = SRD(network()), an_image(2)
    k = with_evidence(srd, image)
    roots, rest = explain_recursively(srd, image, k, children=16, depth=3)
    relevance = srd.relevance(image[None], k, ["3"])["3"][0]
    assert rest == pytest.approx(0, abs=1e-9) and len(roots) == int((relevance > 0).sum())
    assert [n.share for n in roots] == sorted((float(r) for r in relevance.flatten() / relevance.sum() if r > 0), reverse=True)
    first = roots[0]
    assert first.rest == pytest.approx(0, abs=1e-6) and {c.layer for c in first.children} == {"1"}, "4 sources, all are shown"
    assert all(a.share >= b.share for a, b in zip(first.children, first.children[1:], strict=False))
    child = first.children[0]
    assert child.path_share == pytest.approx(first.share * child.share)
    assert {c.layer for c in child.children} == {"input"} and child.rest == pytest.approx(0, abs=1e-6)
    few, left = explain_recursively(srd, image, k, children=2, depth=1)
    assert left == pytest.approx(1 - few[0].share - few[1].share) and few[0].rest is None and not few[0].children


def test_a_class_without_relevance_has_no_children() -> None:
    model = network()
    with torch.no_grad():
        model.classifier[-1].weight[:] = model.classifier[-1].weight[:1].clone()
    assert explain_recursively(SRD(model), an_image(), 0, 3, 2) == ([], 1.0)


def test_nearest_vectors_by_hand() -> None:
    database = torch.zeros(3, 2, 1, 3)
    database[0, :, 0] = torch.tensor([[1.0, 0, -1], [0, 2, 0]])
    database[1, :, 0] = torch.tensor([[0.0, 0, 3], [-1, 0, 3]])
    found = nearest(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), database, 2)
    assert [f[:3] for f in found[0]] == [(0, 0, 0), (1, 0, 2)] and found[0][1][3] == pytest.approx(0.5**0.5)
    assert [f[:3] for f in found[1]] == [(1, 0, 2), (0, 0, 0)] and found[1][0][3] == pytest.approx(1)


def test_the_same_image_is_its_own_nearest() -> None:
    srd, image = SRD(network()), an_image()
    roots, _ = explain_recursively(srd, image, with_evidence(srd, image), 2, 2)
    assert len(all_nodes(roots)) == 6
    add_neighbors(srd, image, roots, torch.stack([an_image(seed=1), image, an_image(seed=2)]), 2)
    for node in all_nodes(roots):
        best = node.neighbors[0]
        assert (best.image, best.row, best.column) == (1, node.row, node.column) and best.cosine > 0.999
        assert torch.allclose(best.field, node.field) and len({n.image for n in node.neighbors}) == 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(3):
        Image.fromarray(photograph(32, 32, n)).save(folder / f"{n}.png")
    Image.fromarray(photograph(32, 32, 4)).save(folder / "z<script>alert(1)<.png")
    return folder


def test_the_command(photos: Path, classifier_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    out, odd = tmp_path / "view", str(photos / "z<script>alert(1)<.png")
    arguments = ["srd", odd, "--classifier", str(classifier_checkpoint), "--out", str(out), "--size", "32", "--children", "2"]
    assert main([*arguments, "--vectors", "2", "--data", str(photos), "--neighbors", "2", "--class", "red"]) == 0, capsys.readouterr().err
    assert "red, probability" in capsys.readouterr().out
    found = json.loads((out / "tree.json").read_text())
    assert found["class"] == "red" and len(found["strongest"]) == 2 and found["strongest"][0]["norm"] >= found["strongest"][1]["norm"]
    shares = [node["share"] for node in found["children"]]
    assert found["rest"] == pytest.approx(1 - sum(shares)) and shares == sorted(shares, reverse=True) and len(shares) > 0
    for node in found["children"]:
        assert node["rest"] == pytest.approx(1 - sum(child["share"] for child in node["children"]))
        assert len(node["neighbors"]) == 2 and not any("alert" in n["image"] for n in node["neighbors"]), "from other images"
    text = (out / "index.html").read_text()
    assert "alert(1)<" not in text and text.count("<script") == 1 and not re.search(r"https?://|url\(", text)
    assert {"srd.png", "fields.png", "srd.npy"} <= {p.name for p in out.iterdir()}
    for wrong, words in ((["--class", "x"], "unknown class 'x'"), (["--layer", "nothing"], "no node 'nothing'")):
        assert main([*arguments, *wrong]) == 2 and words in capsys.readouterr().err
    assert main(["srd", str(photos), *arguments[2:]]) == 2 and "Name one image" in capsys.readouterr().err
