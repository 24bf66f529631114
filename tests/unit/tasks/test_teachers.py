"""Teachers: scaling, thresholds, weights, caches and augmentation."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import explainer
from explainer.attribution.map_cache import MapCache
from explainer.commands.filling import wanted_classes
from explainer.config import TeacherConfig
from explainer.data.contract import collate
from explainer.data.datamodule import DataModule
from explainer.errors import ConfigError
from explainer.models.black_box import BlackBox
from explainer.tasks.teachers import (
    CachedTeacher,
    LiveTeacher,
    Teachers,
    _Member,
    build_teachers,
    check_teachers,
    chosen_images,
    harden,
    open_cache,
    thresholds_of,
    to_unit,
)
from explainer.tensors import Batch

NAMES = ("stripes", "checks", "dots")
SOFT = torch.full((3,), torch.nan)


class Given:
    """Maps handed in; counts how often it is asked."""

    def __init__(self, maps):
        self.given, self.asked = maps, 0

    def __call__(self, batch, wanted, split, generator):
        self.asked += 1
        return self.given[wanted]


def member(maps, weight=1.0, scale="clamp", thresholds=SOFT):
    source = LiveTeacher(None)
    source.maps = Given(maps)
    return _Member(source, weight, scale, thresholds)


def batch(targets, size=4):
    targets = torch.tensor(targets)
    return Batch(torch.rand(len(targets), 3, size, size), targets, None, None, tuple(f"id{i}" for i in range(len(targets))))


def ask(teachers, b, split="train"):
    return teachers(b, split, torch.Generator().manual_seed(0))


def test_scales_by_hand():
    maps = torch.tensor([[[-1.0, 0.0, 3.0]], [[2.0, 2.0, 2.0]], [[-1.0, -2.0, -3.0]], [[0.25, 0.5, 2.0]]])
    torch.testing.assert_close(to_unit(maps, "minmax")[[0, 3]], torch.tensor([[[0.0, 0.25, 1.0]], [[0.0, 1 / 7, 1.0]]]))
    assert to_unit(maps, "minmax")[1].isnan().all(), "a constant map says nothing"
    torch.testing.assert_close(to_unit(maps, "max")[[0, 1, 3]], torch.tensor([[[0.0, 0.0, 1.0]], [[1.0, 1.0, 1.0]], [[0.125, 0.25, 1.0]]]))
    assert to_unit(maps, "max")[2].isnan().all(), "nowhere positive"
    torch.testing.assert_close(to_unit(maps, "clamp")[3], torch.tensor([[0.25, 0.5, 1.0]]))
    assert to_unit(torch.tensor([[[0.0, torch.nan]]])).isnan().all()


def test_thresholds_per_class():
    levels = thresholds_of({"checks": 0.5}, NAMES)
    assert levels.isnan().tolist() == [True, False, True]
    maps = torch.tensor([[[0.2, 0.5]], [[0.2, 0.5]], [[torch.nan, 0.7]]])
    hard = harden(maps, torch.tensor([0, 1, 1]), levels)
    assert hard[0].tolist() == maps[0].tolist() and hard[1].tolist() == [[0.0, 1.0]]
    assert hard[2].isnan().tolist() == [[True, False]]
    assert thresholds_of(0.3, NAMES).tolist() == pytest.approx([0.3] * 3) and thresholds_of(None, NAMES).isnan().all()
    with pytest.raises(ConfigError, match="names the class 'plaid'"):
        thresholds_of({"plaid": 0.5}, NAMES)
    with pytest.raises(ConfigError, match=r"lie in \[0,1\], received 2"):
        thresholds_of(2.0, NAMES)


def test_weighted_mean_of_those_who_know():
    b = batch([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    first, second = torch.full((2, 3, 4, 4), 0.8), torch.full((2, 3, 4, 4), 0.2)
    second[0, 1] = torch.nan
    first[1, 2], second[1, 2] = torch.nan, torch.nan
    out = ask(Teachers([member(first, 3.0), member(second, 1.0)]), b)
    torch.testing.assert_close(out[0, 0], torch.full((4, 4), 0.65))
    torch.testing.assert_close(out[0, 1], torch.full((4, 4), 0.8))
    assert out[0, 2].isnan().all() and out[1].isnan().all(), "absent classes, and one that nobody knows"
    hardened = ask(Teachers([member(first, 3.0, thresholds=torch.full((3,), 0.5)), member(second)]), b)
    torch.testing.assert_close(hardened[0, 0], torch.full((4, 4), (3 * 1 + 0.2) / 4))
    assert ask(Teachers([member(first)]), batch([[0.0, 0.0, 0.0]])).isnan().all()


def tiny(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    return explainer.Explanandum(net, 3, class_names=NAMES)


def shapes(**train):
    return DataModule("shapes", 4, options={"size": 32, "class_names": list(NAMES), "length": 6}, train_options=train, seed=3)


def test_live_teacher_is_the_baseline_on_the_present_classes():
    e, data = tiny(), shapes()
    b = collate([data.dataset("train")[i] for i in range(4)])
    teachers = build_teachers(
        [TeacherConfig("grad_cam", {"layer": "0"}, scale="max"), TeacherConfig("rise", {"n_masks": 6}, weight=2.0)],
        e,
        data,
        ("train", "val"),
    )
    out = ask(teachers, b)
    rows, classes = b.targets.nonzero(as_tuple=True)
    cam = to_unit(explainer.baselines.build("grad_cam", e, layer="0")(b.images[rows], classes), "max")
    rise = to_unit(explainer.baselines.build("rise", e, n_masks=6)(b.images[rows], classes, generator=torch.Generator().manual_seed(0)))
    both = torch.isfinite(cam).flatten(1).all(1) & torch.isfinite(rise).flatten(1).all(1)
    assert both.sum() >= 3
    torch.testing.assert_close(out[rows, classes][both], ((cam + 2 * rise) / 3)[both], atol=1e-5, rtol=1e-5)
    assert out[b.targets < 0.5].isnan().all()
    assert teachers.answers("val")


def test_teachers_of_masks_and_of_an_order_are_asked_apart():
    maps, order = torch.full((1, 2, 4, 4), 0.25), torch.full((1, 2, 4, 4), 0.75)
    taught, ranked = member(maps), member(order)
    ranked.teaches = "order"
    teachers, b = Teachers([taught, ranked]), batch([[1.0, 0.0]])
    generator = torch.Generator()
    assert teachers(b, "train", generator)[0, 0].unique().tolist() == [0.25]
    assert ranked.source.maps.asked == 0, "while no term asks for an order its teacher is not run"
    assert teachers(b, "train", generator, subject="order")[0, 0].unique().tolist() == [0.75]
    assert Teachers([taught])(b, "train", generator, subject="order").isnan().all()


def test_cached_teacher_follows_the_augmentation(tmp_path):
    """The cached map is the image's own first channel: after any flip or turn it must still be."""
    e, plain, turned = tiny(), shapes(), shapes(augment="symmetry")
    config = TeacherConfig("rise", cache=str(tmp_path), dtype="float32", scale="clamp")
    cache = open_cache(config, e, plain, "train")
    samples = [plain.dataset("train")[i] for i in range(6)]
    for s in samples:
        labels = s.target.nonzero()[:, 0].tolist()
        cache.put([s.id] * len(labels), labels, s.image[:1].expand(len(labels), -1, -1))
    assert cache.pairs() and len(cache.pairs()) == len(cache)
    teachers = build_teachers([config], e, turned, ("train", "val"))
    assert not teachers.answers("val")
    dataset, moved = turned.dataset("train"), 0
    for epoch in range(4):
        dataset.set_epoch(epoch)
        b = collate([replace(dataset[i], epoch=epoch) for i in range(6)])
        dataset.set_epoch(99)  # the main process's copy may be at any epoch: workers have their own
        out = ask(teachers, b)
        rows, classes = b.targets.nonzero(as_tuple=True)
        torch.testing.assert_close(out[rows, classes], b.images[rows, 0], atol=1 / 255, rtol=0)
        moved += int((b.images != torch.stack([s.image for s in samples])).flatten(1).any(1).sum())
    assert moved > 12
    assert ask(teachers, b, "val").isnan().all()


