import pytest
import torch
from torch import nn

import explainer
from explainer.errors import ConfigError, FingerprintMismatchError, ShapeError


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def test_normalises_with_its_own_statistics():
    net = classifier().eval()
    e = explainer.Explanandum(net, 5, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    x = torch.rand(2, 3, 8, 8)
    by_hand = torch.stack([(x[:, 0] - 0.1) / 0.5, (x[:, 1] - 0.2) / 1.0, (x[:, 2] - 0.3) / 2.0], dim=1)
    torch.testing.assert_close(e(x), net(by_hand))
    off = explainer.Explanandum(net, 5, mean=0.0, std=1.0)
    torch.testing.assert_close(off(x), net(x))


def test_stays_frozen_in_eval():
    e = explainer.Explanandum(classifier(), 5)
    e.train()
    assert not any(m.training for m in e.modules())
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    e(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert all(p.grad is None for p in e.parameters())


def test_fingerprint_sees_every_weight_and_buffer():
    a, b = explainer.Explanandum(classifier(), 5), explainer.Explanandum(classifier(), 5)
    assert a.fingerprint() == b.fingerprint()
    b.classifier[1].running_mean[2] += 1e-3
    assert a.fingerprint() != b.fingerprint()
    c = explainer.Explanandum(classifier(), 5, std=(0.3, 0.3, 0.3))
    assert c.fingerprint() != a.fingerprint()
    with pytest.raises(FingerprintMismatchError, match=a.fingerprint()):
        a.require_fingerprint(b.fingerprint(), "checkpoint x")


def test_input_size_resizes():
    e = explainer.Explanandum(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2)), 2, input_size=4)
    assert e(torch.rand(3, 3, 9, 13)).shape == (3, 2)


def test_errors():
    with pytest.raises(ConfigError, match="task must be"):
        explainer.Explanandum(classifier(), 5, task="binary")
    with pytest.raises(ConfigError, match="2 entries for num_classes=5"):
        explainer.Explanandum(classifier(), 5, class_names=("a", "b"))
    with pytest.raises(ConfigError, match="std must be positive"):
        explainer.Explanandum(classifier(), 5, std=0.0)
    with pytest.raises(ShapeError, match=r"returned \(1, 5\), expected logits \(B,7\)"):
        explainer.Explanandum(classifier(), 7)(torch.rand(1, 3, 8, 8))
