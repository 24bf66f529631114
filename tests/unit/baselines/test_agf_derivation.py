"""A slow second derivation of AGF: every layer as a dense matrix, every rule as a loop, the gradient by differences."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from explainer.baselines.agf import AGF, MODES
from explainer.models.explanandum import Explanandum

SHAPE = (3, 7, 6)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), groups=2)
        self.conv3 = nn.Conv2d(6, 4, 3, padding="same", padding_mode="reflect")
        self.fc1, self.fc2 = nn.Linear(4 * 3 * 2, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        x = torch.relu(self.conv3(x))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)


def matrix(layer: nn.Module, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
    """The layer without bias as a dense matrix, column by column."""
    basis = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    with torch.no_grad():
        out = layer(basis) - layer(zero)
    return out.flatten(1).T.numpy(), tuple(out.shape[1:])


def zrule(x, w, phi):
    out = np.zeros_like(x)
    for i in range(len(phi)):
        z = w[i] @ x
        if phi[i] != 0 and z != 0:
            out += x * w[i] * phi[i] / (z + 1e-9)
    return out


def top(a):
    return a / (a.max() + 1e-9) if a.max() != 0 else 0 * a


def fact(y, phi, o):
    h = 1 / (1 + np.exp(-o.gain * top(y)))
    groups = [phi < 0 if o.background == "negative" else phi <= 0, phi > 0]
    r = np.stack([h[:, g].mean(1) if g.any() else np.zeros(len(h)) for g in groups], 1)
    w = np.linalg.solve(r.T @ r + o.ridge * np.eye(2), r.T @ h)
    w = np.maximum(w, 0)
    return np.maximum(w[1] - w[0], 0)


def shifted(c, r, o):
    live = (c != 0).astype(float)
    if o.shift == "masked":
        return c + r * live - live * (r * live).sum() / live.sum()
    return c + r - r.sum() / live.sum()


def reference(net: Net, image: torch.Tensor, target: int, o) -> np.ndarray:
    shapes, mats, absolute = [SHAPE], [], []
    for layer in (net.conv1, net.conv2, net.conv3):
        m, s = matrix(layer, shapes[-1])
        keep = layer.weight.data.clone()
        layer.weight.data = keep.abs()
        absolute.append(matrix(layer, shapes[-1])[0])
        layer.weight.data = keep
        mats.append(m)
        shapes.append(s)
    bias = [
        np.repeat(lay.bias.detach().numpy(), math.prod(s[1:])) for lay, s in zip((net.conv1, net.conv2, net.conv3), shapes[1:], strict=True)
    ]
    x, inputs, gates = image.flatten().numpy(), [], []
    for m, b in zip(mats, bias, strict=True):
        inputs.append(x)
        y = m @ x + b
        gates.append(y > 0)
        x = np.maximum(y, 0)
    channels, rows, columns = shapes[-1]
    grid, pool = x.reshape(shapes[-1]), []
    for c in range(channels):
        for i in range(rows // 2):
            for j in range(columns // 2):
                at = max(((2 * i + a, 2 * j + b) for a in (0, 1) for b in (0, 1)), key=lambda p: grid[c, p[0], p[1]])
                pool.append((c * rows + at[0]) * columns + at[1])
    select = np.eye(len(x))[pool]
    w1, w2 = net.fc1.weight.detach().numpy(), net.fc2.weight.detach().numpy()
    pooled = select @ x
    pre = w1 @ pooled + net.fc1.bias.detach().numpy()
    hidden = np.maximum(pre, 0)

    def chance(h):
        y = w2 @ h + net.fc2.bias.detach().numpy()
        z = y[target] * np.exp(-0.5 * ((y - y[target]) / np.abs(y - y[target]).max()) ** 2)
        e = np.exp(z - z.max())
        return e[target] / e.sum()

    step = 1e-5
    g = np.array([(chance(hidden + step * e) - chance(hidden - step * e)) / (2 * step) for e in np.eye(len(hidden))])
    phi = hidden * g
    # relu, first linear layer after the flattened map
    phi, g = phi * (hidden > 0), g * (pre > 0)
    c, g = zrule(np.abs(pooled), np.abs(w1), phi), w1.T @ g
    m = np.maximum((pooled * g).reshape(channels, -1).mean(0), 0)
    m = np.tile(m, channels)
    phi = shifted(c, top(m * (c != 0) if o.shift == "masked" else m), o)
    phi, g = zrule(x, select, phi), select.T @ g
    for n in (2, 1, 0):
        value = np.maximum(mats[n] @ inputs[n] + bias[n], 0)
        phi, outer = phi * (value != 0), g * gates[n]
        x, g, w = inputs[n], mats[n].T @ outer, absolute[n]
        if n == 0 and o.first_conv == "zb":
            lo, hi = x.min(), x.max()
            up, down = np.maximum(mats[0], 0), np.minimum(mats[0], 0)
            out = np.zeros_like(x)
            for i in range(len(phi)):
                parts = x * mats[0][i] - lo * up[i] - hi * down[i]
                out += parts * phi[i] / (parts.sum() + 1e-9)
            phi = out
            continue
        size = shapes[n][0]
        c, a = zrule(np.abs(x), w, phi), zrule(np.ones_like(x), w, phi)
        masked = mats[n].T @ (outer * (phi != 0)) if o.mask_gradient else g
        m = np.tile(top(np.maximum((x * g).reshape(size, -1).mean(0), 0)), size)
        part = c.reshape(size, -1).mean(0)
        f_x, f_dx = (np.tile(fact(y.reshape(size, -1), part, o), size) for y in (x, masked))
        phi = shifted(c, a + f_dx + (f_x + m) / (1 + np.exp(-c)), o)
    phi = phi.reshape(SHAPE)
    return (phi / phi.max()).sum(0) if phi.max() > 0 else phi.sum(0)


@pytest.mark.filterwarnings("ignore:agf. the logit")
@pytest.mark.parametrize(
    "mode,changes",
    [
        ("code", {}),
        ("code", {"gain": 3.0, "ridge": 0.2}),
        ("code", {"background": "nonpositive"}),
        ("code", {"shift": "everywhere"}),
        ("code", {"first_conv": "full"}),
        ("code", {"mask_gradient": False}),
        ("paper", {"ridge": 1e-4}),
    ],
)
def test_dense_matrices_give_the_same_maps(mode: str, changes: dict) -> None:
    torch.manual_seed(4)
    net = Net().double().eval()
    images = torch.rand(2, *SHAPE, dtype=torch.float64)
    method = AGF(Explanandum(net, 3, mean=0.0, std=1.0), mode=mode, **changes)
    options = dataclasses.replace(MODES[mode], **changes)
    for target in (0, 2):
        maps = method(images, target)
        for image, ours in zip(images, maps, strict=True):
            slow = torch.from_numpy(reference(net, image, target, options))
            assert float((ours - slow).abs().max()) <= 2e-6 * float(slow.abs().max())