def test_only_the_chosen_images_with_something_to_say_teach(tmp_path, caplog):
    e, data = tiny(), shapes()
    config = TeacherConfig("rise", cache=str(tmp_path), dtype="float32", scale="max", images=4)
    cache, dataset = open_cache(config, e, data, "train"), data.dataset("train")
    chosen = chosen_images(config, data)
    other = next(i for i in range(6) if i not in chosen)
    good, silent, unknown, _ = chosen
    maps = torch.rand(4, 32, 32)
    maps[1] = -1.0
    maps[2] = torch.nan
    ids = [dataset.sample_id(i) for i in (good, silent, unknown, other)]
    cache.put(ids, [0] * 4, maps)
    teachers = build_teachers([config], e, data, ("train", "val"))
    assert teachers.images("train") == [good], "the other image has a map too, but the run's result must not depend on what else is there"
    assert "1 of 4 images have no map" in caplog.text
    b = Batch(torch.rand(4, 3, 32, 32), torch.tensor([[1.0, 0.0, 0.0]] * 4), ids=tuple(ids))
    assert torch.isfinite(ask(teachers, b)[:, 0]).flatten(1).all(1).tolist() == [True, False, False, False]
    every = build_teachers([replace(config, images=0)], e, data, ("train", "val"))
    assert every.images("train") == sorted([good, other])


