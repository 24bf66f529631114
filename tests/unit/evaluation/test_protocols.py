"""Protocols: each against its metric or a number worked by hand, and all of them on one tiny scene."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from explainer import plugins
from explainer.data.contract import collate
from explainer.errors import ConfigError, UnsupportedLayerError
from explainer.evaluation.protocol import PACKAGE, build_protocol
from explainer.evaluation.protocols.pointing_game import class_boxes
from explainer.evaluation.scene import Maps, Method, Scene
from explainer.metrics.masking_matrix import MaskingMatrix
from explainer.metrics.monotonicity import monotone_scores
from explainer.models.explanandum import Explanandum
from tests.unit.evaluation.factories import Brightness, Dense, data, explanandum, method

QUICK = {
    "srd_metrics": {"stability_samples": 1, "subsets": 3},
    "manipulation": {"max_iterations": 1},
    "infidelity": {"samples": 2, "sensitivity_samples": 1},
    "insertion_deletion": {"steps": 2},
}


#: They need planted cues, a method that can be rebuilt or classes without a region, and have tests of their own.
APART = {
    "empty_images",
    "label_leakage",
    "parameter_randomization",
    "randomized_classifier",
    "shortcut",
    "constant_shift",
    "data_randomization",
}
NAMES = sorted(set(plugins.discover(PACKAGE)) - APART)


@pytest.fixture(scope="module")
def scene() -> Scene:
    dataset = data().dataset("test")
    return Scene(collate([dataset[i] for i in range(4)]), [0, 1, 2, 3], explanandum(), dataset=dataset)


def dense(scene: Scene, scale: str = "raw") -> Maps:
    return Maps(method("dense", Dense()), scene, scene.images.clone(), scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["paper", "code", "corrected"])
@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_fills_its_columns(scene, name, mode):
    protocol = build_protocol(name, QUICK.get(name), mode)
    maps = dense(scene)
    if name == "manipulation":
        attack = Method("dense", Dense(), {}, differentiable_map=lambda images, k: (images**2)[torch.arange(len(images)), k])
        assert protocol.not_applicable(attack) is None
        maps = Maps(attack, scene, maps.raw)
    found = protocol.score(scene, maps if protocol.uses_maps else None)
    assert found
    for column, described in protocol.columns().items():
        vector = described.counts[0] if described.counts else None
        assert any(vector in s.vectors if vector else (described.value or column) in s.values for s in found), column
    axes = protocol.axes(("a", "b", "c"))
    assert all(len(v) == len(axes[k]) for s in found for k, v in s.vectors.items())
    assert protocol.wanted(scene).shape == (4, 3) and protocol.source
    other = build_protocol(name, QUICK.get(name), "paper" if mode != "paper" else "code")
    assert other.identity() != protocol.identity()


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"time", "manipulation"}))
def test_maps_that_were_not_asked_for_are_not_read(scene, name):
    """The same scores when every class that ``wanted`` leaves out is NaN."""
    protocol = build_protocol(name, QUICK.get(name), "corrected")
    full = dense(scene)
    sparse = Maps(full.method, scene, full.raw.masked_fill(~protocol.wanted(scene)[:, :, None, None], torch.nan))
    for a, b in zip(protocol.score(scene, full), protocol.score(scene, sparse), strict=True):
        assert a.values == pytest.approx(b.values, nan_ok=True)


def small_scene(void: bool) -> tuple[Scene, Maps]:
    """Two pixels wide: class 0 fills the left column, the top right pixel is void; the mask is 1 left, 0.5 top right, 0 below it."""
    batch = collate([data().dataset("test")[0]])[:1]
    masks = torch.zeros(1, 3, 2, 2)
    masks[0, 0, :, 0] = 1
    undefined = torch.tensor([[[False, True], [False, False]]])
    images = batch.images[:, :, :2, :2]
    batch = type(batch)(images, torch.tensor([[1.0, 0.0, 0.0]]), masks, undefined if void else None, batch.ids)
    net = explanandum()
    net.classifier[0].padding = (2, 2)
    scene = Scene(batch, [0], net)
    raw = torch.zeros(1, 3, 2, 2)
    raw[0, 0] = torch.tensor([[1.0, 0.5], [1.0, 0.0]])
    return scene, Maps(method("m", Dense()), scene, raw)


@pytest.mark.parametrize(
    ("mode", "void", "iou", "acc"),
    [("corrected", True, 1.0, 1.0), ("paper", True, 2.5 / 3, 3.5 / 4), ("corrected", False, 2 / 2.5, 3.5 / 4)],
)
def test_void_is_left_out_or_counts_as_object(mode, void, iou, acc):
    scene, maps = small_scene(void)
    (whole,) = build_protocol("segmentation", None, mode).score(scene, maps)
    (own,) = build_protocol("segmentation_per_class", None, mode).score(scene, maps)
    assert whole.values["iou"] == own.values["iou"] == pytest.approx(iou)
    assert whole.values["acc"] == pytest.approx(acc) and own.class_index == 0 and whole.class_index is None


def test_an_image_without_ground_truth_is_not_one_large_object():
    scene, maps = small_scene(True)
    scene.batch.void.fill_(True)
    for mode in ("paper", "code", "corrected"):
        (whole,) = build_protocol("segmentation", None, mode).score(scene, maps)
        assert math.isnan(whole.values["iou"]) and not math.isnan(whole.values["sal"])


def test_rescaled_masks_span_zero_to_one_and_raw_ones_are_clamped():
    scene, maps = small_scene(False)
    shifted = Maps(maps.method, scene, 3 * maps.raw - 1, "raw")
    assert shifted.mask(*scene.pairs)[0].tolist() == [[1.0, 0.5], [1.0, 0.0]]
    shifted.scale = "minmax"
    assert shifted.mask(*scene.pairs)[0].tolist() == [[1.0, 0.5], [1.0, 0.0]]
    wide = Maps(maps.method, scene, 4 * maps.raw, "raw")
    assert wide.merged()[0].tolist() == [[1.0, 1.0], [1.0, 0.0]]
    wide.scale = "minmax"
    assert wide.merged()[0].tolist() == [[1.0, 0.5], [1.0, 0.0]]


def test_the_matrix_of_the_rows_is_that_of_the_metric(scene):
    found = build_protocol("masking_matrix", None, "paper").score(scene, dense(scene))
    metric = MaskingMatrix(3)
    metric.update(scene.explanandum, scene.images, scene.images.clone(), scene.batch.targets)
    expected = metric.compute()
    for k in sorted({s.class_index for s in found}):
        lines = torch.tensor([s.vectors["masking"] for s in found if s.class_index == k]).mean(0)
        assert torch.allclose(lines.double(), expected[k].double(), atol=1e-4)
        own = [s.values["own"] for s in found if s.class_index == k]
        assert sum(own) / len(own) == pytest.approx(float(expected[k, k]) / 100, abs=1e-6)
        foreign = [s.values["foreign"] for s in found if s.class_index == k]
        rest = [float(expected[k, j]) / 100 for j in range(3) if j != k]
        assert sum(foreign) / len(foreign) == pytest.approx(sum(rest) / 2, abs=1e-6)


def test_one_class_of_the_matrix_and_a_wrong_one(scene):
    found = build_protocol("masking_matrix", {"classes": [1]}, "paper").score(scene, dense(scene))
    assert {s.class_index for s in found} <= {1} and all(math.isnan(s.values["foreign"]) for s in found)
    with pytest.raises(ConfigError, match=r"0\.\.2"):
        build_protocol("masking_matrix", {"classes": [3]}, "paper").wanted(scene)


def test_left_and_kept_are_decisions_on_the_masked_images(scene):
    found = build_protocol("inverse_mask", None, "paper").score(scene, dense(scene))
    mask = dense(scene).merged()
    mean = scene.explanandum.mean.view(1, 3, 1, 1)
    with torch.no_grad():
        gone = scene.explanandum(mean + (1 - mask)[:, None] * (scene.images - mean))
    for s in found:
        if s.class_index is not None:
            assert s.values["left"] == float(gone[s.row, s.class_index] >= 0)
        else:
            grey = ((mask[s.row] >= 0.1) & (mask[s.row] <= 0.9)).double().mean()
            assert s.values["grey_share"] == pytest.approx(float(grey))


def test_the_scored_label_is_the_likeliest_and_the_predicted_map_is_another(scene):
    protocol = build_protocol("negative_perturbation", None, "paper")
    for s in protocol.score(scene, dense(scene)):
        labels = [k for k in range(3) if scene.labels[s.row, k]]
        assert s.class_index == max(labels, key=lambda k: float(scene.logits[s.row, k]))
        if int(scene.top[s.row]) == s.class_index:
            assert s.values["negative_predicted"] == s.values["negative_target"]
        assert s.values["negative_target"] == pytest.approx(100 * torch.trapezoid(torch.tensor(s.vectors["negative"]), dx=0.1).item())


def test_monotonicity_takes_the_methods_own_masks(scene):
    areas = [0.2, 0.8]

    class WithMasks(Brightness):
        areas = (0.2, 0.8)

        def masks(self, images, class_index, *, generator=None):
            return SimpleNamespace(masks=torch.stack([torch.full_like(images[:, 0], 0.3), torch.ones_like(images[:, 0])], 1))

    protocol = build_protocol("monotonicity", {"areas": areas, "fill": "black"}, "paper")
    own = protocol.score(scene, Maps(method("m", WithMasks()), scene, scene.images.clone()))
    rows, classes = scene.pairs
    with torch.no_grad():
        dark, whole = (scene.explanandum(scene.images[rows] * f).sigmoid().gather(1, classes[:, None]) for f in (0.3, 1.0))
    expected = monotone_scores(torch.cat([dark, whole], 1), whole[:, 0])
    assert [s.values["monotone"] for s in own] == pytest.approx(expected.tolist())
    other = protocol.score(scene, dense(scene))
    assert [s.vectors for s in other] != [s.vectors for s in own]


def test_own_scores_are_those_that_the_search_reached(scene):
    class Areas(Brightness):
        areas = (0.25, 0.5)

        def masks(self, images, classes, generator=None):
            one, two = images.new_tensor([[1.0, 3.0]]), images.new_tensor([[2.0, 1.5]])  # monotone until 2 is reached; not
            kept = torch.where((torch.arange(len(images)) == 0)[:, None], one, two)
            return SimpleNamespace(preserved=kept, original=images.new_full((len(images),), 2.0))

    protocol = build_protocol("monotonicity", {"areas": [0.25, 0.5], "scores": "own"}, "paper")
    assert protocol.not_applicable(method("noisy", Brightness())) is not None
    maps = Maps(Method("areas", Areas(), {}), scene, dense(scene).raw)
    assert protocol.not_applicable(maps.method) is None
    found = protocol.score(scene, maps)
    assert found[0].values["smallest_area"] == 0.5 and found[1].values["smallest_area"] == 0.25
    assert [s.vectors["preserved"] for s in found[:2]] == [[1.0, 3.0], [2.0, 1.5]]


def test_the_ground_truth_row_is_the_union_that_is_scored(scene):
    void = torch.zeros(4, 32, 32, dtype=torch.bool)
    void[:, :4] = True
    bordered = replace(scene, batch=replace(scene.batch, void=void))

    class Truth(Dense):
        needs_masks = True

    maps = Maps(method("ground_truth", Truth()), bordered, scene.batch.masks)
    for mode in ("paper", "code", "corrected"):
        for protocol in ("segmentation", "segmentation_per_class"):
            for row in build_protocol(protocol, {}, mode).score(bordered, maps):
                assert (row.values["acc"], row.values["iou"], row.values["mae"]) == (1, 1, 0), (mode, protocol)


def test_a_table_chooses_where_maps_are_cut(scene):
    """All of a positive map lies above 0, a part of it above its mean."""
    values = {}
    for threshold in (None, "zero", "mean"):
        maps = Maps(replace(method("dense", Dense()), threshold=threshold), scene, scene.images.clone() + 0.1)
        values[threshold] = [s.values["pixel_accuracy"] for s in build_protocol("agf_segmentation", {}, "paper").score(scene, maps)]
    rows, classes = scene.pairs
    assert values["zero"] == pytest.approx(scene.truth(rows, classes).mean((1, 2)).tolist())
    assert values[None] == values["mean"] != values["zero"]


def test_classes_by_the_average_activation_of_their_masks(scene):
    areas = torch.tensor([[0.5, 0.25, 0.125]] * 4)
    maps = Maps(method("dense", Dense()), scene, areas[:, :, None, None].expand(4, 3, 32, 32))
    found = build_protocol("mask_activation", {}, "paper").score(scene, maps)
    for b, row in enumerate(found):
        expected = float(scene.labels[b, 0]) if scene.labels[b].any() else math.nan
        assert row.values["top_is_label"] == pytest.approx(expected, nan_ok=True)
        order = torch.argsort(torch.argsort(scene.logits[b])).double()
        assert row.values["rank_correlation"] == pytest.approx(1 - 6 * float(((torch.tensor([2.0, 1, 0]) - order) ** 2).sum()) / 24)
        assert row.vectors["activation"] == [0.5, 0.25, 0.125]


def test_fidelity_alone_is_that_of_the_five_metrics(scene):
    alone = build_protocol("fidelity", {"subsets": 20}, "paper").score(scene, dense(scene))
    five = build_protocol("srd_metrics", {"subsets": 20, "stability_samples": 0}, "corrected").score(scene, dense(scene))
    assert [s.values["fidelity"] for s in alone] == [s.values["fidelity"] for s in five]  # 4 of 32 x 32 pixels


def test_boxes_are_the_object_at_the_original_resolution(scene):
    boxes = {0: [SimpleNamespace(label=0, x0=40, y0=0, x1=64, y1=10, difficult=False)], 1: []}
    dataset = SimpleNamespace(boxes=lambda i: boxes.get(i, []), original_size=lambda i: (48, 64))
    mask, counts = class_boxes(dataset, 0, 0)
    assert mask.shape == (48, 64) and int(mask.sum()) == 240 and bool(mask[9, 63]) and not bool(mask[10, 63]) and counts
    boxes[0][0].difficult = True
    assert class_boxes(dataset, 0, 0)[1] is False
    boxes[0][0].difficult = False
    batch = scene.batch[:1]
    with_label = type(batch)(batch.images, torch.tensor([[1.0, 0.0, 0.0]]), batch.masks, None, batch.ids)
    boxed = Scene(with_label, [0], scene.explanandum, dataset=dataset)
    for corner, hit in ((31, 1.0), (0, 0.0)):
        raw = torch.zeros(1, 3, 32, 32)
        raw[0, 0, 0, corner] = 1
        (found,) = build_protocol("pointing_game", None, "code").score(boxed, Maps(method("m", Dense()), boxed, raw))
        assert found.values["hit"] == hit
    with pytest.raises(ConfigError, match="has no boxes"):
        build_protocol("pointing_game", {"truth": "boxes"}, "code").score(scene, dense(scene))


def test_time_asks_the_method_and_warms_up_once(scene):
    attributor = Brightness()
    protocol = build_protocol("time", {"warmup": 2, "repeats": 3}, "paper")
    maps = Maps(method("m", attributor), scene, scene.images.clone())
    pairs = int(scene.explained.sum())
    (first, *_) = protocol.score(scene, maps)
    assert attributor.asked == [pairs] * 5
    protocol.score(scene, maps)
    assert attributor.asked == [pairs] * 8, "no second warm-up"
    assert first.values["seconds_per_class"] == pytest.approx(first.values["seconds"] * 4 / pairs)


@pytest.mark.parametrize("mode", ["paper", "corrected"])
def test_every_row_averages_the_same_images(mode):
    """An image without object pixels has no IoU, whether a mask is empty there or not."""
    protocol = build_protocol("segmentation", None, mode)
    truth = torch.zeros(2, 4, 4)
    truth[0, :2] = 1
    rows = [protocol.compare(mask, truth, None) for mask in (torch.zeros(2, 4, 4), torch.full((2, 4, 4), 0.6))]
    for name in ("iou", "iou_at", "f1"):
        assert [row[name].isnan().tolist() for row in rows] == [[False, True]] * 2, name
    assert not any(row["mae"].isnan().any() for row in rows)
    void = torch.zeros(2, 4, 4, dtype=torch.bool)
    void[0, :2] = True  # the only object pixels cannot be judged: as if there were none, or the void as object in the paper's mode
    found = protocol.compare(torch.full((2, 4, 4), 0.6), truth, void)["iou"].isnan().tolist()
    assert found == ([True, True] if mode == "corrected" else [False, True])


def test_classes_without_a_region_are_not_explained(scene):
    dataset = SimpleNamespace(no_region=("checks",), class_names=("stripes", "checks", "dots"))
    less = replace(scene, dataset=dataset)
    assert torch.equal(less.explained[:, [0, 2]], scene.explained[:, [0, 2]]) and not less.explained[:, 1].any()
    assert scene.explained[:, 1].any()


def test_the_best_threshold_is_that_of_the_mean_over_classes():
    batch = collate([data().dataset("test")[0]])
    truth = torch.zeros(2, 3, 4, 4)
    truth[0, 0, :, :2] = 1
    truth[1, 1, :, :1] = 1
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])  # the second image's class 0 has no pixel: it counts nowhere
    images = batch.images[:, :, :4, :4].expand(2, -1, -1, -1)
    scene = Scene(type(batch)(images, targets, truth, None, ("a", "b")), [0, 1], explanandum(), dataset=data().dataset("test"))
    raw = torch.zeros(2, 3, 4, 4)
    raw[0, 0] = torch.tensor([0.9, 0.32, 0.22, 0.0])
    raw[1, 1] = torch.tensor([0.62, 0.28, 0.22, 0.12])
    maps = Maps(method("dense", Dense()), scene, raw)
    protocol = build_protocol("segmentation_per_class", {"thresholds": {"dense": 0.25}}, "corrected")
    found = protocol.score(scene, maps)
    assert [s.values["iou_at"] for s in found if s.values["iou_at"] == s.values["iou_at"]] == [1.0, 0.5]
    summed = torch.tensor([s.vectors["curve"] for s in found], dtype=torch.float64).sum(0)
    # class 0 is exact from 0.22 to 0.32, class 1 from 0.28 to 0.62: both at 0.3 alone
    assert protocol.from_counts("curve", summed).tolist() == pytest.approx([0.3, 1.0])
    assert protocol.from_counts("curve", torch.stack([summed, 3 * summed]))[1].tolist() == pytest.approx([0.3, 1.0])
    own = build_protocol("segmentation_per_class", {"thresholds": {"dense/raw": 0.6, "dense": 0.1}}, "corrected")
    assert own.score(scene, maps)[-1].values["iou_at"] == 1.0
    with pytest.raises(ConfigError, match=r"lie in \[0,1\], received 3 for dense"):
        build_protocol("segmentation", {"thresholds": {"dense": 3}}, "corrected")


def test_masks_on_images_where_nothing_is_to_be_seen(scene):
    dataset = SimpleNamespace(no_region=("checks",), class_names=("stripes", "checks", "dots"))
    targets = torch.zeros_like(scene.batch.targets)
    targets[0, 1], targets[1, [0, 1]] = 1, 1  # the first shows nothing; the second a class too; the others have no label
    less = Scene(replace(scene.batch, targets=targets), scene.indices, scene.explanandum, dataset=dataset)
    protocol = build_protocol("empty_images", None, "paper")
    wanted = protocol.wanted(less)
    assert wanted.sum() == 2 and wanted[0].tolist() == [True, False, True]
    raw = torch.full((len(targets), 3, 2, 2), torch.nan)
    raw[0, 0] = torch.tensor([[0.1, 0.6], [0.0, 0.0]])
    raw[0, 2] = torch.tensor([[0.3, 0.2], [-1.0, 0.1]])
    (row,) = protocol.score(less, Maps(None, less, raw))
    assert row.row == 0 and row.class_index is None
    assert row.values == pytest.approx({"area": (0.3 + 0.6 + 0.0 + 0.1) / 4, "area_at_half": 0.25, "marked": 1.0})
    with pytest.raises(ConfigError, match="no_region"):
        protocol.wanted(scene)


def test_binarised_rows_are_the_hits_of_every_call(scene):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.Conv2d(6, 6, 3), torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, scene.labels.shape[1]))
    model = Explanandum(net, scene.labels.shape[1], mean=0.5, std=0.5)
    found = build_protocol("binarized", {"positions": 3}, "paper").score(replace(scene, explanandum=model), None)
    rows, classes = scene.labels.nonzero(as_tuple=True)
    assert [(s.row, s.class_index) for s in found] == list(zip(rows.tolist(), classes.tolist(), strict=True)) and len(found) > 2
    images = model.normalize(scene.images)
    with torch.no_grad():
        first = net[2:]((net[1](net[0](images)) > 0).float())
        second = net[4:]((net[:4](images) > 0).float())
    for s in found:
        hits = [float((y[s.row] >= y[s.row, s.class_index]).sum() == 1) for y in (first, second)]
        assert s.vectors["top1"] == [hits[0], hits[1], hits[1]], "of two calls the second is the nearer to the middle, rounded up"
        assert s.values["first_top1"] == hits[0] and s.values["mean_top1"] == pytest.approx((hits[0] + 2 * hits[1]) / 3)
    linear = Explanandum(
        torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3)), 3, mean=0.0, std=1.0
    )
    with pytest.raises(UnsupportedLayerError, match="no activation"):
        build_protocol("binarized", None, "paper").score(replace(scene, explanandum=linear), None)
