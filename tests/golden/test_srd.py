"""SRD against the golden cases: maps, intermediates, sharing sums and leaks at every node, ERFs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from explainer import Explanandum
from explainer.baselines import build
from explainer.baselines.kernels.srd_graph import record
from explainer.baselines.kernels.srd_sweep import class_maps
from tests.golden.cases import load_srd

CASES = [
    "srd_vgg_mlp.npz",
    "srd_resnet_basic.npz",
    "srd_resnet_bottleneck.npz",
    "srd_misc_leaky.npz",
    "srd_vgg_ones.npz",
    "srd_vgg_sameclass.npz",
    "srd_vgg_nobias.npz",
    "srd_vgg_zeropatch.npz",
    "srd_tiny_paths.npz",
]
DTYPES = [torch.float64, torch.float32]


def make(file, dtype, **options):
    arch, arrays, net = load_srd(file)
    explanandum = Explanandum(net.to(dtype), arrays["logits"].shape[1], mean=0.0, std=1.0)
    start = "constant" if file == "srd_vgg_ones.npz" else "paper"
    return arch, arrays, build("srd", explanandum, start=start, **options), torch.tensor(arrays["x"], dtype=dtype)


def close(actual, expected, dtype):
    expected = np.asarray(expected)
    top = np.abs(expected).max()
    tolerance = 1e-9 * max(1.0, top) if dtype == torch.float64 else 1e-3 * top + 1e-7
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", CASES)
def test_every_node_of_both_classes(file, dtype):
    _, arrays, srd, x = make(file, dtype)
    for t in (0, 1):
        prefix = f"R.{t}."
        expected = {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}
        assert len(expected) >= 3
        maps = srd.relevance(x, torch.tensor(arrays["classes"][:, t]), list(expected))
        for name, value in expected.items():
            close(maps[name], value, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", CASES)
def test_saliency_from_one_forward(file, dtype):
    _, arrays, srd, x = make(file, dtype)
    for t in (0, 1):
        close(srd(x, torch.tensor(arrays["classes"][:, t])), arrays[f"sal.{t}"], dtype)
    if len(x) == 1:
        both = srd.all_classes(x, [int(k) for k in arrays["classes"][0]])
        close(both, np.stack([arrays["sal.0"], arrays["sal.1"]], 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", CASES)
def test_class_maps_encoder_and_logits(file, dtype):
    arch, arrays, srd, x = make(file, dtype)
    graph = record(srd.explanandum, x)
    encoder = graph.encoder_output()
    assert graph.name(encoder) == arch["encoder_out"], "the encoder output was not found"
    close(graph.logits.detach(), arrays["logits"], dtype)
    close(graph.nodes[encoder].out.detach(), arrays["A"], dtype)
    for k in range(srd.num_classes):
        one = torch.zeros_like(graph.logits)
        one[:, k] = 1
        close(class_maps(graph, encoder, one).detach(), arrays["phi"][:, k], dtype)
    by_path = build("srd", srd.explanandum, encoder_output=arch["encoder_out"], start=srd.start)
    index = torch.tensor(arrays["classes"][:, 0])
    assert torch.equal(by_path(x, index), srd(x, index))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", CASES)
def test_shares_leaks_and_receptive_field(file, dtype):
    arch, arrays, srd, x = make(file, dtype)
    for t in (0, 1):
        account = srd.account(x, torch.tensor(arrays["classes"][:, t]))
        targets = [key.split(".", 2)[2] for key in arrays if key.startswith(f"leak.{t}.")]
        assert set(targets) == set(account.leak)
        scale = np.abs(arrays[f"R.{t}.input"]).sum()
        for name in targets:
            close(account.mu_sum[name], arrays[f"musum.{name}"], dtype)
            atol = 1e-9 if dtype == torch.float64 else 1e-5
            np.testing.assert_allclose(account.leak[name].numpy(), arrays[f"leak.{t}.{name}"], rtol=0, atol=atol * max(1, scale))
    height, width = arrays["A"].shape[-2:]
    close(srd.erf(x, arch["encoder_out"], (height // 2, width // 2)), arrays["erf_center"], dtype)
