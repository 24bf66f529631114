"""One source file is a whole plug-in: a throw-away baseline, loss, metric and protocol from a temporary folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from explainer import plugins, vocabulary
from explainer.baselines import build
from explainer.evaluation.protocol import parse_protocols
from explainer.losses.base import build_terms, total_loss
from explainer.metrics.base import PerImageMetric
from explainer.report.tables import title_of
from tests.contracts.networks import tiny

SOURCES = {
    "explainer.baselines": """
import torch
from explainer.baselines.kernels.base import Baseline

class Corner(Baseline):
    name = "throwaway"
    needs_gradients = False
    class_specific = False

    def __init__(self, explanandum, side=2):
        super().__init__(explanandum)
        self.side = side

    def _explain(self, images, class_index, generator, masks):
        maps = torch.zeros_like(images[:, 0])
        maps[:, : self.side, : self.side] = 1
        return maps
""",
    "explainer.losses": """
from explainer.losses.base import LossTerm

class Darkness(LossTerm):
    name = "throwaway"

    def value(self, e):
        return 1 - e.class_masks.mean()
""",
    "explainer.metrics": """
from explainer.metrics.facts import Facts

@Facts("throwaway", higher_is_better=True, bounds=(0.0, 1.0), optimum=None)
def brightest(mask, gain=1.0):
    return gain * mask.flatten(1).amax(1)
""",
    "explainer.evaluation.protocols": """
from explainer.evaluation.protocol import Column, Protocol

class Nothing(Protocol):
    name = "throwaway"
    heading = "Nothing at all"
    question = "Is there anything?"

    def columns(self):
        return {"zero": Column("zero")}

    def score(self, scene, maps):
        return []
""",
}


@pytest.fixture
def throwaway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package, source in SOURCES.items():
        folder = tmp_path / package
        folder.mkdir()
        (folder / "throwaway.py").write_text(source)
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(folder)])
    plugins.discover.cache_clear()
    yield
    plugins.discover.cache_clear()
    for package in SOURCES:
        sys.modules.pop(f"{package}.throwaway", None)
        vars(sys.modules[package]).pop("throwaway", None)


@pytest.mark.usefixtures("throwaway")
def test_one_file_is_a_baseline_a_loss_a_metric_and_a_protocol(tmp_path: Path) -> None:
    maps = build("throwaway", tiny("vgg", torch.float32), side=3)(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    assert maps.shape == (2, 16, 16) and maps.sum() == 2 * 9
    total, values = total_loss(
        build_terms({"throwaway": {"weight": 2.0}}),
        SimpleNamespace(class_masks=torch.full((1, 3, 4, 4), 0.25), progress=0.0, ids=("a",)),  # type: ignore[arg-type]
    )
    assert total == 1.5 and values["throwaway"] == 0.75
    metric = PerImageMetric("throwaway", gain=2.0)
    metric.update(torch.tensor([[[0.0, 0.5]], [[0.25, 0.0]]]))
    assert metric.compute() == 0.75
    assert list(parse_protocols(["throwaway"], "corrected")["throwaway"].columns()) == ["zero"]
    assert title_of({"protocols": {"throwaway": {"name": "throwaway"}}}, "throwaway") == ("Nothing at all", "Is there anything?")
    assert all(vocabulary.names_in(tmp_path / package) == ["throwaway"] for package in SOURCES)


def test_nothing_of_it_stays() -> None:
    assert all("throwaway" not in plugins.discover(package) for package in SOURCES)
