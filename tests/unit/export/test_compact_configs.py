"""The compact configurations parse beside a run's file, build, use all their weights, and explain at any size."""

from __future__ import annotations

import pytest
import torch

from explainer.commands.parsing import parse_run
from tests.benchmarks.bench_latency import CONFIGS, DEFAULT, compact_configs, network

NAMES = sorted(compact_configs())


def test_the_default_is_among_them() -> None:
    assert DEFAULT in NAMES and len(NAMES) >= 5


@pytest.mark.parametrize("name", NAMES)
def test_it_replaces_the_network_of_a_run(name: str) -> None:
    base = CONFIGS.parent / "voc2007_vgg16.yaml"
    _, config, _ = parse_run(["fit", "--config", str(base), "--config", str(CONFIGS / f"{name}.yaml")])
    section = compact_configs()[name]
    assert config.explainer.network == section["network"] and config.explainer.options == section["options"]
    assert config.explainer.stride == section["stride"] and config.explainer.downscale == section["downscale"]
    assert config.classifier.arch == "vgg16", "the rest of the run stays"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_builds_and_every_weight_is_used(name: str) -> None:
    net = network(compact_configs()[name], 3, 64)
    images = torch.rand(2, 3, 70, 91)
    masks = net(images)
    assert masks.shape == (2, 3, 70, 91) and float(masks.detach().min()) >= 0 and float(masks.detach().max()) <= 1
    net.train()(torch.rand(2, 3, 64, 64)).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []
