"""``explainer calibrate``: a selector from labelled images."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

import explainer
from explainer.commands import assembly
from explainer.commands.calibrate_config import CalibrateConfig
from explainer.commands.numbers import require_least, require_share
from explainer.errors import ConfigError
from explainer.evaluation.config import EvaluateConfig
from explainer.fills import FillKind, judging_fill
from explainer.inference.classifier import require_same_classifier
from explainer.inference.describe import describe
from explainer.inference.judging import selector_verdict
from explainer.inference.outputs import writable_file
from explainer.inference.refinement import check_method
from explainer.inference.selection import accepted_loss, calibrate, calibration_pairs, truth_loss


def run(config: CalibrateConfig) -> int:
    """Calibrate, write the selector, print what it accepts on the calibration images."""
    if not config.model:
        raise ConfigError("model is missing: name the trained Explainer with --model runs/<run>/checkpoints/best.ckpt.")
    require_least(config, 1, "batch_size", "limit", "iterations")
    require_share(config, "alpha", "delta")  # now: the threshold is chosen at the end
    require_share(config, "predicted_from", ends=True)
    writable_file(config.out)
    setting = EvaluateConfig(
        data=config.data,
        split=config.split,
        classifier=config.classifier,
        seed=config.seed,
        batch_size=config.batch_size,
        sample=config.limit,
    )
    data = assembly.data_module(setting)
    explanandum = assembly.classifier(setting, data)
    if config.fallback == "refine":
        check_method(config.method, explanandum)
    net = explainer.load(config.model, explanandum if explanandum.differentiable else None)
    description = describe(net)
    if notice := require_same_classifier(explanandum, description, config.model):
        print(notice, file=sys.stderr)
    assembly.check_meaning(net, data, config.split, f"model {config.model}")
    fill: FillKind = config.fill or judging_fill(net.metadata.get("fill"))
    number = len(data.dataset(config.split))
    parts = [range(i, min(i + config.batch_size, number)) for i in range(0, number, config.batch_size)]
    refinement = {"method": config.method, "iterations": config.iterations} if config.fallback == "refine" else None
    scores, losses = calibration_pairs(
        net,
        explanandum,
        data.batches(config.split, parts),
        loss=lambda m, t: truth_loss(m, t, config.least_iou),
        fallback=config.fallback,
        fill=fill,
        refinement=refinement,
        generator=torch.Generator().manual_seed(config.seed),
        classes=config.classes,
        predicted_from=config.predicted_from,
    )
    selector = calibrate(
        scores,
        losses,
        config.alpha,
        config.kind,
        config.delta,
        fallback=config.fallback,
        fill=fill,
        refinement=refinement,
        classes=config.classes,
        predicted_from=config.predicted_from,
        explainer=description["weights"],
        classifier=explanandum.fingerprint(),
    )
    selector = replace(selector, verdict=tuple(selector_verdict(scores, losses, selector.threshold)))
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    selector.save(config.out)
    loss, accepted = accepted_loss(scores, losses, selector.threshold)
    share = float(accepted.float().mean())
    bad = float(loss.sum() / accepted.sum()) if share else 0.0
    print(
        f"{config.out}: threshold {selector.threshold:.4f} from {selector.images} of {number} images (one of their "
        f"{'predicted classes' if config.classes == 'predicted' else 'labels'} each); {share:.1%} accepted, mean loss {bad:.3f} among "
        f"them, {float(losses[:, 0].mean()):.3f} among all"
    )
    for sentence in selector.verdict:
        print(sentence)
    return 0
