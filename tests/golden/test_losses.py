"""The paper's losses against the published code, values and gradients."""

import numpy as np
import pytest
import torch

from explainer.losses.area import area_bound_loss, bound_penalty, mask_area
from explainer.losses.classification import classification_loss
from explainer.losses.entropy import entropy_loss
from explainer.losses.total_variation import total_variation
from explainer.models.masking import aggregate
from tests.golden.cases import load

DTYPES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def close(actual, expected, tolerance):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    worst = (actual.detach().double() - expected).abs().max()
    assert worst <= tolerance * max(expected.abs().max().item(), 1e-12), f"{worst:.3e}"


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["tv_0", "tv_1"])
def test_total_variation(name, dtype, tolerance):
    _, arrays, _ = load(name)
    for key, power in (("tv_abs", 1), ("tv_sq", 2)):
        masks = torch.as_tensor(arrays["in/masks"]).to(dtype).requires_grad_()
        value = total_variation(masks, padding="reflect", power=power)
        close(value, arrays[f"out/{key}"], tolerance)
        close(torch.autograd.grad(value, masks)[0], arrays[f"out/{key}_grad"], tolerance)
        per_image = torch.stack([total_variation(m[None], padding="reflect", power=power) for m in masks])
        close(per_image, arrays[f"out/{key}_per_image"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_area(dtype, tolerance):
    entry, arrays, _ = load("area_0")
    targets = torch.as_tensor(arrays["in/targets"]).to(dtype)
    for low, high in entry["args"]["min_max"]:
        key = f"out/min{low:g}_max{high:g}"
        logits = torch.as_tensor(arrays["in/segmentations"]).to(dtype).requires_grad_()
        value = area_bound_loss(logits.sigmoid(), targets, low, high, reduction="sum")
        close(value, arrays[key], tolerance)
        if f"{key}_grad" in arrays:
            close(torch.autograd.grad(value, logits)[0], arrays[f"{key}_grad"], tolerance)
    masks = torch.as_tensor(arrays["in/segmentations"]).to(dtype).sigmoid()[:, 0]
    close(bound_penalty(masks, 0.05, 0.3).mean(), arrays["out/mask_area_loss_on_first_class_masks"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_entropy(dtype, tolerance):
    _, arrays, _ = load("entropy_0")
    logits = torch.as_tensor(arrays["in/logits"]).to(dtype).requires_grad_()
    value = entropy_loss(logits)
    close(value, arrays["out/loss"], tolerance)
    close(torch.autograd.grad(value, logits)[0], arrays["out/grad"], tolerance)
    # The last row's probabilities fall below the reference's clamp (1e-16); log_softmax does not clamp, both are 0 to 1e-14.
    per_image = torch.stack([entropy_loss(row[None]) for row in logits])
    close(per_image, arrays["out/per_image"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_masks(dtype, tolerance):
    _, arrays, _ = load("masks_0")
    logits = torch.as_tensor(arrays["in/segmentations"]).to(dtype).requires_grad_()
    target, rest = aggregate(logits.sigmoid(), torch.as_tensor(arrays["in/targets"]).to(dtype))
    close(target, arrays["out/target_mask"], tolerance)
    close(rest, arrays["out/non_target_mask"], tolerance)
    weighted = (target * torch.as_tensor(arrays["in/w_target"])).sum() + (rest * torch.as_tensor(arrays["in/w_non_target"])).sum()
    close(torch.autograd.grad(weighted, logits)[0], arrays["out/grad"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["trainloss_voc_0", "trainloss_voc_1"])
def test_training_loss(name, dtype, tolerance):
    """One step of the published training loop: every term, the sum and the gradient through the frozen classifier."""
    entry, arrays, net = load(name)
    a = entry["args"]
    net = net.to(dtype)
    image = torch.as_tensor(arrays["in/image"]).to(dtype)
    targets = torch.as_tensor(arrays["out/targets"]).to(dtype)
    logits = torch.as_tensor(arrays["in/segmentations"]).to(dtype).requires_grad_()
    masks = logits.sigmoid()
    target, rest = aggregate(masks, targets)
    both = net(torch.cat([image * target[:, None], image * (1 - target[:, None])]))
    through, inverse = both.chunk(2)
    close(through, arrays["out/logits_mask"], tolerance)
    close(inverse, arrays["out/logits_inverse"], tolerance)
    parts = {
        "classification": classification_loss(through, targets),
        "neg_entropy": entropy_loss(inverse),
        "tv_target": total_variation(target, "reflect"),
        "tv_non_target": total_variation(rest, "reflect"),
        "area_bound": area_bound_loss(masks, targets, a["class_mask_min_area"], a["class_mask_max_area"], reduction="sum"),
        "mean_target": mask_area(target),
        "mean_non_target": mask_area(rest),
    }
    for key, value in parts.items():
        close(value, arrays[f"out/{key}"], tolerance)
    total = (
        parts["classification"]
        + a["entropy_regularizer"] * parts["neg_entropy"]
        + a["mask_variation_regularizer"] * (parts["tv_target"] + parts["tv_non_target"])
        + a["mask_area_constraint_regularizer"] * parts["area_bound"]
        + a["mask_total_area_regularizer"] * parts["mean_target"]
        + a["ncmask_total_area_regularizer"] * parts["mean_non_target"]
    )
    close(total, arrays["out/loss"], tolerance)
    close(torch.autograd.grad(total, logits)[0], arrays["out/grad_segmentations"], tolerance)
