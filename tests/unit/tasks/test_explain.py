"""The training step of the Explainer."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import explainer
from explainer.config import MaskingConfig, OptimizerConfig
from explainer.errors import CheckpointError, ConfigError, NumericalError, UnsupportedLayerError
from explainer.losses.base import build_terms
from explainer.models.black_box import BlackBox
from explainer.models.explainer import Explainer
from explainer.models.networks import encoder_of
from explainer.models.token_masking import forward_masked
from explainer.tasks.callbacks import FiniteGradients, alike, empty_image_message, health_messages, remedies
from explainer.tasks.diagnostics import diagnostics
from explainer.tasks.draws import Draws
from explainer.tasks.explain import ExplainTask
from explainer.tasks.handed_over import require_data_order
from explainer.tasks.optim import configure, cosine, one_cycle
from explainer.tensors import Batch
from tests.contracts.networks import TinyViT

LOSSES = {"classification": {}, "entropy": {}, "target_area": {"weight": 0.1}, "area_bound": {"min_area": 0.1, "max_area": 0.5}}


def make_task(masking=None, losses=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    e = explainer.Explanandum(net, 4, mean=(0.3, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    seen = Explainer("vgg_unet", 4, {"widths": [8, 8], "decoder_channels": [8]}, stride=4)
    return ExplainTask(seen, e, losses or LOSSES, masking or MaskingConfig())


def make_batch():
    g = torch.Generator().manual_seed(1)
    targets = torch.tensor([[1.0, 1.0, 0, 0], [0, 0, 1.0, 0], [1.0, 1.0, 1.0, 0], [0, 0, 0, 0]])
    return Batch(
        torch.rand(4, 3, 16, 16, generator=g), targets, (torch.rand(4, 4, 16, 16, generator=g) > 0.5).float(), None, ("a", "b", "c", "d")
    )


def test_merged_pass_equals_two_passes_on_masked_normalised_images():
    """The published code multiplies the normalised image by the mask; filling with the mean colour is the same."""
    task, batch = make_task(), make_batch()
    e = task._explanation(batch, "val")
    inner = task.explanandum.classifier
    normalized = task.explanandum.normalize(batch.images)
    torch.testing.assert_close(e.logits_masked, inner(normalized * e.target_mask[:, None]))
    torch.testing.assert_close(e.logits_inverse, inner(normalized * (1 - e.target_mask[:, None])))


def test_fill_tokens_leaves_tokens_out_and_masks_learn_from_it():
    torch.manual_seed(0)
    net = TinyViT()
    e = explainer.Explanandum(net, 3, mean=(0.3, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    task = ExplainTask(
        Explainer("vgg_unet", 3, {"widths": [8, 8], "decoder_channels": [8]}, stride=4), e, LOSSES, MaskingConfig(fill="tokens")
    )
    batch = make_batch()
    batch = replace(batch, targets=batch.targets[:, :3], masks=None)
    result = task._explanation(batch, "train")
    torch.testing.assert_close(result.logits_masked, forward_masked(e, batch.images, result.target_mask))
    torch.testing.assert_close(result.logits_inverse, forward_masked(e, batch.images, 1 - result.target_mask))
    result.logits_masked.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in task.explainer.network.head.parameters())
    with pytest.raises(UnsupportedLayerError, match="no attention ran in Sequential"):
        make_task(MaskingConfig(fill="tokens"))._explanation(make_batch(), "train")


def test_only_the_explainer_learns():
    task, batch = make_task(), make_batch()
    before = task.fingerprint
    task.train()
    assert not any(m.training for m in task.explanandum.modules())
    e = task._explanation(batch, "train")
    sum(t.value(e) for t in build_terms(LOSSES).values()).backward()
    assert all(p.grad is None for p in task.explanandum.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in task.explainer.parameters())
    assert task.explanandum.fingerprint() == before


def test_checkpoint_state_has_no_explanandum():
    task = make_task()
    assert task.state_dict() and not [k for k in task.state_dict() if k.startswith("explanandum")]


def test_checkpoint_knows_how_masks_were_applied(tmp_path):
    task = make_task(MaskingConfig(fill="blur", area_temperature=0.5))
    content = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)}
    torch.save(content, tmp_path / "new.ckpt")
    net = explainer.load(tmp_path / "new.ckpt")
    assert net.metadata["fill"] == "blur" and net.metadata["area_temperature"] == 0.5
    assert net.metadata["task"] == "multilabel"
    for key in ("fill", "area_temperature"):
        del content["hyper_parameters"][key]
    torch.save(content, tmp_path / "old.ckpt")
    assert "fill" not in explainer.load(tmp_path / "old.ckpt").metadata


def test_subset_shows_part_of_the_labels_and_never_none():
    task, batch = make_task(MaskingConfig(subset=1.0)), make_batch()
    seen = set()
    for step in range(40):
        shown = task._subset(batch.targets, Draws(0, step, replace(batch, ids=())))
        assert ((batch.targets - shown) >= 0).all()
        assert torch.equal(shown.sum(dim=1) > 0, batch.targets.sum(dim=1) > 0)
        seen.add(tuple(shown[0].tolist()))
    assert seen == {(1, 1, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0)}
    assert torch.equal(make_task()._subset(batch.targets, Draws(0, 0, batch)), batch.targets)


def test_binarize_is_hard_forward_and_soft_backward():
    task = make_task(MaskingConfig(binarize=1.0))
    mask = torch.rand(4, 6, 6, requires_grad=True)
    hard = task._binarize(mask, Draws(0, 0, make_batch()))
    assert ((hard - hard.round()).abs() < 1e-6).all() and hard.mean() not in (0.0, 1.0)
    (grad,) = torch.autograd.grad((hard * torch.arange(36.0).view(6, 6)).sum(), mask)
    torch.testing.assert_close(grad, torch.arange(36.0).view(1, 6, 6).expand(4, 6, 6))


def test_same_step_same_random_choices():
    task, batch = make_task(MaskingConfig(binarize=0.5, subset=0.5, fill="random")), make_batch()
    a, b = task._explanation(batch, "train"), task._explanation(batch, "train")
    assert torch.equal(a.logits_masked, b.logits_masked) and torch.equal(a.shown, b.shown)


def test_classes_without_a_region_have_no_mask_and_teach_that_others_stay_empty():
    plain, batch = make_task(), make_batch()
    task = ExplainTask(plain.explainer, plain.explanandum, LOSSES, MaskingConfig(), no_region=["2"])
    e = task._explanation(batch, "val")
    # the second image has nothing but class 2: its target mask is empty, and every class's mask is one that should be
    assert e.target_mask[1].max() == 0 and torch.equal(e.non_target_mask[1], e.class_masks[1].amax(0))
    assert torch.equal(e.non_target_mask[0], e.class_masks[0, 2:].amax(0)) and e.targets[:, 2].sum() == 0
    assert torch.equal(e.targets[:, :2], batch.targets[:, :2]) and task.hparams["no_region"] == ["2"]
    assert "no_region" not in task.state_dict()
    asked = []
    copying = {"distillation": {"weight": 1.0}}
    teachers = lambda batch, *_: asked.append(batch.targets) or torch.full((2, 4, 16, 16), torch.nan)  # noqa: E731
    taught = ExplainTask(plain.explainer, plain.explanandum, copying, MaskingConfig(), teachers=teachers, no_region=["2"])
    taught._explanation(batch, "train")
    assert asked[0][:, 2].sum() == 0, "no map teaches a class without a region"
    with pytest.raises(ConfigError, match="no_region names 'free', which is not a class"):
        ExplainTask(plain.explainer, plain.explanandum, LOSSES, no_region=["free"])
    with pytest.raises(ConfigError, match="names every class"):
        ExplainTask(plain.explainer, plain.explanandum, LOSSES, no_region=["0", "1", "2", "3"])


def test_diagnostics_by_hand():
    task, batch = make_task(), make_batch()
    e = task._explanation(batch, "val")
    e.logits_masked = torch.tensor([[9.0, -9.0, 0, 0], [-9.0, 0, 9.0, 0], [9.0, 9.0, 9.0, 9.0], [9.0, 9, 9, 9]])
    e.logits_inverse = torch.tensor([[9.0, 9.0, 0, 0], [9.0, 0, -9.0, 0], [-9.0, -9.0, 9.0, 9.0], [9.0, 9, 9, 9]])
    e.target_mask = torch.stack([torch.full((16, 16), v) for v in (0.0, 0.5, 1.0, 0.95)])
    e.targets = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    e.class_masks = torch.tensor([0.2, 0.6, 1.0, 0.1])[None, :, None, None].expand(4, 4, 16, 16)
    d = diagnostics(e)
    torch.testing.assert_close(d["own_area"], torch.tensor([0.4, 1.0, 0.6, float("nan")]), equal_nan=True)
    torch.testing.assert_close(d["kept"], torch.tensor([0.5, 1.0, 1.0, float("nan")]), equal_nan=True)
    torch.testing.assert_close(d["left"], torch.tensor([1.0, 0.0, 1 / 3, float("nan")]), equal_nan=True)
    assert d["drop"][1].item() == pytest.approx(1.0, abs=1e-3)
    assert d["grey"].tolist() == [0.0, 1.0, 0.0, 0.0] and d["area"][1].item() == 0.5


def test_how_alike_masks_are_by_hand():
    ramp = torch.linspace(0, 1, 16).expand(16, 16)
    masks = torch.stack([ramp, 0.5 * ramp + 0.1, 1 - ramp, torch.full((16, 16), 0.3)])
    net = lambda images, classes: masks[: len(images), None].expand(-1, len(classes), -1, -1)  # noqa: E731
    targets = torch.zeros(4, 3)
    targets[:, 1] = 1
    batch = Batch(torch.rand(4, 3, 16, 16), targets, None, None, ("a", "b", "c", "d"))
    assert alike(net, batch[:2]) == pytest.approx(1.0)
    assert alike(net, batch) == pytest.approx((1 - 1) / 2, abs=1e-6), "the flat one says nothing"
    assert math.isnan(alike(net, batch[:1])) and math.isnan(alike(net, Batch(batch.images, targets * 0, None, None, batch.ids)))


def test_diagnostics_of_a_single_label_classifier_follow_the_largest_logit():
    """All logits above zero, or all below, say nothing: softmax does not change when a constant is added."""
    task, batch = make_task(), make_batch()
    e = task._explanation(batch, "val")
    e.task, e.shown = "multiclass", torch.eye(4)
    e.logits_masked = torch.tensor([[-1.0, -2, -3, -4], [3.0, 2, 1, 4], [1.0, 2, 3, 4], [-9.0, -8, -7, -6]])
    e.logits_inverse = torch.tensor([[4.0, 3, 2, 9], [-5.0, -4, -6, -7], [9.0, 8, 7, 6], [1.0, 2, 3, 2]])
    found = [diagnostics(e)]
    e.logits_masked, e.logits_inverse = e.logits_masked + 100, e.logits_inverse - 100
    found.append(diagnostics(e))
    for d in found:
        assert d["kept"].tolist() == [1.0, 0.0, 0.0, 1.0] and d["left"].tolist() == [0.0, 1.0, 0.0, 0.0]
    e.logits_masked = e.logits_inverse = torch.full((4, 4), torch.nan)
    assert diagnostics(e)["left"].isnan().all()
    # The alarm for the grey solution follows: sharp evidence left behind is seen although no logit is above zero.
    e.logits_masked = e.logits_inverse = -10 + 5 * torch.eye(4)
    e.target_mask = torch.full((4, 16, 16), 0.3)
    values = {f"val/{k}": float(v.mean()) for k, v in diagnostics(e).items()}
    assert "grey solution" in health_messages(values)[0] and "100% of the labels" in health_messages(values)[0]


def test_a_classifier_that_is_sure_of_an_empty_image_is_reported():
    assert empty_image_message(torch.tensor([-1.0, -3.0]), "multilabel", ("a", "b")) is None
    assert "answers b (88%) on an empty image" in empty_image_message(torch.tensor([-1.0, 2.0]), "multilabel", ("a", "b"))
    assert empty_image_message(torch.tensor([1.0, 1.0, 1.0]), "multiclass", ("a", "b", "c")) is None
    assert "answers a (" in empty_image_message(torch.tensor([9.0, 1.0, 1.0]), "multiclass", ("a", "b", "c"))


def test_evaluation_looks_only_where_looking_is_free():
    """A black box is paid per image: its masked images differ in every epoch, so that no cache would answer."""
    asked = []

    def service(images):
        asked.append(len(images))
        return images.mean((2, 3)) @ torch.ones(3, 4)

    batch, losses = make_batch(), {"coalition": {"grid": 8, "coalitions": 3}, "area_bound": {}}
    task = make_task(losses=losses)
    paid = ExplainTask(task.explainer, BlackBox(service, 4, mean=(0.3, 0.5, 0.6)), losses, MaskingConfig())
    for _ in range(2):
        with torch.no_grad():
            paid._shared_step(batch, "val")
    assert sum(asked) == 4 * (3 + 1) + 1, "coalitions and the whole image once, and the empty image"
    assert not {"kept", "left", "drop"} & set(paid.means.metrics) and {"area", "grey", "loss/coalition"} <= set(paid.means.metrics)
    with torch.no_grad():
        task._shared_step(batch, "val")
    assert {"kept", "left", "drop"} <= set(task.means.metrics), "a network is looked at for nothing"


def test_scaled_gradients_may_overflow():
    """16-mixed leaves out such steps by itself, and lowers its scale."""
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([float("inf"), 1.0])
    optimizer = torch.optim.SGD([weight])
    scaled, plain = (SimpleNamespace(precision_plugin=SimpleNamespace(scaler=s), global_step=3) for s in (object(), None))
    check = FiniteGradients()
    check.on_train_batch_start(scaled, None, make_batch(), 0)
    check.on_before_optimizer_step(scaled, None, optimizer)
    check.on_train_batch_start(plain, None, make_batch()[:2], 1)
    with pytest.raises(NumericalError, match=r"norm is inf in step 3.*Images of the batch: a, b\."):
        check.on_before_optimizer_step(plain, None, optimizer)
    weight.grad = torch.tensor([-1e6, 1.0])
    check.on_before_optimizer_step(plain, None, optimizer)


def test_health_messages():
    assert health_messages({"val/grey": 0.1, "val/area": 0.2, "val/left": 0.0}) == []
    assert "grey solution" in health_messages({"val/grey": 0.8, "val/area": 0.2, "val/left": 0.9})[0]
    assert "dead masks" in health_messages({"val/area": 0.0})[0]
    assert "full masks" in health_messages({"val/own_area": 0.99})[0]
    assert health_messages({"val/area": 0.99, "val/own_area": 0.4}) == []  # streets: every pixel has a label
    assert "masks of different images are alike (correlation 0.95)" in health_messages({"alike": 0.95}, ["a", "b"])[0]


def test_remedies_are_those_that_are_not_set():
    from explainer.config import MaskingConfig, RunConfig

    config = RunConfig()
    assert "masking.binarize: 0.5" in remedies(config) and "masking.fill: random" in remedies(config)
    config.masking, config.losses = MaskingConfig(binarize=0.5, subset=0.5, fill="random"), {"distillation": {}}
    config.explainer.encoder = "shared"
    assert remedies(config) == ["a classifier trained with classifier.occlusion, if it was not"]
    message = health_messages({"val/grey": 0.8, "val/left": 0.9}, remedies(config))[0]
    assert "binarize" not in message and message.endswith("classifier.occlusion, if it was not.")


def test_errors():
    with pytest.raises(ConfigError, match="the Explainer has 3 classes, the Explanandum 4"):
        ExplainTask(Explainer("vgg_unet", 3, {"widths": [8, 8], "decoder_channels": [8]}), make_task().explanandum, LOSSES)
    single = explainer.Explanandum(nn.Sequential(nn.Flatten(), nn.Linear(3, 4)), 4, task="multiclass")
    with pytest.raises(ConfigError, match="subset needs a multilabel classifier"):
        ExplainTask(Explainer("vgg_unet", 4, {"widths": [8, 8], "decoder_channels": [8]}), single, LOSSES, MaskingConfig(subset=0.5))
    for name in ("binarize", "subset", "area_conditioned"):
        with pytest.raises(ConfigError, match=rf"masking\.{name} is a share of the images in \[0,1\], received 1\.5"):
            make_task(MaskingConfig(**{name: 1.5}))
    with pytest.raises(ConfigError, match=r"masking\.area_temperature must be positive, received 0"):
        make_task(MaskingConfig(area_temperature=0.0))


def test_the_encoder_may_learn_more_slowly():
    """One step of plain SGD with gradient 1 everywhere moves each weight by its learning rate."""
    net = make_task().explainer.network
    config = OptimizerConfig("sgd", lr=0.5, encoder_lr=0.1)
    optimizer = configure(net.parameters(), config, lambda: 10, encoder_of(net).parameters())["optimizer"]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(before[name] - p, torch.full_like(p, 0.05 if name.startswith("encoder.") else 0.5))
    assert len(configure(net.parameters(), OptimizerConfig(), lambda: 10)["optimizer"].param_groups) == 1
    one = configure(net.parameters(), OptimizerConfig("sgd", 0.5, 0.1, schedule="one_cycle"), lambda: 10, encoder_of(net).parameters())
    rates = [group["lr"] for group in one["optimizer"].param_groups]
    assert rates == [pytest.approx(0.5 / 25), pytest.approx(0.05 / 25)], "the schedule scales both"
    for wrong, encoder in ((0.1, ()), (0.0, encoder_of(net).parameters())):
        with pytest.raises(ConfigError, match=r"optimizer\.encoder_lr is a positive factor"):
            configure(net.parameters(), OptimizerConfig(encoder_lr=wrong), lambda: 10, encoder)
    task = make_task()
    task.optimizer_config = config
    assert len(task.configure_optimizers()["optimizer"].param_groups) == 2


def test_learning_rate_schedules():
    assert one_cycle(0, 100, 0.2) == pytest.approx(1 / 25) and one_cycle(20, 100, 0.2) == pytest.approx(1.0)
    assert one_cycle(60, 100, 0.2) == pytest.approx(0.5) and one_cycle(100, 100, 0.2) == pytest.approx(0.0)
    assert one_cycle(250, 100, 0.2) == 0.0 and one_cycle(0, 1, 0.2) <= 1
    assert [round(cosine(s, 10), 3) for s in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]


def test_what_an_own_trainer_hands_over_is_checked():
    task, batch = make_task(), make_batch()
    with pytest.raises(ConfigError, match=r"received list.*collate_fn=explainer\.data\.contract\.collate"):
        task.training_step([batch.images, batch.targets], 0)
    named = explainer.Explanandum(task.explanandum.classifier, 4, class_names=["a", "b", "c", "d"])
    turned = Explainer("vgg_unet", 4, {"widths": [8, 8], "decoder_channels": [8]}, ["b", "a", "c", "d"], stride=4)
    with pytest.raises(ConfigError, match="the Explainer has the classes b, a, c, d, the Explanandum has a, b, c, d"):
        ExplainTask(turned, named, LOSSES, MaskingConfig())
    data = SimpleNamespace(class_names=("d", "c", "b", "a"))
    with pytest.raises(ConfigError, match="the data has d, c, b, a: the same in another order"):
        require_data_order(SimpleNamespace(datamodule=data), named.class_names, "the Explanandum")
    require_data_order(SimpleNamespace(datamodule=None), named.class_names, "the Explanandum")
    other = {"state_dict": dict(task.state_dict()), "fingerprint": task.fingerprint}
    task.on_load_checkpoint(other)
    other["state_dict"]["explainer.more"] = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"do not fit this Explainer \(1 keys differ, for example explainer.more"):
        task.on_load_checkpoint(other)
    with pytest.raises(CheckpointError, match="a checkpoint of a classifier, expected one of an Explainer"):
        task.on_load_checkpoint({"hyper_parameters": {"kind": "classifier"}, "state_dict": {}})