def test_images_without_a_region_teach_empty_masks_and_need_no_map(tmp_path, caplog):
    from PIL import Image

    root = tmp_path / "tiles"
    for split in ("train", "val"):
        for name in ("crack", "free"):
            for i in range(3):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (40 * i, 90, 10 if name == "free" else 200)).save(path)
    options = {"root": str(root), "size": 32, "no_region": ["free"]}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))
    e = explainer.Explanandum(net, 2, "multiclass", class_names=("crack", "free"))
    data = DataModule("image_folder", 2, options=options)
    config = TeacherConfig("rise", {"n_masks": 3}, cache=str(tmp_path / "maps"), images=6)
    dataset = data.dataset("train")
    cache = open_cache(config, e, data, "train")
    samples = collate([dataset[i] for i in range(len(dataset))])
    wanted = wanted_classes(samples, e, "labels", data.no_region)
    assert wanted.sum() == 3 and not wanted[:, 1].any()
    assert wanted_classes(samples, e, "all", data.no_region).sum() == 6, "asked for all, a class without a region has no map either"
    rows, classes = wanted.nonzero(as_tuple=True)
    cache.put([samples.ids[r] for r in rows.tolist()], classes.tolist(), torch.rand(3, 32, 32))
    teachers = build_teachers([config], e, data, ("train",))
    assert teachers.images("train") == list(range(6)), "an image that is free of defects says: every mask is empty"
    assert "have no map" not in caplog.text
    few = build_teachers([replace(config, images=0)], e, data, ("train",))
    assert few.images("train") == list(range(6))


def test_maps_beyond_the_memory_are_read_from_the_files(tmp_path):
    e, data = tiny(), shapes()
    config = TeacherConfig("rise", cache=str(tmp_path), dtype="float32", scale="clamp")
    cache = open_cache(config, e, data, "train")
    dataset = data.dataset("train")
    cache.put([dataset.sample_id(i) for i in range(6)], [0] * 6, torch.rand(6, 32, 32))
    full = CachedTeacher({"train": cache}, {"train": dataset}, "clamp")
    small = CachedTeacher({"train": cache}, {"train": dataset}, "clamp", memory=2 * 1024)
    assert len(full._kept) == 6 and len(small._kept) == 2
    every = [_Member(full, 1.0, "clamp", SOFT), _Member(LiveTeacher(None), 1.0, "clamp", SOFT)]
    assert Teachers(every[:1]).images("train") == list(range(6)) and Teachers(every[:1]).images("val") == []
    assert Teachers(every).images("train") is None, "one that is asked live knows every image"
    b = Batch(torch.rand(6, 3, 32, 32), torch.tensor([[1.0, 0.0, 0.0]] * 6), ids=tuple(dataset.sample_id(i) for i in range(6)))
    g = torch.Generator()
    torch.testing.assert_close(small.maps(b, b.targets > 0, "train", g), full.maps(b, b.targets > 0, "train", g))
    with pytest.raises(ConfigError, match="the images are"):
        full.maps(Batch(torch.rand(6, 3, 16, 16), b.targets, ids=b.ids), b.targets > 0, "train", g)


