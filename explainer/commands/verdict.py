"""The verdict in words that ``fit`` ends with: what a few validation pictures say about masks and classifier, in a few seconds."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import explainer
from explainer import baselines
from explainer.config import RunConfig
from explainer.data.contract import collate
from explainer.data.datamodule import DataModule
from explainer.data.samplers import spread, spread_over_classes
from explainer.errors import ExplainerError
from explainer.fills import judging_fill
from explainer.inference.judging import Judge
from explainer.inference.rivals import LEAST, START, UNTRAINED, compare, pinned, weaker_than_majority
from explainer.losses.area import AreaBound
from explainer.models.encoders import init_encoder
from explainer.models.explainer import Explainer
from explainer.models.shared import SharedNetwork
from explainer.tasks.callbacks import remedies
from explainer.tasks.class_report import ClassReport
from explainer.tasks.explain import ExplainTask
from explainer.tasks.run_folder import chosen_checkpoint

log = logging.getLogger(__name__)
PICTURES = 24
#: Seconds after which no further pictures are looked at, if there are enough.
SECONDS = 10.0
_PART = 8


def of_masks(config: RunConfig, task: ExplainTask, data: DataModule) -> dict[str, Any]:
    """``{"sentences": [...], ...numbers}`` about the checkpoint that the run leaves.

    Args:
        config: configuration of the run.
        task: its task; the classifier and the losses are taken from it.
        data: its images; of the val split some are taken, spread over the classes.
    """
    if not task.explanandum.differentiable:
        return {"sentences": []}  # each look may have its price
    dataset = data.dataset("val")
    number = min(PICTURES, len(dataset))
    positions = (
        spread_over_classes(data.members("val"), number, config.seed)
        if dataset.cheap_targets
        else spread(len(dataset), number, config.seed)
    )
    sentences, numbers = _masks(config, task, data, positions)
    return {"sentences": sentences, **numbers}


@torch.no_grad()
def _masks(config: RunConfig, task: ExplainTask, data: DataModule, positions: list[int]) -> tuple[list[str], dict[str, Any]]:
    e = task.explanandum
    net = explainer.load(chosen_checkpoint(Path(config.run_dir)), e).to(e.mean.device).eval()
    rivals = _rivals(config, task, net)
    parts: list[dict[str, Tensor]] = []
    start = time.monotonic()
    for first in range(0, len(positions), _PART):
        if parts and time.monotonic() - start > SECONDS / 2:  # the other half is for the comparison
            break
        part = _part(task, data, positions[first : first + _PART], net, rivals)
        if part is not None:
            parts.append(part)
    if not parts:
        return [], {}
    seen = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    sentences = weaker_than_majority(seen["probabilities"], seen["targets"], e.class_names)
    judge = Judge(None, e.class_names)
    for image, mask, k in zip(seen["images"], seen["own"], seen["classes"], strict=True):
        judge.add(image.cpu().numpy(), mask[None].cpu().numpy(), [0], [e.class_names[int(k)]])
    advice = remedies(config)
    signs = judge.sentences()
    for term in task.terms.values():
        if isinstance(term, AreaBound):
            low, high = term.bounds_of(seen["classes"])
            signs += pinned(seen["own"].mean(dim=(1, 2)).tolist(), low.tolist(), high.tolist())
    numbers: dict[str, Any] = {"images": len(seen["images"])}
    if len(seen["images"]) >= LEAST:
        maps = {name: seen[name] for name in rivals}
        found = compare(e, seen["images"], seen["own"], seen["classes"], maps, fill=judging_fill(config.masking.fill))
        sentences = [*found.sentences(advice), *sentences]
        numbers = asdict(found)
    if signs and advice and not any(s.startswith("WARNING: the masks keep") for s in sentences):
        signs[-1] += f" Not set yet: {'; '.join(advice)}."
    return sentences + signs, numbers


def _part(task: ExplainTask, data: DataModule, positions: list[int], net: Explainer, rivals: dict[str, Any]) -> dict[str, Tensor] | None:
    """A few pictures with their masks, and the rivals' maps of the same class: of the labels the most probable one."""
    e, dataset = task.explanandum, data.dataset("val")
    batch = collate([dataset[i] for i in positions]).to(e.mean.device)
    targets = batch.targets if task.no_region is None else batch.targets * ~task.no_region
    labelled = targets.sum(dim=1) > 0
    if not bool(labelled.any()):
        return None
    images, targets = batch.images[labelled], targets[labelled]
    probabilities = e.probabilities(e(images))
    classes = (probabilities + targets).argmax(dim=1)
    found = {"images": images, "targets": targets, "probabilities": probabilities, "classes": classes}
    found["own"] = net(images, classes[:, None])[:, 0].float()
    for name in list(rivals):
        try:
            with torch.enable_grad():
                found[name] = rivals[name](images, classes).detach()
        except ExplainerError as error:  # a classifier without a layer for it
            log.debug("%s is left out of the verdict: %s", name, error)
            del rivals[name]
    return found


def _rivals(config: RunConfig, task: ExplainTask, net: Explainer) -> dict[str, Any]:
    """``(images, classes) -> maps [B,H,W]`` by name."""
    found: dict[str, Any] = {}
    try:
        found["Grad-CAM"] = baselines.build("grad_cam", task.explanandum)
    except ExplainerError as error:
        log.debug("Grad-CAM is left out of the verdict: %s", error)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        fresh = Explainer.from_config(net.config, task.explanandum)
    if config.explainer.init_encoder:
        init_encoder(fresh.network, task.explanandum.classifier)
    fresh = fresh.to(task.explanandum.mean.device).eval()
    name = START if isinstance(fresh.network, SharedNetwork) and fresh.network.has_start else UNTRAINED
    found[name] = lambda images, classes: fresh(images, classes[:, None])[:, 0]
    return found


def of_classifier(report: ClassReport | None) -> list[str]:
    """What is wrong with a trained classifier, from the counts of its last validation."""
    if report is None or sum(report.support) == 0:
        return []
    total, right = sum(report.support), sum(report.right)
    found = []
    if report.confusion is not None:
        best = max(range(len(report.names)), key=lambda k: report.support[k])
        if len(report.names) > 1 and right <= report.support[best]:
            found.append(
                f"WARNING: the classifier is right for {100 * right / total:.0f} % of the val images, always answering "
                f"{report.names[best]} for {100 * report.support[best] / total:.0f} %. "
            )
    elif sum(report.predicted) - right >= right:  # its errors are at least as many as those of no answer at all
        found.append(
            f"WARNING: of {sum(report.predicted)} labels that the classifier gives the val images, {right} are right: answering that no "
            "class is there would be wrong no more often. "
        )
    if found:
        found[0] += "It is no basis for masks: more epochs, classifier.init_from or pretrained weights, data.balance: true."
    silent = [n for n, p, s in zip(report.names, report.predicted, report.support, strict=True) if s and not p]
    if silent:
        found.append(f"WARNING: never predicted on the val images: {', '.join(silent[:10])}{' ...' if len(silent) > 10 else ''}.")
    return found
