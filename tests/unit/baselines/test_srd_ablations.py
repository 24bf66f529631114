"""SRD's ablations against their formulas, written out for a network of two layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from explainer import Explanandum
from explainer.baselines import build
from explainer.errors import ConfigError

#: Options, whether neurons share by themselves, whether along the vectors behind the activations.
ABLATIONS = [({}, False, False), ({"unit": "scalar"}, True, False), ({"vector": "post"}, False, True)]


def network() -> tuple[nn.Sequential, Explanandum, torch.Tensor]:
    """1x1 convolutions without bias, so that every pixel is an example of its own and can be worked out by matrices."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 5, 1, bias=False), nn.ReLU(), nn.Conv2d(5, 4, 1, bias=False), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).double()
    return net, Explanandum(net, 3, mean=0.0, std=1.0), torch.rand(1, 3, 4, 5, dtype=torch.float64)


def worked_out(net: nn.Sequential, x: torch.Tensor, scalar: bool, post: bool) -> torch.Tensor:
    """Relevance of every input pixel ``[h,w]`` for class 1."""
    W1, W2, V = net[0].weight[:, :, 0, 0], net[2].weight[:, :, 0, 0], net[6].weight
    pixels = x[0].flatten(1).T
    weights = (V[1] - V.mean(0)) / len(pixels)  # alpha of class 1 less the mean's: pooling divides by the pixels
    found = []
    for u in pixels:
        z1 = W1 @ u
        a1 = z1.relu()
        z2 = W2 @ a1
        a2 = z2.relu()
        parts = weights * a2
        if parts.sum() <= 0:
            found.append(torch.zeros(()).double())
        elif scalar:  # LRP-0: R_a = sum_b x_a W_ba / z_b R_b
            r1 = sum(a1 * W2[b] / z2[b] * parts[b] for b in range(4) if z2[b].abs() > 1e-9)
            r0 = sum(u * W1[b] / z1[b] * r1[b] for b in range(5) if z1[b].abs() > 1e-9)
            found.append(r0.sum())
        else:
            total = parts.sum()
            for matrix, given, v, after in ((W2, a1, z2, a2), (W1, u, z1, a1)):
                along = after if post else v
                total = total * ((matrix @ given) @ along) / (along @ along) if along @ along > 1e-20 else total * 0
            found.append(total)
    return torch.stack(found).view(4, 5).detach()


@pytest.mark.parametrize(("options", "scalar", "post"), ABLATIONS)
def test_ablations_follow_their_formulas(options, scalar, post):
    net, model, x = network()
    srd = build("srd", model, encoder_output="3", normalize=False, **options)
    expected = worked_out(net, x, scalar, post)
    assert (expected > 0).any()
    torch.testing.assert_close(srd(x, 1)[0], expected)
    torch.testing.assert_close(srd.all_classes(x, [0, 1])[0, 1], expected)
    torch.testing.assert_close(srd.relevance(x, 1, ["input"])["input"][0], expected)


def test_vectors_keep_the_sum_and_the_three_maps_differ():
    """With 3x3 convolutions and biases."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    model, x = Explanandum(net, 3), torch.rand(1, 3, 12, 12)
    maps = [build("srd", model, encoder_output="3", normalize=False, **o)(x, 1)[0] for o, _, _ in ABLATIONS]
    low = build("srd", model, encoder_output="3", resolution="low", normalize=False)(x, 1)[0]
    assert float(maps[0].sum()) == pytest.approx(float(low.sum()), rel=1e-3)
    assert not torch.allclose(maps[0], maps[1]) and not torch.allclose(maps[0], maps[2]) and maps[1].isfinite().all()


def test_combinations_without_a_meaning_are_refused():
    _, model, _ = network()
    for wrong in ({"unit": "layer"}, {"vector": "both"}, {"unit": "scalar", "start": "code"}, {"unit": "scalar", "vector": "post"}):
        with pytest.raises(ConfigError, match="srd: unit"):
            build("srd", model, **wrong)
