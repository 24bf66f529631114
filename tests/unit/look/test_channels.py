"""Channel attribution made visible: inversions, m_a*, statistics of classes, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from explainer.cli import main
from explainer.errors import ConfigError, ShapeError
from explainer.look.channels import attribute, class_statistics, inversions
from explainer.look.inversion import color_matrix, invert
from explainer.models.explanandum import Explanandum
from tests.unit.look.conftest import photograph


def red_green() -> Explanandum:
    """Filter 0 is the red channel, filter 1 the green, filter 2 a constant that no class reads; class k reads filter k."""
    conv, head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        conv.weight[:] = torch.tensor([[2.0, -1, -1], [-1, 2.0, -1], [0, 0, 0]])[:, :, None, None]
        conv.bias[:] = torch.tensor([0.0, 0.0, 1.0])
        head.weight[:] = torch.tensor([[20.0, 0, 0], [0, 20.0, 0]])
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    return Explanandum(net, 2, mean=0.5, std=0.25, class_names=("red", "green"))


def reds(image: torch.Tensor) -> float:
    return float(image[0].mean() - image[1].mean())


@pytest.mark.parametrize("prior", ["fourier", "pixel"])
@pytest.mark.parametrize("objective", ["dot", "match"])
def test_inversion_finds_the_planted_colour(prior: Any, objective: Any) -> None:
    model = red_green()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    directions = torch.zeros(2, 3, 24, 32)
    directions[0, 0], directions[1, 1], directions[:, 2] = 4.0, 4.0, 1.0
    found = invert(model, "0", directions, (24, 32), prior=prior, objective=objective, steps=60)
    assert found.images.shape == (2, 3, 24, 32) and found.images.min() >= 0 and found.images.max() <= 1
    assert reds(found.images[0]) > 0.3 and reds(found.images[1]) < -0.3
    assert (found.objective[-1] > found.objective[0]).all() and found.objective.shape == (60, 2) and (found.cosine > 0.7).all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not model.classifier[0]._forward_hooks
    again = invert(model, "0", directions[1:], (24, 32), prior=prior, objective=objective, steps=60)
    torch.testing.assert_close(again.images[0], found.images[1], msg="same seed, same image, whatever else is searched")


def test_another_seed_is_another_image() -> None:
    direction = torch.randn(1, 3, 16, 16)
    first, second = (invert(red_green(), "0", direction, 16, steps=3, seed=s).images for s in (0, 1))
    assert float((first - second).abs().max()) > 1e-3


def test_a_channel_without_slope_at_the_start_is_told() -> None:
    model = red_green()
    net = nn.Sequential(model.classifier[0], nn.ReLU(), *model.classifier[1:])
    with torch.no_grad():
        net[0].bias[1] = -100.0
    directions = torch.zeros(2, 3, 16, 16)
    directions[0, 0], directions[1, 1] = 1.0, 1.0
    found = invert(Explanandum(net, 2, mean=0.5, std=0.25), "1", directions, 16, steps=8)
    assert found.stuck.tolist() == [False, True] and reds(found.images[0]) > 0.05 > abs(reds(found.images[1]))


def test_a_grey_start_without_slope_gets_contrast() -> None:
    """The filter is below 0 at grey and not at a strong green."""
    model = red_green()
    net = nn.Sequential(model.classifier[0], nn.ReLU(), *model.classifier[1:])
    with torch.no_grad():
        net[0].bias[:2] = torch.tensor([0.0, -1.0])
    directions = torch.zeros(2, 3, 16, 16)
    directions[0, 0], directions[1, 1] = 1.0, 1.0
    both = invert(Explanandum(net, 2, mean=0.5, std=0.25), "1", directions, 16, steps=40)
    assert (both.objective[0, 1], bool(both.stuck[1])) == (0.0, False) and reds(both.images[1]) < -0.15
    alone = invert(Explanandum(net, 2, mean=0.5, std=0.25), "1", directions[:1], 16, steps=40)
    torch.testing.assert_close(alone.images[0], both.images[0], msg="rows with a slope are as they were")


def test_inversion_refuses_by_name() -> None:
    with pytest.raises(ShapeError, match=r"must be \[1, 3, 16, 16\]"):
        invert(red_green(), "0", torch.ones(1, 3, 8, 8), 16, steps=1)
    with pytest.raises(ConfigError, match="prior must be one of fourier, pixel"):
        invert(red_green(), "0", torch.ones(1, 3, 8, 8), 8, prior="none")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        invert(red_green(), "0", torch.ones(1, 3, 8, 8), 8, steps=0)


def test_colours_are_the_root_of_the_covariance() -> None:
    images = torch.rand(3, 3, 9, 7, dtype=torch.float64)
    images[:, 1] = 0.5 * images[:, 0] + 0.1
    root = color_matrix(images)
    covariance = torch.cov(images.transpose(0, 1).flatten(1))
    squared = root @ root
    torch.testing.assert_close(squared / squared.trace(), covariance / covariance.trace())
    assert float(torch.linalg.vector_norm(root, dim=0).max()) == pytest.approx(1)
    assert torch.equal(color_matrix(torch.full((1, 3, 4, 4), 0.3)), torch.eye(3))


def color_image(red: float, green: float) -> torch.Tensor:
    image = torch.tensor([red, green, 0.5]).view(1, 3, 1, 1).expand(1, 3, 16, 16).clone()
    image[..., 8:] += 0.05 * (image[..., 8:] - 0.5)
    return image


def test_the_channel_of_each_class_is_kept() -> None:
    images = torch.cat([color_image(0.9, 0.6), color_image(0.6, 0.9)])
    found = attribute(red_green(), images, torch.tensor([0, 1]), "0", areas=[2, 1], iterations=60)
    assert found.kept == [1, 1] and found.reached.all() and found.monotone.shape == (2,)
    torch.testing.assert_close(found.masks, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]), atol=0.05, rtol=0)
    torch.testing.assert_close(found.maps, (found.masks[:, :, None, None] * found.features).sum(1))
    assert [row[0] for row in found.top(1)] == [0, 1]
    everything = replace(found, masks=torch.ones(2, 3))
    assert sorted(everything.top(3)[0]) == [0, 1], "filter 2 is the same everywhere"
    seen = inversions(red_green(), "0", found.features[0], found.masks[0], channels=[0, 1], size=16, steps=40)
    assert reds(seen.images[1]) > 0.3 and reds(seen.images[2]) > 0.3 and reds(seen.images[3]) < -0.3


def test_all_channels_where_no_area_suffices() -> None:
    conv = nn.Conv2d(3, 4, 1, bias=False)
    nn.init.constant_(conv.weight, 1.0)
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2, bias=False))
    nn.init.constant_(net[3].weight, 1.0)
    model = Explanandum(net, 2, mean=0.0, std=1.0)
    found = attribute(model, torch.full((1, 3, 8, 8), 0.5), torch.tensor([0]), "0", areas=[1, 2], iterations=40)
    assert not found.reached.any() and found.kept == [4] and torch.equal(found.masks, torch.ones(1, 4))
    assert found.monotone.all(), "two of four equal channels hold more than one"


def test_statistics_by_hand() -> None:
    masks = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]])
    found = class_statistics(masks, torch.tensor([3, 3, 5, 7]))
    assert found[3]["mean"] == [1.0, 0.5, 0.0] and found[3]["channel"] == 0 and found[3]["images"] == 2
    assert found[3]["specificity"] == pytest.approx(0.5) and found[3]["shared_with"] == [7] and found[5]["shared_with"] == []
    assert found[5]["channel"] == 2 and found[5]["specificity"] == pytest.approx(1)
    assert class_statistics(masks[:2], torch.tensor([3, 3]))[3]["specificity"] is None


def test_the_command(classifier_checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    photos, out = tmp_path / "photos", tmp_path / "sheets"
    photos.mkdir()
    for n in range(2):
        Image.fromarray(photograph(32, 32, n)).save(photos / f"{n}.png")
    arguments = ["channels", str(photos), "--classifier", str(classifier_checkpoint), "--size", "32", "--iterations", "20", "--steps", "3"]
    few = [*arguments, "--out", str(out), "--top", "2"]
    assert main([*few, "--classes", "red", "--areas", "1,2"]) == 0, capsys.readouterr().err
    assert "red" in capsys.readouterr().out
    found = json.loads((out / "channels.json").read_text())
    assert [row["image"] for row in found["decisions"]] == ["0.png", "1.png"] and found["classes"]["red"]["images"] == 2
    masks = np.load(out / "masks.npy")
    assert masks.shape == (2, found["channels"]) and np.allclose(masks.mean(0), found["classes"]["red"]["mean"], atol=1e-6)
    for row in found["decisions"]:
        assert (out / row["sheet"]).stat().st_size > 1000 and -1 <= row["cosine"]["kept"] <= 1
        assert set(row["stuck"]) <= set(row["top"])
        assert row["kept"] in (1, 2, found["channels"]) and row["reached"] == (row["kept"] != found["channels"])
    for wrong, words in (
        (["--classes", "x"], "unknown class 'x'"),
        (["--areas", "0.5,1.5"], "whole numbers of channels"),
        (["--areas", "9999"], "ask for fewer"),
        (["--layer", "nothing"], "nothing"),
    ):
        with_error = [*few, *wrong]
        try:
            code = main(with_error)
        except SystemExit as end:
            code = int(end.code or 0)
        assert code == 2 and words in capsys.readouterr().err
