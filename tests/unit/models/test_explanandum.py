import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import explainer
from explainer.baselines import build
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


def test_the_users_model_is_left_as_it_was_and_runs_in_eval():
    net = classifier()
    net[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    x = torch.rand(4, 3, 8, 8)
    expected = copy.deepcopy(net).eval()(x)
    e = explainer.Explanandum(net, 5, mean=0.0, std=1.0)
    assert net.training and [p.requires_grad for p in net.parameters()] == flags, "wrapping changes nothing"
    buffers = copy.deepcopy(dict(net.named_buffers()))
    net.train()
    torch.testing.assert_close(e(x), expected)
    image = x.clone().requires_grad_()
    e(image).sum().backward()
    assert image.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters())
    assert all(m.training for m in net.modules()) and [p.requires_grad for p in net.parameters()] == flags
    assert all(torch.equal(buffers[k], v) for k, v in net.named_buffers()), "no drift of BatchNorm's statistics"
    loss = net(x).sum()
    loss.backward()
    assert net[1].weight.grad is not None, "its user can still train it"


def test_an_exception_leaves_modes_and_flags():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            raise KeyboardInterrupt

    net = Broken()
    with pytest.raises(KeyboardInterrupt):
        explainer.Explanandum(net, 2, mean=0.0, std=1.0)(torch.rand(1, 3, 2, 2))
    assert net.training and net.layer.training and net.layer.weight.requires_grad


def test_copies_and_pickles():
    e = explainer.Explanandum(classifier(), 5)
    x = torch.rand(1, 3, 8, 8)
    for again in (copy.deepcopy(e), pickle.loads(pickle.dumps(e))):
        assert torch.equal(again(x), e(x)) and again.turn is not e.turn


def test_two_threads_give_what_one_gives():
    net = classifier()
    e = explainer.Explanandum(net, 5, mean=0.0, std=1.0)
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    methods = [build("grad_cam", e), build("gradient", e), build("hires_cam", e, layer="0")]
    expected = [[m(x[None], k % 5) for k, x in enumerate(images)] for m in methods]
    with ThreadPoolExecutor(6) as pool:
        jobs = [[pool.submit(m, x[None], k % 5) for k, x in enumerate(images)] for m in methods]
        logits = list(pool.map(lambda x: e(x[None]), images))
        found = [[job.result() for job in row] for row in jobs]
    for row, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(row, wanted, strict=True))
    assert all(torch.equal(a, e(x[None])) for a, x in zip(logits, images, strict=True))
    assert all(m.training for m in net.modules()) and all(p.requires_grad for p in net.parameters())


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
    with pytest.raises(ShapeError, match=r"floating point in \[0,1\], received torch\.uint8: divide images"):
        explainer.Explanandum(classifier(), 5)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_what_cannot_be_a_classifier_or_its_images_is_said():
    net = classifier().eval()
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, received function.*BlackBox"):
        explainer.Explanandum(lambda x: x, 5)
    with pytest.raises(ConfigError, match="different names"):
        explainer.Explanandum(net, 5, class_names=["a", "b", "c", "a", "d"])
    with pytest.raises(ConfigError, match=r"divide those of images in 0\.\.255 by 255"):
        explainer.Explanandum(net, 5, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    for size in (-3, 0, 1.5, True):
        with pytest.raises(ConfigError, match="input_size must be a whole number of pixels"):
            explainer.Explanandum(net, 5, input_size=size)
    with pytest.raises(ShapeError, match=r"add the batch axis \(image\[None\]\)"):
        explainer.Explanandum(net, 5)(torch.rand(3, 8, 8))
