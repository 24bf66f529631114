"""SRD derived slowly: every layer a dense matrix built pixel by pixel from eq. 11, sharing ratios as matrices, ERFs forwards (eq. 2)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from explainer import Explanandum
from explainer.baselines import build


class Tiny(nn.Module):
    """conv+BN -> ReLU -> pool -> {conv+BN, identity} -> add -> BN -> tanh -> conv(s2) -> LeakyReLU -> GAP -> linear."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(2, 3, 3, padding=1, bias=bias), nn.BatchNorm2d(3)
        self.r1, self.p1 = nn.ReLU(), nn.MaxPool2d(2, 1)
        self.c2, self.b2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.bs, self.t, self.c3, self.r3 = nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2, bias=bias), nn.LeakyReLU(0.2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        p = self.p1(self.r1(self.b1(self.c1(x))))
        x = self.t(self.bs(self.b2(self.c2(p)) + p))
        return self.fc(self.r3(self.c3(x)).mean((2, 3)))


def tiny(seed, bias=True):
    torch.manual_seed(seed)
    net = Tiny(bias).double().eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3 if bias else 0.0)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3 if bias else 0.0)
    return net, torch.randn(1, 2, 6, 5, dtype=torch.float64)


def dense(function, shape):
    """Matrix of a linear map of ``[C,H,W]`` tensors, column by column."""
    size = torch.Size(shape).numel()
    return torch.stack([function(e.view(1, *shape)).flatten() for e in torch.eye(size, dtype=torch.float64)], 1)


def conv_matrix(conv, bn, u):
    """Eq. 11 in linear form, pixel by pixel: ``W_{i->j} + b u_i^T / (n_i D_j)`` with the BatchNorm folded."""
    s = torch.ones(conv.out_channels).double() if bn is None else bn.weight / torch.sqrt(bn.running_var + bn.eps)
    t = torch.zeros(conv.out_channels).double() if bn is None else bn.bias - s * bn.running_mean
    b = t if conv.bias is None else s * conv.bias + t
    W = s[:, None, None, None] * conv.weight
    C, H, Wd = u.shape[1:]
    (kh, kw), (sh, sw), (ph, pw) = conv.kernel_size, conv.stride, conv.padding
    oh, ow = (H + 2 * ph - kh) // sh + 1, (Wd + 2 * pw - kw) // sw + 1
    M = torch.zeros(conv.out_channels, oh, ow, C, H, Wd, dtype=torch.float64)
    n = u[0].norm(dim=0)
    for y, x in itertools.product(range(oh), range(ow)):
        field = [(y * sh - ph + a, x * sw - pw + c, a, c) for a in range(kh) for c in range(kw)]
        field = [f for f in field if 0 <= f[0] < H and 0 <= f[1] < Wd]
        D = sum(n[i, j] for i, j, _, _ in field)
        for i, j, a, c in field:
            M[:, y, x, :, i, j] = W[:, :, a, c] + (torch.outer(b, u[0, :, i, j]) / (n[i, j] * D) if n[i, j] > 1e-10 else 0)
    return M.reshape(M[..., 0, 0, 0].numel(), -1)


def norm_matrix(bn, u):
    """A BatchNorm of its own: ``diag(s) + t u^T/||u||^2`` at each pixel."""
    s = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    t = bn.bias - s * bn.running_mean
    C, H, W = u.shape[1:]
    M = torch.zeros(C, H, W, C, H, W, dtype=torch.float64)
    for y, x in itertools.product(range(H), range(W)):
        v = u[0, :, y, x]
        M[:, y, x, :, y, x] = torch.diag(s) + torch.outer(t, v) / (v @ v)
    return M.reshape(C * H * W, -1)


def mu(M, x, v):
    """Eq. 6 for all pixel pairs: ``mu[j, i] = <M_{ji} x_i, v_j> / ||v_j||^2``."""
    pieces = torch.einsum("ajbi,bi->aji", M.view(v.shape[1], v[0, 0].numel(), x.shape[1], x[0, 0].numel()), x[0].flatten(1))
    flat = v[0].flatten(1)
    square = (flat**2).sum(0)
    return torch.einsum("aji,aj->ji", pieces, flat) / torch.where(square > 1e-20, square, 1.0)[:, None] * (square > 1e-20)[:, None]


def slow_ratios(net, x):
    """mu matrices input->r1, r1->t, t->r3."""
    with torch.no_grad():
        v1 = net.b1(net.c1(x))
        x1 = net.r1(v1)
        p, indices = nn.functional.max_pool2d(x1, 2, 1, return_indices=True)
        s = net.b2(net.c2(p)) + p
        v2 = net.bs(s)
        x2 = net.t(v2)
        v3 = net.c3(x2)
        pool = dense(lambda e: e.flatten(2).gather(2, indices.flatten(2)).view(p.shape), x1.shape[1:])
        to_sum = (conv_matrix(net.c2, net.b2, p) + torch.eye(p.numel(), dtype=torch.float64)) @ pool
        return [
            mu(conv_matrix(net.c1, net.b1, x), x, v1),
            mu(norm_matrix(net.bs, s) @ to_sum, x1, v2),
            mu(conv_matrix(net.c3, None, x2), x2, v3),
        ], v3.shape[-2:]


@pytest.mark.parametrize("seed", [0, 1])
def test_backward_sweep_equals_explicit_ratios_and_forward_erf(seed):
    net, x = tiny(seed)
    srd = build("srd", Explanandum(net, 3, mean=0.0, std=1.0))
    ratios, (h, w) = slow_ratios(net, x)
    for m in ratios:
        assert torch.allclose(m.sum(1), torch.ones(len(m)).double(), atol=1e-10), "I1: the shares of a vector add up to one"
    names = ["input", "r1", "t", "r3"]
    maps = srd.relevance(x, 1, names)
    backward = maps["r3"].flatten()
    for name, m in zip(["t", "r1", "input"], reversed(ratios), strict=True):
        backward = m.T @ backward
        assert torch.allclose(maps[name].flatten(), backward, atol=1e-10)
    erf = torch.eye(x[0, 0].numel(), dtype=torch.float64)  # ERF^0: each input pixel covers itself
    for m in ratios:
        erf = m @ erf
    assert torch.allclose(erf.sum(1), torch.ones(h * w).double(), atol=1e-10)
    assert torch.allclose(maps["r3"].flatten() @ erf, maps["input"].flatten(), atol=1e-10), "I3"
    for row, column in itertools.product(range(h), range(w)):
        assert torch.allclose(srd.erf(x, "r3", (row, column)).flatten(), erf[row * w + column], atol=1e-10)


def test_bias_free_ratios_equal_autograd_jacobians():
    """I7: without biases the sharing ratio is ``<J_{ji} x_i, v_j> / ||v_j||^2`` with the network's own Jacobian."""
    net, x = tiny(3, bias=False)
    srd = build("srd", Explanandum(net, 3, mean=0.0, std=1.0))
    scale = (net.b1.weight / (net.b1.running_var + net.b1.eps).sqrt()).view(1, 3, 1, 1)
    jacobian = torch.autograd.functional.jacobian(lambda u: net.c1(u) * scale, x)
    v = net.b1(net.c1(x))
    explicit = mu(jacobian.reshape(v.numel(), -1), x, v)
    for j in range(v[0, 0].numel()):
        row, column = divmod(j, v.shape[-1])
        assert torch.allclose(srd.erf(x, "r1", (row, column)).flatten(), explicit[j], atol=1e-10)
