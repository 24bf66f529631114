"""The matrix of methods and families: the guide's page is what the code does, and a fault is not taken for an answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from explainer import baselines, cli
from explainer.commands import matrix
from explainer.commands.matrix import Cell
from explainer.errors import UnsupportedLayerError
from explainer.models.families import FAMILIES

PAGE = Path(__file__).parents[3] / "docs/reference/classifiers.md"
VIT = "ViT (timm)"


def printed() -> dict[str, dict[str, Cell]]:
    """The cells of the page, by family and method."""
    text = PAGE.read_text(encoding="utf-8")
    everywhere = re.findall(r"`(\w+)`", re.search(r"^On all .* families: (.*)\.$", text, flags=re.M)[1])  # type: ignore[index]
    reasons = {number: re.sub(r"\\(.)", r"\1", reason).replace("&lt;", "<") for number, reason in re.findall(r"^(\d+)\. (.*)$", text, re.M)}
    head, _, *rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    found: dict[str, dict[str, Cell]] = {}
    for family, _kind, *cells in rows:
        found[family] = {name: Cell("works") for name in everywhere}
        for names, cell in zip(head[2:], cells, strict=True):
            read = Cell("works") if cell == "yes" else Cell("refused", reasons[cell])
            found[family] |= dict.fromkeys(re.findall(r"`(\w+)`", names), read)
    return found


def test_the_page_has_all_families_and_methods() -> None:
    cells = printed()
    assert list(cells) == list(FAMILIES)
    assert all(sorted(row) == baselines.names() for row in cells.values())


def test_the_page_names_what_runs_and_does_not_find_planted_evidence() -> None:
    cells = printed()
    assert all(cells[family][name].status == "works" for family, names in matrix.NOT_FOUND.items() for name in names)
    head = matrix.page(cells, "explainer methods --matrix --out docs/reference/classifiers.md").partition("\nOn all ")[0]
    assert PAGE.read_text(encoding="utf-8").startswith(head)
    assert "No method is known that runs here" in matrix.page({"Mixer (timm)": cells["Mixer (timm)"]}, "command")


@pytest.mark.parametrize(
    ("family", "methods"),
    [
        (VIT, ["attention_rollout", "grad_cam", "score_cam", "excitation_backprop"]),
        ("EfficientNet (timm)", ["attn_lrp", "srd", "guided_backprop", "lrp"]),
        ("Mixer (timm)", ["full_grad", "deconvnet"]),
        ("MobileNetV3 (torchvision)", ["agf", "ground_truth"]),
    ],
)
def test_the_page_says_what_happens(family: str, methods: list[str]) -> None:
    row = printed()[family]
    assert matrix.compute([family], methods)[family] == {name: row[name] for name in methods}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_happens_with_every_method(family: str) -> None:
    assert matrix.compute([family])[family] == printed()[family]


class Broken:
    """A method of which nothing can be had: an exception of another kind, or maps of one form or another."""

    name, needs_masks, class_specific = "broken", False, True

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome

    def all_classes(self, image: torch.Tensor, classes: list[int], *, masks: None = None) -> torch.Tensor:
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome.expand(1, 2, 2, 2)


SLOPE = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
OUTCOMES = {
    "refused": (
        UnsupportedLayerError("broken has no rule for VisionTransformer at 'a.b' (Gate). Use gradient."),
        "has no rule for the network",
    ),
    "raises": (IndexError("out\nof range"), "IndexError: out of range"),
    "NaN": (SLOPE * torch.nan, "its maps are not finite"),
    "flat": (torch.ones(1), "its maps are constant on 3 random networks"),
    "one map for all": (SLOPE, "its maps are the same for both classes"),
    "works": (SLOPE * torch.tensor([1.0, 2.0]).view(2, 1, 1), ""),
}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_what_counts_as_what(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, reason = OUTCOMES[kind]
    monkeypatch.setattr(matrix.baselines, "build", lambda *_, **__: Broken(outcome))
    monkeypatch.setattr(matrix.baselines, "names", lambda: ["broken"])
    status = kind if kind in ("refused", "works") else "error"
    out = tmp_path / "cells.json"
    code = cli.main(["methods", "--matrix", "--families", VIT, "--quiet", "--out", str(out)])
    assert json.loads(out.read_text()) == {VIT: {"broken": {"status": status, "reason": reason}}}
    assert code == (status == "error")
    assert capsys.readouterr().err == (f"error: broken on {VIT}: {reason}\n" if status == "error" else "")
    assert cli.main(["methods", "--matrix", "--families", VIT, "--quiet"]) == code
    text = capsys.readouterr().out
    expected = {"works": "On all 1 families: `broken`.", "refused": f"| {VIT} | transformer | 1 |\n"}.get(
        status, f"| {VIT} | transformer | **error** 1 |\n"
    )
    assert expected in text and (not reason or f"\n1. {reason}" in text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--matrix", "--families", "ViT"], "'ViT' is none of VGG (torchvision); "),
        (["--matrix", "--out", "table.txt"], "--out must end in .md or .json, received table.txt"),
        (["--out", "table.md"], "--out belongs to --matrix"),
        (["--families", VIT], "--families belongs to --matrix"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["methods", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["EfficientNet (torchvision)", "Hiera (timm)"])
def test_small_networks_tell_images_apart_and_are_the_same_every_time(family: str) -> None:
    net, again, other = FAMILIES[family].build(3), FAMILIES[family].build(3), FAMILIES[family].build(3, seed=1)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores = net(images)
        assert torch.equal(scores, again(images)) and not torch.equal(scores, other(images))
    assert not net.training and (scores[0] - scores[1]).abs().max() > 1e-3
