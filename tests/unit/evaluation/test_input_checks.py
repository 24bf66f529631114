"""Constant shift and data randomisation: which methods must pass, and what is done to the classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from explainer.baselines import build
from explainer.data.contract import collate
from explainer.data.datamodule import DataModule
from explainer.data.permuting import labels_of, permuted
from explainer.errors import ConfigError, UnsupportedLayerError
from explainer.evaluation.protocols.constant_shift import ConstantShift
from explainer.evaluation.protocols.data_randomization import DataRandomization
from explainer.evaluation.results import Row
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.evaluation.shift import first_convolution, shifted
from explainer.models.explanandum import Explanandum
from tests.unit.evaluation.factories import NAMES, data


def network(padding: int = 1, bias: bool = True, seed: int = 0) -> Explanandum:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=padding, bias=bias),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    return Explanandum(net, 3, "multilabel", class_names=NAMES, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def scene_of(model: Any) -> Scene:
    dataset = data().dataset("test")
    return Scene(collate([dataset[i] for i in range(3)]), [0, 1, 2], model, dataset=dataset)


def maps_of(name: str, scene: Scene, **options: Any) -> Maps:
    attributor = build(name, scene.explanandum, **options)
    raw = attributor.all_classes(scene.images)
    return Maps(Method(name, attributor, {"name": name}), scene, raw)


@pytest.mark.parametrize(("padding", "bias"), [(1, True), (0, True), (2, False)])
def test_the_shifted_classifier_is_given_other_numbers_and_answers_the_same(padding, bias):
    model, images = network(padding, bias), torch.rand(2, 3, 12, 10)
    assert first_convolution(model, images) == "0"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shift = torch.tensor([0.5, -1.0, 2.0])
    twin = shifted(build("gradient", model), images, shift).explanandum
    torch.testing.assert_close(twin.normalize(images), model.normalize(images) + shift.view(1, -1, 1, 1))
    torch.testing.assert_close(twin(images), model(images), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items()) and isinstance(model.classifier[0], nn.Conv2d)


def test_a_classifier_without_a_first_convolution_is_refused():
    model = Explanandum(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), 3)
    with pytest.raises(UnsupportedLayerError, match="no convolution"):
        shifted(build("gradient", model), torch.rand(1, 3, 4, 4), torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "options", "same"),
    [
        ("gradient", {}, True),
        ("guided_backprop", {}, True),
        ("grad_cam", {"layer": "3"}, True),
        ("norm_grad", {"layer": "3"}, True),
        ("srd", {"resolution": "3", "encoder_output": "3"}, True),
        ("linear_approx", {}, False),  # the normalised image times the gradient
        ("integrated_gradients", {"baseline": "mean", "steps": 6}, False),
        ("lrp", {}, False),
    ],
)
def test_what_is_invariant(name, options, same):
    scene = scene_of(network())
    protocol = ConstantShift()
    found = protocol.score(scene, maps_of(name, scene, **options))
    values = [s.values["spearman"] for s in found]
    assert len(found[0].vectors["spearman"]) == 3
    if same:
        assert min(values) > 0.99 and max(s.values["difference"] for s in found) < 1e-2
    else:
        assert sum(values) / len(values) < 0.99
    rows = [s.labelled(name, "raw", "constant_shift", scene) for s in found]
    assert protocol.verdicts(rows)[0].passed is same


def test_permuted_labels_are_the_same_labels_on_other_images():
    plain = DataModule("shapes", 4, options={"size": 32, "length": 40})
    other = DataModule("shapes", 4, options={"size": 32, "length": 40}, permute_labels=3)
    labels = labels_of(plain.dataset("train"))
    moved = permuted(labels, 3)
    assert sorted(moved) == sorted(labels) and moved != labels and permuted(labels, 3) == moved != permuted(labels, 4)
    other.setup("fit")
    served = {i: t.nonzero()[:, 0].tolist() for b in other.train_dataloader() for i, t in zip(b.ids, b.targets, strict=True)}
    numbers = {other.dataset("train").sample_id(i): i for i in range(40)}
    assert all(tuple(t) == moved[numbers[i]] for i, t in served.items())
    (batch, *_) = other.val_dataloader()
    assert batch.targets[0].nonzero()[:, 0].tolist() == list(labels_of(other.dataset("val"))[0])  # validation keeps its labels


def test_copies_of_an_image_are_augmented_each_by_itself():
    options = {"size": 32, "length": 12}
    module = DataModule("shapes", 3, options=options, copies=2)
    module.setup("fit")
    keys = list(module.train_dataloader().batch_sampler)
    for batch in keys:
        assert len(batch) == 6 and all(a[1] == b[1] and a[0] != b[0] for a, b in zip(batch[::2], batch[1::2], strict=True))
    assert sorted(index for batch in keys for _, index in batch) == sorted(2 * list(range(12)))
    single = DataModule("shapes", 3, options=options)
    single.setup("fit")
    assert [[k[1] for k in batch[::2]] for batch in keys] == [[k[1] for k in batch] for batch in single.train_dataloader().batch_sampler]


def test_maps_of_the_network_that_learned_by_heart_are_compared(tmp_path, monkeypatch):
    model, other = network(seed=0), network(seed=1)
    scene = scene_of(model)
    protocol = DataRandomization(checkpoint="other.ckpt", permute_labels=5)
    monkeypatch.setattr("explainer.evaluation.protocols.data_randomization.load_explanandum", lambda _: other)
    maps = maps_of("gradient", scene)
    found = protocol.score(scene, maps)
    rows, classes = scene.pairs
    theirs = build("gradient", other)(scene.images[rows], classes)
    from explainer.metrics.map_similarity import map_spearman

    assert [s.values["spearman"] for s in found] == pytest.approx(map_spearman(maps.saliency(rows, classes), theirs).tolist(), abs=1e-6)
    target = torch.zeros(3, 3)
    for b, own in enumerate(permuted(labels_of(scene.dataset), 5)[:3]):
        target[b, list(own)] = 1
    known = ((other(scene.images) >= 0) == target.bool()).double().mean(1)[rows]
    assert [s.values["known"] for s in found] == pytest.approx(known.tolist())
    assert torch.equal(model.classifier[0].weight, network(seed=0).classifier[0].weight)
    with pytest.raises(ConfigError, match="checkpoint names the classifier"):
        DataRandomization().score(scene, maps)
    small = Explanandum(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3)
    monkeypatch.setattr("explainer.evaluation.protocols.data_randomization.load_explanandum", lambda _: small)
    with pytest.raises(ConfigError, match="not the evaluated classifier's architecture"):
        DataRandomization(checkpoint="x").score(scene, maps)


@pytest.mark.parametrize(("known", "spearman", "passed"), [(0.5, 0.1, None), (1.0, 0.1, True), (1.0, 0.8, False)])
def test_nothing_is_decided_unless_the_permuted_labels_are_known(known, spearman, passed):
    values = {"known": known, "spearman": spearman, "ssim": 0.1}
    rows = [Row("m", "raw", "data_randomization", str(i), i, 0, values, {}) for i in range(4)]
    (verdict,) = DataRandomization().verdicts(rows)
    assert verdict.passed is passed


def test_predicted_targets_still_work_with_copies():
    module = DataModule("shapes", 3, options={"size": 32, "length": 6}, copies=3)
    module.set_targets("train", [(0,)] * 6)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    assert len(batch) == 9 and batch.targets[:, 0].eq(1).all()
    assert replace(batch).epochs != ()
