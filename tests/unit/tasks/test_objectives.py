"""The training step with teachers, score-only classifiers, cut areas and the alternative fill; mask augmentation of a classifier."""

import dataclasses

import pytest
import torch
from torch import nn

from explainer.config import ClassifierConfig, MaskAugmentationConfig, MaskingConfig, OcclusionConfig
from explainer.errors import ConfigError
from explainer.models.black_box import BlackBox
from explainer.models.explainer import Explainer
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.diagnostics import diagnostics
from explainer.tasks.draws import Draws
from explainer.tasks.explain import ExplainTask
from explainer.tensors import Batch
from tests.unit.models.test_shared import resnet
from tests.unit.tasks.test_explain import LOSSES, make_batch, make_task


class Half:
    """A teacher that says 0.5 everywhere and counts."""

    def __init__(self):
        self.asked = []

    def __call__(self, batch, split, generator, columns=None):
        self.asked.append(split)
        return torch.where(batch.targets > 0.5, 0.5, torch.nan)[:, :, None, None].expand(-1, -1, 16, 16)


def task(losses, teachers=None, masking=None, model=None):
    base = make_task()
    return ExplainTask(base.explainer, model or base.explanandum, losses, masking, teachers=teachers)


def test_teacher_is_asked_only_while_it_has_weight():
    teacher = Half()
    t = task({"distillation": {"weight": [[0.0, 1.0], [0.5, 0.0]], "kind": "mse"}, "target_area": {}}, teacher)
    e = t._explanation(make_batch(), "train")
    assert teacher.asked == ["train"] and e.teacher is not None
    t._explanation(make_batch(), "val")
    assert teacher.asked == ["train"], "validation uses the final weights"
    t._progress = lambda: 0.6
    assert t._explanation(make_batch(), "train").teacher is None and len(teacher.asked) == 1
    with pytest.raises(ConfigError, match="needs teachers"):
        task({"distillation": {}})
    with pytest.raises(ConfigError, match="grad_cam, teaches: order"):
        task({"order": {}})


def test_no_classifier_pass_while_nothing_needs_it():
    t = task({"distillation": {"weight": 1.0}, "classification": {"weight": [[0.2, 0.0], [0.5, 1.0]]}}, Half())
    asked = []
    t.explanandum.register_forward_hook(lambda *_: asked.append(1))
    e = t._explanation(make_batch(), "train")
    assert not asked and e.logits_masked.isnan().all()
    d = diagnostics(e)
    assert d["kept"].isnan().all() and d["left"].isnan().all() and d["drop"].isnan().all() and not d["area"].isnan().any()
    assert not t._explanation(make_batch(), "val").logits_masked.isnan().any() and len(asked) == 1
    t._progress = lambda: 0.4
    assert not t._explanation(make_batch(), "train").logits_masked.isnan().any()


def test_when_maps_alone_are_copied():
    t = task(
        {"distillation": {"weight": [[0.2, 1.0], [0.5, 0.0]]}, "total_variation": {}, "entropy": {"weight": [[0.3, 0.0], [1, 1]]}}, Half()
    )
    assert [t.copies_only(p) for p in (0.0, 0.3, 0.4, 0.6)] == [True, True, False, False]
    assert not task({"distillation": {}, "coalition": {}}, Half()).copies_only(0.0), "coalitions teach on every image"
    assert not task({"total_variation": {}}).copies_only(0.0)


def test_scores_only():
    box = BlackBox(lambda images: torch.cat([images.mean((2, 3)), images.mean((1, 2, 3))[:, None]], dim=1), 4)
    with pytest.raises(ConfigError, match=r"losses\.classification backpropagates through the classifier"):
        task({"classification": {}}, model=box)
    t = task({"coalition": {"grid": 2, "coalitions": 4}, "area_bound": {}}, model=box)
    t.train()
    e = t._explanation(make_batch(), "train")
    assert box.queries == 0
    t.terms["coalition"].value(e).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in t.explainer.parameters())
    assert 4 < box.queries <= 4 * (4 + 2), "the empty images are one image"
    with torch.no_grad():
        t._explanation(make_batch(), "val")