def test_the_runner_and_the_teacher_agree_on_the_cache(tmp_path):
    from explainer.commands.assembly import build_method
    from explainer.evaluation.config import EvaluateConfig, MethodConfig
    from explainer.evaluation.runner import Runner, Settings

    e, data = tiny(), shapes()
    config = TeacherConfig("rise", {"n_masks": 3}, cache=str(tmp_path), seed=5)
    setting = EvaluateConfig(methods={"any label": MethodConfig("rise", {"n_masks": 3})})
    method = build_method("any label", setting.methods["any label"], setting, e, data)
    runner = Runner([method], {}, e, data, Settings(tmp_path / "out", split="train", seed=5, cache=tmp_path))
    assert runner._cache(method).folder == open_cache(config, e, data, "train").folder
    assert isinstance(runner._cache(method), MapCache)


def test_options_of_the_paper_come_with_its_mode():
    from explainer.commands.assembly import build_method
    from explainer.evaluation.config import EvaluateConfig, MethodConfig

    e, data = tiny(), shapes()
    for mode, given, blend in (("paper", {}, "width"), ("corrected", {}, "mix"), ("code", {}, "mix"), ("paper", {"blend": "mix"}, "mix")):
        setting = EvaluateConfig(methods={"meaningful_perturbation": MethodConfig(options=given)}, mode=mode)
        method = build_method("meaningful_perturbation", setting.methods["meaningful_perturbation"], setting, e, data)
        assert method.attributor.blend == blend
    every = EvaluateConfig(methods={"extremal_perturbation": MethodConfig(options={"output": "all"})})
    with pytest.raises(ConfigError, match=r"methods.extremal_perturbation: .*4 maps an image.*output: smallest"):
        build_method("extremal_perturbation", every.methods["extremal_perturbation"], every, e, data)
    with pytest.raises(ConfigError, match="maps an image"):
        build_teachers([TeacherConfig("extremal_perturbation", {"output": "all"})], e, data, ("train",))


def test_errors(tmp_path):
    e, data = tiny(), shapes()
    with pytest.raises(ConfigError, match=r"explainer maps --method\.name rise --split train.*images: 400"):
        build_teachers([TeacherConfig("rise", cache=str(tmp_path))], e, data, ("train", "val"))
    silent = TeacherConfig("rise", cache=str(tmp_path / "silent"), dtype="float32", scale="max")
    open_cache(silent, e, data, "train").put([data.dataset("train").sample_id(0)], [0], torch.full((1, 32, 32), -1.0))
    with pytest.raises(ConfigError, match=r"none of the 1 maps of train in .*silent says anything.*Is the classifier trained"):
        build_teachers([silent], e, data, ("train",))
    with pytest.raises(ConfigError, match="reads ground truth"):
        build_teachers([TeacherConfig("ground_truth")], e, data, ("train",))
    with pytest.raises(ConfigError, match="weight must be positive"):
        build_teachers([TeacherConfig(weight=0.0)], e, data, ("train",))
    with pytest.raises(ConfigError, match=r"has no maps .* for the chosen images.*--limit 3 --spread true --seed 0 "):
        build_teachers([TeacherConfig("rise", cache=str(tmp_path), images=3)], e, data, ("train", "val"))
    for wrong in (TeacherConfig("rise", images=3), TeacherConfig("rise", cache=str(tmp_path), images=-1)):
        with pytest.raises(ConfigError, match=r"teachers\.rise\.images is the number of training images"):
            check_teachers([wrong], e, data)
    with pytest.raises(ConfigError, match="reads ground truth"):
        check_teachers([TeacherConfig("ground_truth", cache=str(tmp_path), images=3)], e, data)
    with pytest.raises(ConfigError, match=r"guided_filter: smooth and radius .* received smooth=-0\.1"):
        build_teachers([TeacherConfig("guided_filter", {"smooth": -0.1})], e, data, ("train",))
    box = BlackBox(lambda images: images.mean((2, 3)), 3, class_names=NAMES)
    with pytest.raises(ConfigError, match="gives scores only"):
        build_teachers([TeacherConfig("gradient")], box, data, ("train",))
    assert build_teachers([], e, data, ("train",)) is None
