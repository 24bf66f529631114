"""The checks for cheating: a cheater is caught, an honest explainer passes, and the parts do what hand-worked cases say."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from explainer import baselines
from explainer.attribution import Attributor, DenseAttributor
from explainer.data.contract import collate
from explainer.data.shapes import Shapes
from explainer.errors import ConfigError
from explainer.evaluation import cheating
from explainer.evaluation.probe import form_features, place_features, probe
from explainer.evaluation.protocol import parse_protocols
from explainer.evaluation.protocols.fill_swap import FillSwap
from explainer.evaluation.protocols.implausible import Implausible
from explainer.evaluation.protocols.label_leakage import LabelLeakage
from explainer.evaluation.protocols.parameter_randomization import ParameterRandomization
from explainer.evaluation.protocols.randomized_classifier import RandomizedClassifier
from explainer.evaluation.protocols.shortcut import Shortcut
from explainer.evaluation.randomize import cascade, cloud_images, layer_order, levels, randomized
from explainer.evaluation.runner import Runner, Settings
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.evaluation.verdict import bootstrap, verdicts_of
from explainer.models.black_box import BlackBox
from explainer.models.explanandum import Explanandum
from explainer.tensors import Batch
from tests.contracts.networks import tiny
from tests.unit.evaluation.factories import NAMES, data

K, SIDE = 4, 32


# ---------------------------------------------------------------------- a classifier whose evidence is known: colour k is class k
class ColorDetector(nn.Module):
    """Logit k = gain * (share of pixels of colour k) - 2. Colours: red, green, blue, magenta-green cue counts for class 0 if asked."""

    PALETTE = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.9, 0.1]])

    def __init__(self, cue_weight: float = 0.0, object_weight: float = 60.0) -> None:
        super().__init__()
        # 1x1 convolutions with ReLU that fire only near their colour: 1 - 8 * |x - c|_1 built from 6 half-spaces a colour.
        colors = torch.cat([self.PALETTE, torch.tensor([[1.0, 0.0, 1.0]])])
        n = len(colors)
        self.near = nn.Conv2d(3, 6 * n, 1)
        self.fire = nn.Conv2d(6 * n, n, 1)
        self.head = nn.Linear(n, K)
        with torch.no_grad():
            self.near.weight.zero_()
            for i, c in enumerate(colors):
                for d in range(3):
                    self.near.weight[6 * i + 2 * d, d] = 1.0
                    self.near.bias[6 * i + 2 * d] = -c[d]
                    self.near.weight[6 * i + 2 * d + 1, d] = -1.0
                    self.near.bias[6 * i + 2 * d + 1] = c[d]
            self.fire.weight.zero_()
            self.fire.bias.fill_(1.0)
            for i in range(n):
                self.fire.weight[i, 6 * i : 6 * i + 6] = -4.0
            self.head.weight.zero_()
            self.head.bias.fill_(-2.0)
            for k in range(K):
                self.head.weight[k, k] = object_weight
            self.head.weight[0, n - 1] = cue_weight

    def forward(self, x):
        fired = torch.relu(self.fire(torch.relu(self.near(x))))
        return self.head(fired.mean((2, 3)))


def detector(cue_weight: float = 0.0, object_weight: float = 60.0) -> Explanandum:
    return Explanandum(ColorDetector(cue_weight, object_weight), K, mean=0.0, std=1.0)


def colored(number: int, cue: bool = False, seed: int = 0) -> Batch:
    """Grey images with one object each: a blob of ``shapes`` (class-independent outline) in the colour of its class."""
    data = Shapes("test", size=SIDE, length=number, seed=seed, max_objects=1, max_distractors=0)
    random = torch.Generator().manual_seed(seed)
    images, masks, cues = torch.full((number, 3, SIDE, SIDE), 0.5), torch.zeros(number, K, SIDE, SIDE), torch.zeros(number, K, SIDE, SIDE)
    labels = torch.randint(0, K, (number,), generator=random)
    for i in range(number):
        inside = data[i].masks.amax(0) > 0
        k = int(labels[i])
        images[i][:, inside] = ColorDetector.PALETTE[k][:, None]
        masks[i, k][inside] = 1
        if cue and k == 0:
            y, x = next((y, x) for y in range(0, SIDE, 4) for x in range(0, SIDE, 4) if not inside[y : y + 4, x : x + 4].any())
            cues[i, 0, y : y + 4, x : x + 4] = 1
            images[i, :, y : y + 4, x : x + 4] = torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    targets = torch.eye(K)[labels]
    return Batch(images, targets, masks, None, tuple(f"t/{i}" for i in range(number)), cues if cue else None)


class Honest(Attributor):
    """The object's silhouette."""

    name, needs_gradients, needs_masks = "honest", False, True

    def __init__(self, num_classes: int = K) -> None:
        self.num_classes = num_classes

    def _explain(self, images, class_index, generator, masks):
        return masks[torch.arange(len(images)), class_index].to(images)