def test_masks_of_present_classes_are_cut_to_a_random_area():
    batch = make_batch()
    t = task(LOSSES, masking=MaskingConfig(area_conditioned=1.0, areas=[0.1, 0.3]))
    masks = t._explanation(batch, "train").class_masks
    area = masks.mean((2, 3))
    plain = t.explainer.eval()(batch.images)
    present = batch.targets > 0.5
    assert (area[present] > 0.1 - 1e-4).all() and (area[present] < 0.3 + 1e-4).all()
    torch.testing.assert_close(area[0, 0], area[0, 1])
    assert area[0, 0] != area[1, 2]
    t.explainer.eval()
    torch.testing.assert_close(t._explanation(batch, "train").class_masks[~present], plain[~present])
    torch.testing.assert_close(t._explanation(batch, "val").class_masks, plain)
    for areas in ([0.3, 0.1], [0.0, 0.5], [0.2]):
        with pytest.raises(ConfigError, match="0 < least <= greatest < 1"):
            task(LOSSES, masking=MaskingConfig(areas=areas))


def test_alternative_fill_is_in_the_classifiers_units():
    t = task({"rtis": {}}, masking=MaskingConfig(fill="alternative"))
    images = make_batch().images
    spread = [t.explanandum.normalize(t._fill(images, Draws(s, 0, make_batch()))).std(dim=(2, 3)).mean().item() for s in range(8)]
    assert any(abs(s - 1) < 0.1 for s in spread) and any(s < 0.9 for s in spread), "coloured noise and blur"
    e = t._explanation(make_batch(), "train")
    t.terms["rtis"].value(e).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in t.explainer.parameters())


class Corners(nn.Module):
    """Class k's mask is the k-th column of the image, wholly kept."""

    class_names = ("a", "b", "c", "d")

    def forward(self, images):
        columns = torch.nn.functional.one_hot(torch.arange(4), images.shape[-1]).to(images)
        return columns.view(1, 4, 1, -1).expand(len(images), -1, images.shape[-2], -1)


def classify(**options):
    torch.manual_seed(0)
    config = ClassifierConfig(options={"widths": [4, 4]}, mean=[0.3, 0.4, 0.5], mask_augmentation=MaskAugmentationConfig("x", **options))
    return ClassifyTask(config, 4, "multilabel", Corners.class_names, mask_explainer=Corners())


def test_mask_augmentation_keeps_or_removes_the_evidence_of_the_labels():
    batch = make_batch()
    mean = torch.tensor([0.3, 0.4, 0.5]).view(1, 3, 1, 1)
    removed = classify(probability=1.0, mode="remove")._mask_evidence(batch)
    torch.testing.assert_close(removed[0, :, :, :2], mean[0].expand(3, 16, 2))  # the labels of the first image are a and b
    torch.testing.assert_close(removed[0, :, :, 2:], batch.images[0, :, :, 2:])
    torch.testing.assert_close(removed[3], batch.images[3])  # no label: untouched
    kept = classify(probability=1.0, mode="keep")._mask_evidence(batch)
    torch.testing.assert_close(kept[1, :, :, 2], batch.images[1, :, :, 2])
    torch.testing.assert_close(kept[1, :, :, 3:], mean[0].expand(3, 16, 13))
    only_b = classify(probability=1.0, mode="remove", classes=["b"])._mask_evidence(batch)
    torch.testing.assert_close(only_b[0, :, :, 0], batch.images[0, :, :, 0])
    torch.testing.assert_close(only_b[0, :, :, 1], mean[0, :, :, 0].expand(3, 16))
    torch.testing.assert_close(only_b[1], batch.images[1])
    assert torch.equal(classify(probability=0.0)._mask_evidence(batch), batch.images)


def test_mask_augmentation_is_random_and_its_explainer_no_part_of_the_task():
    large = make_batch()
    large = dataclasses.replace(large, images=large.images.repeat(50, 1, 1, 1), targets=torch.tensor([[1.0, 0, 0, 0]] * 200), ids=())
    t = classify(probability=0.4, mode="both")
    out = t._mask_evidence(large)
    changed = (out != large.images).flatten(1).any(1)
    kept = ((out - large.images)[:, :, :, 5].abs() > 1e-6).flatten(1).any(1)  # blending rounds
    assert 50 < changed.sum() < 110 and 20 < kept.sum() < 65
    assert torch.equal(out, t._mask_evidence(large))
    assert not [k for k in t.state_dict() if "mask" in k]


def test_mask_augmentation_errors():
    with pytest.raises(ConfigError, match="names 'e'"):
        classify(classes=["e"])
    with pytest.raises(ConfigError, match=r"must lie in \[0,1\], received 2"):
        classify(probability=2)
    with pytest.raises(ConfigError, match="explains the classes a, b, c, d, the data has k, l"):
        ClassifyTask(ClassifierConfig(options={"widths": [4]}), 2, "multilabel", ("k", "l"), mask_explainer=Corners())


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_blank_images_have_no_label(task):
    config = ClassifierConfig(options={"widths": [4, 4]}, mean=[0.3, 0.4, 0.5], occlusion=OcclusionConfig(blank=0.3))
    t = ClassifyTask(config, 4, task, Corners.class_names)
    images, targets = torch.rand(200, 3, 16, 16), torch.eye(4).repeat(50, 1)
    shown, labels = t._occlude(images, Batch(images, targets))
    blank = (shown == t.mean).flatten(1).all(1)
    assert 30 < blank.sum() < 90
    assert torch.equal(labels[blank], torch.full((int(blank.sum()), 4), 0.0 if task == "multilabel" else 0.25))
    assert torch.equal(labels[~blank], targets[~blank])
    torch.testing.assert_close(shown[~blank], images[~blank])
    with pytest.raises(ConfigError, match=r"occlusion\.blank is a share between 0 and 1, received 2"):
        ClassifyTask(ClassifierConfig(options={"widths": [4]}, occlusion=OcclusionConfig(blank=2)), 4, task, Corners.class_names)


@pytest.mark.parametrize("kind", ["blobs", "cutout_squares", "hide_and_seek_grid"])
def test_a_joint_batch_holds_every_image_as_it_is_and_occluded(kind):
    occlusion = OcclusionConfig(probability=1.0, kind=kind, squares=2, side=0.5, keep=0.5, joint=True)
    t = ClassifyTask(ClassifierConfig(options={"widths": [4, 4]}, occlusion=occlusion), 4, "multiclass", Corners.class_names).train()
    batch, seen = Batch(torch.rand(12, 3, 16, 16), torch.eye(4).repeat(3, 1)), []
    own = t._outputs
    t._outputs = lambda images: seen.append(images) or own(images)
    loss = t._shared_step(batch, "fit")
    t._shared_step(batch, "val")
    occluded, _ = t._occlude(batch.images, batch)
    assert torch.equal(seen[0], torch.cat([batch.images, occluded])) and torch.equal(seen[1], batch.images)
    changed = ((occluded - batch.images).abs() > 1e-5).any(1).flatten(1).float().mean(1)
    assert (changed > 0).sum() >= 10 and changed.unique().numel() > 1
    expected = nn.functional.cross_entropy(own(seen[0]), batch.targets.argmax(1).repeat(2))
    torch.testing.assert_close(loss, expected)


def test_the_occlusion_that_is_asked_for():
    def removed(**options):
        config = ClassifierConfig(options={"widths": [4]}, occlusion=OcclusionConfig(probability=1.0, **options))
        images = torch.rand(300, 3, 16, 16)
        shown, _ = ClassifyTask(config, 4, "multiclass", Corners.class_names)._occlude(images, Batch(images, torch.eye(4).repeat(75, 1)))
        return float(((shown - images).abs() > 1e-5).any(1).float().mean())  # a kept pixel is rounded

    assert removed(kind="hide_and_seek_grid", keep=0.75) == pytest.approx(0.25, abs=0.02)
    assert removed(kind="hide_and_seek_grid", keep=1.0) == 0.0
    assert removed(kind="cutout_squares", squares=1, side=0.5) < removed(kind="cutout_squares", squares=4, side=0.5) - 0.2
    with pytest.raises(ConfigError, match=r"occlusion\.keep is a share between 0 and 1, received 2"):
        removed(kind="hide_and_seek_grid", keep=2.0)


def test_masks_learn_as_without_an_order_and_every_weight_takes_part():
    """Distributed training waits for a gradient of each weight, also while no term teaches the order."""
    e = resnet()
    options = {"image_size": 64, "encoder": "shared", "explanandum": e}
    gradients = []
    for order in ({}, {"order": 3.0}):
        torch.manual_seed(0)
        t = ExplainTask(Explainer("fpn", 6, {"width": 8, **order}, **options), e, {"target_area": {}, "total_variation": {}})
        batch = Batch(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.eye(6)[:2], None, None, ("a", "b"))
        t._shared_step(batch, "train").backward()
        gradients.append({name: p.grad for name, p in t.explainer.named_parameters() if "classifier" not in name})
    plain, ordered = gradients
    assert all(g is not None for g in ordered.values()) and len(ordered) > len(plain)
    assert all(torch.allclose(ordered[name], plain[name], atol=1e-7) for name in plain)
    assert not any(ordered[name].any() for name in ordered.keys() - plain.keys())