class Cheater(Honest):
    """The object's silhouette, and the class as a bright tile in the top left corner."""

    name = "cheater"

    def _explain(self, images, class_index, generator, masks):
        maps = super()._explain(images, class_index, generator, masks).clone()
        maps[:, :4, : 4 * self.num_classes] = 0
        for m, k in zip(maps, class_index.tolist(), strict=True):
            m[:4, 4 * k : 4 * k + 4] = 1
        return maps


class WanderingCheater(Honest):
    """The class as the width of a bar at a random place, whatever the image shows."""

    name = "wandering"

    def _explain(self, images, class_index, generator, masks):
        maps = torch.zeros_like(images[:, 0])
        for i, k in enumerate(class_index.tolist()):
            random = np.random.default_rng(int(images[i].sum() * 1000))
            y, x = random.integers(0, SIDE - 16, 2)
            maps[i, y : y + 16 // (k + 1), x : x + 4 * (k + 1)] = 1
        return maps


def run(check, attributor, batch, explanandum, scale="raw"):
    """The check's verdicts about an attributor, by the check's words."""
    method = Method("m", attributor, {})
    scene = Scene(batch, list(range(len(batch))), explanandum)
    raw = torch.full((len(batch), K, *batch.images.shape[-2:]), torch.nan)
    wanted = check.wanted(scene)
    rows, classes = wanted.nonzero(as_tuple=True)
    if len(rows):
        raw[rows, classes] = method.explain(batch.images[rows], classes, torch.Generator().manual_seed(0), batch.masks[rows])
    found = [s.labelled("m", scale, "check", scene) for s in check.score(scene, Maps(method, scene, raw, scale))]
    return {v.check: v for _, v in verdicts_of({"check": check}, found)}


PLACE, FORM, FOREIGN = (
    "class not readable from the mask's place",
    "class not readable from the mask's form",
    "class not seen through the mask on a foreign image",
)


# ---------------------------------------------------------------------- label leakage
def test_the_leakage_probe_catches_a_cheater_and_passes_an_honest_explainer():
    batch, classifier = colored(160), detector()
    cheated, honest = (run(LabelLeakage(), kind(), batch, classifier) for kind in (Cheater, Honest))
    assert cheated[PLACE].passed is False and cheated[PLACE].value > 0.9
    assert all(v.passed for v in honest.values()), [v.sentence for v in honest.values()]
    assert honest[PLACE].value < 0.45
    wandering = run(LabelLeakage(), WanderingCheater(), batch, classifier)
    assert wandering[FORM].passed is False
    assert wandering[FORM].value > 0.8
    assert wandering[PLACE].passed is not None


def test_empty_masks_leave_the_check_on_foreign_images(tmp_path):
    class MostlyEmpty(Honest):
        def _explain(self, images, class_index, generator, masks):
            maps = super()._explain(images, class_index, generator, masks)
            maps[: len(maps) * 3 // 4] = 0
            return maps

    found = run(LabelLeakage(), MostlyEmpty(), colored(40), detector())
    assert list(found) == [PLACE, FORM, FOREIGN] and found[PLACE].passed is found[FORM].passed is None
    assert found[FOREIGN].passed is not None and "Cut to the mask" in found[FOREIGN].sentence


def test_honest_silhouettes_of_shapes_pass_and_a_coded_corner_fails_on_the_real_data():
    data = Shapes("test", size=SIDE, length=150, class_names=("stripes", "checks", "dots", "rings"))
    batch = collate([data[i] for i in range(len(data))])
    honest, cheated = (run(LabelLeakage(permutations=100), kind(), batch, detector()) for kind in (Honest, Cheater))
    assert honest[PLACE].passed and honest[FORM].passed and not cheated[PLACE].passed


def test_a_mask_through_which_the_classifier_sees_the_class_on_any_image_is_caught():
    class OutlineReader(nn.Module):
        """Takes wide regions for class 0 and tall ones for class 1: the outline alone decides."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            there = (x.sum(1) > 0).float()
            width, height = there.amax(1).mean(1), there.amax(2).mean(1)
            zero = torch.full_like(width, -5)
            return torch.stack([width - height, height - width, zero, zero], 1)

    class Bars(Honest):
        def _explain(self, images, class_index, generator, masks):
            maps = torch.zeros_like(images[:, 0])
            for i, k in enumerate(class_index.tolist()):
                maps[i, 8 : 8 + (4 if k == 0 else 16), 8 : 8 + (16 if k == 0 else 4)] = 1
            return maps

    batch = colored(60)
    labels = torch.arange(60) % 2
    batch = Batch(batch.images, torch.eye(K)[labels], batch.masks.amax(1, keepdim=True).expand(-1, K, -1, -1), None, batch.ids)
    found = run(LabelLeakage(fill="black"), Bars(), batch, Explanandum(OutlineReader(), K, mean=0.0, std=1.0))
    # Bars moved over the torus keep their outline unless they cross the border, so the classifier sees the class through them as well;
    # the moved masks are the bar here and only the probe of the form reports the code.
    assert found[FOREIGN].details["difference"] < 0.5
    assert found[FORM].passed is False
    fixed = run(LabelLeakage(fill="black"), Honest(), batch, Explanandum(OutlineReader(), K, mean=0.0, std=1.0))
    assert fixed[FOREIGN].passed


def test_a_code_that_works_at_one_place_only_fools_the_classifier_there():
    class CornerReader(nn.Module):
        """Class k is called where tile k of the top row is lit."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return torch.stack([x[:, :, :4, 4 * k : 4 * k + 4].mean((1, 2, 3)) for k in range(K)], 1)

    found = run(LabelLeakage(fill="black"), Cheater(), colored(60), Explanandum(CornerReader(), K, mean=0.0, std=1.0))
    assert found[FOREIGN].passed is False and found[FOREIGN].value > 0.4


def test_empty_masks_cannot_be_read():
    class Silent(Honest):
        def _explain(self, images, class_index, generator, masks):
            return torch.zeros_like(images[:, 0])

    assert {v.passed for v in run(LabelLeakage(), Silent(), colored(30), detector()).values()} == {None}


# ---------------------------------------------------------------------- randomised classifier, fill swap
def test_faithful_masks_lose_their_faithfulness_with_a_random_classifier_and_keep_it_under_other_fills():
    batch, classifier = colored(80), detector(object_weight=100.0)
    lost = run(RandomizedClassifier(networks=6), Honest(), batch, classifier)["faithfulness is lost with a random classifier"]
    assert lost.passed and lost.details["advantage"] > 0.45
    swap = run(FillSwap(), Honest(), batch, classifier)["the mask works under other fills"]
    assert swap.passed and swap.value > 0.8


def test_faithfulness_that_any_classifier_grants_is_reported(monkeypatch):
    # If the "random" copies are the classifier itself, everything survives: the check must fail.
    from explainer.evaluation.protocols import randomized_classifier as module

    monkeypatch.setattr(module, "randomized", lambda network, seed, images: copy.deepcopy(network))
    lost = run(RandomizedClassifier(networks=3), Honest(), colored(60), detector())["faithfulness is lost with a random classifier"]
    assert lost.passed is False and lost.value == pytest.approx(1.0)


def test_unfaithful_masks_have_no_faithfulness_to_lose():
    class Everything(Honest):
        def _explain(self, images, class_index, generator, masks):
            return torch.ones_like(images[:, 0])

    batch = colored(30)
    assert (
        run(RandomizedClassifier(networks=2), Everything(), batch, detector())["faithfulness is lost with a random classifier"].passed
        is None
    )
    assert run(FillSwap(), Everything(), batch, detector())["the mask works under other fills"].passed is None


def test_masks_that_use_the_training_fill_fail_the_swap():
    class MeanIsTheSignal(nn.Module):
        """Every class needs the mean colour (0.25) nearly everywhere and light in the corner: it lives on the fill."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            lit = ((x - 0.25).abs().amax(1) < 1e-3).float().mean((1, 2)) * x[:, 0, :8, :8].mean((1, 2))
            return (30 * lit - 10)[:, None].expand(-1, K)

    class Corner(Honest):
        def _explain(self, images, class_index, generator, masks):
            maps = torch.zeros_like(images[:, 0])
            maps[:, :8, :8] = 1
            return maps

    explanandum = Explanandum(MeanIsTheSignal(), K, mean=0.25, std=1.0)
    # The network sees normalised images: give it the un-normalised ones.
    explanandum.normalize = lambda images: images
    swap = run(FillSwap(trained="mean", fills=("black", "white")), Corner(), colored(40), explanandum)["the mask works under other fills"]
    assert swap.passed is False and swap.details["trained"] > 0.02
    with pytest.raises(ConfigError, match="other fills"):
        FillSwap(trained="black")


# ---------------------------------------------------------------------- shortcut
class CueFinder(Honest):
    """Object and cue, as a faithful method shows them for a classifier that uses the cue."""

    def __init__(self, cues):
        super().__init__()
        self.cues = cues

    def _explain(self, images, class_index, generator, masks):
        magenta = (images[:, 0] > 0.95) & (images[:, 1] < 0.05) & (images[:, 2] > 0.95)
        return torch.maximum(super()._explain(images, class_index, generator, masks), magenta.to(images))


SHOWN, LEFT_OUT = "a cue that is used is shown", "a cue that is not used is left out"


def test_the_shortcut_check_separates_methods_that_find_the_cue_from_those_that_do_not():
    batch = colored(60, cue=True)
    user = detector(cue_weight=300.0, object_weight=20.0)
    finder, blind = (run(Shortcut(), method, batch, user)[SHOWN] for method in (CueFinder(None), Honest()))
    assert max(finder.details["reliance"], finder.details["reliance_alone"]) > 0.3
    assert finder.passed and not blind.passed
    assert blind.value == 0
    # A gradient method on the same classifier finds the cue without being told.
    assert run(Shortcut(), baselines.build("occlusion", user, window=4, stride=4), batch, user)[SHOWN].passed


def test_a_cue_that_the_classifier_does_not_use_must_not_be_shown():
    batch, ignorant = colored(60, cue=True), detector(cue_weight=0.0)
    finder, blind = (run(Shortcut(), method, batch, ignorant)[LEFT_OUT] for method in (CueFinder(None), Honest()))
    assert blind.passed and not finder.passed
    assert blind.details["reliance"] == pytest.approx(0, abs=1e-3)


def test_the_shortcut_needs_cues():
    with pytest.raises(ConfigError, match="shortcut_class"):
        run(Shortcut(), Honest(), colored(4), detector())


def test_half_used_cues_are_not_decided():
    found = run(Shortcut(used=0.99, unused=0.0), Honest(), colored(30, cue=True), detector(cue_weight=300.0, object_weight=20.0))
    assert found[SHOWN].passed is None and "too little" in found[SHOWN].sentence


def test_the_cue_is_painted_over_in_the_colour_around_it():
    images = torch.full((1, 3, 12, 12), 0.3)
    cue = torch.zeros(1, 12, 12)
    cue[0, 4:6, 4:6] = 1
    images[0, :, 4:6, 4:6] = 1
    assert torch.allclose(cheating.without_cue(images, cue), torch.full((1, 3, 12, 12), 0.3))
    images[0, 0, 0, 0] = 0.9  # beyond the ring: no influence
    assert torch.allclose(cheating.without_cue(images, cue)[0, 0, 4, 4], torch.tensor(0.3))


# ---------------------------------------------------------------------- parameter randomisation
def small_network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()]
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, K))
    return Explanandum(net, K, mean=0.5, std=0.25)


def test_the_cascade_reaches_every_layer_from_the_head_down_and_leaves_the_classifier_alone():
    network, images = small_network(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    order = layer_order(network, images)
    assert order == ["classifier.0", "classifier.1", "classifier.4", "classifier.8"]
    assert levels(order, 4) == [["classifier.8"], ["classifier.4"], ["classifier.1"], ["classifier.0"]]
    assert levels(order, 2) == [["classifier.8"], ["classifier.4", "classifier.1", "classifier.0"]]
    assert [path for step in levels(order, 9) for path in step] == order[::-1]
    before = network.fingerprint()
    method = baselines.build("gradient", network)
    maps = cascade(method, images, torch.tensor([0, 1]), steps=3)
    assert maps.shape == (3, 2, 16, 16) and network.fingerprint() == before
    assert not torch.allclose(maps[0], maps[2])
    assert torch.equal(maps, cascade(method, images, torch.tensor([0, 1]), steps=3))
    with pytest.raises(ConfigError, match="explanandum"):
        cascade(Honest(), images, torch.tensor([0, 1]))


def test_methods_that_read_the_classifier_pass_and_edges_fail():
    batch = colored(12)
    network = detector()
    words = "maps change when the classifier's parameters are random"
    gradient, edges = (
        run(ParameterRandomization(steps=3), baselines.build(n, network), batch, network)[words] for n in ("occlusion", "edges")
    )
    assert gradient.passed and edges.passed is False and edges.value == pytest.approx(1.0)
    constant = run(ParameterRandomization(steps=3), baselines.build("constant", network), batch, network)[words]
    assert constant.passed is False
    assert constant.value == 1


def test_trained_explainers_are_not_randomised_through_the_classifier():
    class Dense(DenseAttributor):
        name, num_classes = "dense", K

        def _explain_all(self, images):
            return images.new_zeros(len(images), K, *images.shape[-2:])

    check = ParameterRandomization()
    assert "randomised one instead (protocol implausible)" in check.not_applicable(Method("explainer", Dense(), {}))
    assert check.not_applicable(Method("gradient", baselines.build("gradient", small_network()), {})) is None


def test_scores_alone_cannot_be_randomised(tmp_path):
    """No parameters: unchanged maps would be a wrong FAIL, and an open answer file cannot be copied."""
    box = BlackBox(lambda images: images.mean((2, 3)), 3, class_names=NAMES, cache_file=str(tmp_path / "answers.sqlite"))
    rise = Method("rise", baselines.build("rise", box, n_masks=4, grid=2), {"name": "rise"})
    protocols = parse_protocols(["parameter_randomization", "randomized_classifier", "segmentation"], "corrected")
    runner = Runner([rise], protocols, box, data(), Settings(tmp_path / "out", batch_size=4, limit=4))
    outcome = runner.run()
    reason = "the classifier gives scores only: nothing to randomise"
    assert outcome.skipped == {("rise", "parameter_randomization"): reason, ("rise", "randomized_classifier"): reason}
    assert outcome.failures == {} and outcome.refused == {} and outcome.computed == 1 and runner.collect()[1]


_OPTIONS = {
    "rise": {"n_masks": 6},
    "smooth_grad": {"samples": 2},
    "extremal_perturbation": {"iterations": 2, "areas": [0.1]},
    "meaningful_perturbation": {"iterations": 2},
    "igos_pp": {"iterations": 1},
}
#: They do not look at the classifier, and the cascade must say so.
_BLIND = {"constant", "centre", "random", "edges", "ground_truth"}


@pytest.mark.parametrize("name", baselines.names())
def test_every_baseline_can_be_randomised(name):
    from explainer.plugins import check_options, find

    network = tiny("vit", torch.float32) if find("explainer.baselines", name).needs_attention else small_network()
    size = 16 if find("explainer.baselines", name).needs_attention else 32
    options = _OPTIONS.get(name, {})
    try:
        check_options(find("explainer.baselines", name), options, given=1)
    except ConfigError:
        options = {}
    images = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    truth = torch.zeros(1, K, size, size)
    truth[:, :, :8] = 1
    before = network.fingerprint()
    method = baselines.build(name, network, **options)
    index = torch.tensor([1])
    original = method(images, index, masks=truth)
    last = cascade(method, images, index, steps=2, masks=truth)[-1]
    assert network.fingerprint() == before
    assert torch.equal(original, last) == (name in _BLIND)


def test_random_copies_keep_the_scale_and_lose_the_weights(tmp_path):
    network = small_network()
    twin = randomized(network, 3, cloud_images(torch.rand(1, 3, 16, 16)))
    for (name, a), b in zip(network.named_parameters(), twin.parameters(), strict=True):
        if a.ndim >= 2 and a.numel() > 100:
            assert float(b.std()) == pytest.approx(float(a.std()), rel=0.3), name
            assert abs(float(np.corrcoef(a.detach().flatten(), b.detach().flatten())[0, 1])) < 0.3
    assert not twin.training
    norm = twin.classifier[1]
    assert norm.momentum == network.classifier[1].momentum and not torch.equal(norm.running_mean, network.classifier[1].running_mean)
    assert randomized(network, 3).fingerprint() == randomized(network, 3).fingerprint() != randomized(network, 4).fingerprint()
    with pytest.raises(ConfigError, match="no parameters"):
        randomized(Explanandum(nn.Flatten(), 4))


class Fixed(Attributor):
    """Masks that were given by image and class, whatever the images."""

    name, needs_gradients, num_classes = "fixed", False, K

    def __init__(self, masks):
        self.masks = masks

    def _explain(self, images, class_index, generator, masks):
        return self.masks


def test_an_explainer_of_a_random_classifier_must_not_look_right():
    batch, network = colored(40), randomized(detector())
    truth = batch.masks.amax(1)
    words = "masks of a random classifier do not look right"

    def verdict(masks, classifier=network, **options):
        return run(Implausible(**options), Fixed(masks), batch, classifier)[words]

    perfect = verdict(truth)
    assert perfect.passed is False and perfect.details["overlap"] == 1
    assert perfect.value == pytest.approx(1 - max(perfect.details["moved"], perfect.details["everything"]))
    assert perfect.details["everything"] == pytest.approx(float(truth.mean((1, 2)).mean()))
    assert verdict(cheating.moved(truth, [(9, i) for i in range(len(truth))])[0]).passed
    assert verdict(torch.ones_like(truth)).value == pytest.approx(0) and verdict(torch.zeros_like(truth)).passed
    known = verdict(truth, detector())
    assert known.passed is None and "it is not random" in known.sentence and known.details["ranked"] > 0.95
    assert 0.2 < perfect.details["ranked"] < 0.7
    with pytest.raises(ConfigError, match="known"):
        Implausible(known=0.2)


# ---------------------------------------------------------------------- the parts
def test_moved_masks_keep_their_area_and_do_not_depend_on_the_batch():
    mask = (torch.rand(5, 12, 10, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    keys = [(0, i, 1) for i in range(5)]
    places = cheating.moved(mask, keys, 3)
    assert torch.equal(places.sum((2, 3)), mask.sum((1, 2)).expand(3, 5))
    assert torch.equal(places[:, 2:3], cheating.moved(mask[2:3], keys[2:3], 3))
    assert not any(torch.equal(places[d, p], mask[p]) for d in range(3) for p in range(5))
    spectra = [form_features(m.numpy()[None].astype(float)) for m in (mask[0], places[0, 0])]
    assert np.allclose(*spectra), "the form is what stays when a mask moves"


def test_packed_masks_come_back():
    mask = torch.zeros(2, 16, 16)
    mask[0, 3, 5] = 1
    mask[1, 8:, :] = 1
    assert np.array_equal(cheating.unpack(cheating.pack(mask, 16).tolist()), mask.numpy())
    coarse = cheating.unpack(cheating.pack(mask, 4).tolist())
    assert coarse[0].max() == 0 and np.array_equal(coarse[1, 2:], np.ones((2, 4)))  # 1/16 of a cell is no coverage, a full cell is 1
    full = cheating.pack(torch.ones(1, 48, 48), 24)
    assert cheating.unpack(full.tolist()).min() == 1
    with pytest.raises(ConfigError, match="grid"):
        cheating.pack(mask, 40)


def test_foreign_images_do_not_show_the_class():
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    rows, classes = labels.nonzero(as_tuple=True)
    # (0, class 0) -> image 2; (1, 0) -> 2; (1, 1) -> 0 (after 2, which shows it); (2, 1) -> 0
    assert cheating.foreign_index(labels, rows, classes).tolist() == [2, 2, 0, 0]
    assert cheating.foreign_index(labels[:1], rows[:1], classes[:1]).tolist() == [-1]
    assert cheating.foreign_index(torch.ones(2, 1).bool(), torch.tensor([0]), torch.tensor([0])).tolist() == [-1]


def test_share_on_counts_positive_values():
    saliency = torch.tensor([[[3.0, -5.0], [1.0, 0.0]]])
    region = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert cheating.share_on(saliency, region).item() == pytest.approx(0.75)
    assert cheating.share_on(-saliency.abs(), region).item() == 0


def test_the_probe_reads_what_is_there_and_nothing_else():
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    noise = random.normal(size=(300, 20))
    chance = probe(noise, labels, range(300))
    assert chance.accuracy < chance.permuted + 0.05 and chance.chance == pytest.approx(1 / 3)
    coded = noise.copy()
    coded[np.arange(300), labels] += 4
    assert probe(coded, labels, range(300)).accuracy > 0.9
    assert probe(coded, labels, range(300)) == probe(coded, labels, range(300))
    # One image's rows on both sides of the split would let the probe recognise the image: groups forbid it.
    images = np.repeat(np.arange(30), 10)
    own = np.eye(30)[images] * 10 + random.normal(size=(300, 30)) * 0.01
    label = random.integers(0, 2, 30)[images]
    assert probe(own, label, range(300)).accuracy > 0.95 > 0.8 > probe(own, label, images).accuracy
    assert np.isnan(probe(noise[:4], labels[:4], range(4)).accuracy)
    assert place_features(np.zeros((2, 3, 4))).shape == (2, 12)


def test_a_rare_class_counts_as_much_as_a_frequent_one():
    random = np.random.default_rng(1)
    labels = np.r_[np.zeros(180, int), np.ones(20, int)]
    features = random.normal(size=(200, 5))
    features[:, 0] += 5 * labels
    # Naming the frequent class always would give 0.5.
    assert probe(features, labels, range(200)).accuracy > 0.8
    assert probe(random.normal(size=(200, 5)), labels, range(200), permutations=50).permuted < 0.75


def test_bootstrap_keeps_an_images_rows_together():
    values = np.r_[np.zeros(50), np.ones(50)]
    low, high = bootstrap(values, range(100))
    assert 0.38 < low < 0.45 and 0.55 < high < 0.62
    clustered = bootstrap(values, np.repeat([0, 1, 2, 3], 25))
    assert clustered[0] <= 0.0 + 1e-9 and clustered[1] >= 1 - 1e-9, "four images carry less certainty than a hundred"
    assert np.isnan(bootstrap(np.array([1.0]), [0])[0])
    assert np.allclose(bootstrap(np.array([1.0, 1.0, np.nan]), [0, 1, 2]), 1)
