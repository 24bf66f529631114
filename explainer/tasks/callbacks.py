"""Lightning callbacks and loggers of a training run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from explainer.attribution.rest import at_rest
from explainer.config import RunConfig
from explainer.data.datamodule import DataModule
from explainer.data.samplers import sample_seed, spread_over_classes
from explainer.errors import NumericalError
from explainer.fills import make_fill
from explainer.models.masking import aggregate
from explainer.tensors import Batch


class StepSeed(pl.Callback):
    """Seed torch at every step from (seed, step, rank), so that dropout draws the same numbers after a resume."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Before the forward pass."""
        torch.manual_seed(sample_seed(self.seed, trainer.global_step, trainer.global_rank) % 2**63)


class FiniteGradients(pl.Callback):
    """Stop before an optimiser step whose gradient is not finite: a finite loss can have one (the root of 0), and the step would ruin the
    weights and the checkpoint after it, an epoch before any loss says so.

    With ``16-mixed`` nothing is checked: there infinite gradients are a part of the method, and their steps are left out.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Remember whose gradients are being summed."""
        self.ids.extend(batch.ids)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Raises NumericalError."""
        ids, self.ids = self.ids, []
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            raise NumericalError(
                f"the gradient's norm is {float(norm)} in step {trainer.global_step}, although the loss is finite; the step was not taken. "
                f"Images of the batch: {', '.join(ids)}. Lower the learning rate, or set trainer.precision to 32-true; go on with "
                "--ckpt_path last."
            )


class HealthAlarm(pl.Callback):
    """Warn when training has settled in a solution that is none: grey masks, dead masks, full masks, or evidence left behind.

    The grey solution (masks near 0.2 everywhere) satisfies the classification loss on the masked image while the classifier is still
    sure of the inverse-masked one. Also warn, before any time is spent, of a classifier that is sure of a class on an empty image.

    Args:
        remedies: what to try against masks that show nothing, see :func:`remedies`.
    """

    def __init__(self, remedies: Sequence[str] = ()) -> None:
        self.remedies = tuple(remedies)
        self.alike = float("nan")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Ask the classifier about an image of nothing but the fill, where that does not depend on the image."""
        if pl_module.masking.fill not in ("mean", "black", "grey", "white"):
            return
        batch = next(iter(trainer.datamodule.eval_dataloader("val")), None)  # type: ignore[attr-defined]
        if batch is None:  # none of this process's images could be read
            return
        image = batch.images[:1].to(pl_module.device)
        with torch.no_grad():
            nothing = make_fill(image, pl_module.masking.fill, mean=pl_module.explanandum.mean).expand_as(image)
            logits = pl_module.explanandum(nothing).float()[0]
        message = empty_image_message(logits, pl_module.explanandum.task, pl_module.explanandum.class_names)
        if message is not None:
            pl.utilities.rank_zero_warn(message)

    @rank_zero_only
    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, *_: Any) -> None:
        """Compare the masks of the first images with each other. No metric: which images meet depends on the batches."""
        if batch_idx == 0 and not trainer.sanity_checking:
            self.alike = alike(pl_module.explainer, batch[:_COMPARED])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the epoch's diagnostics."""
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k in HEALTH}
        values["alike"] = self.alike
        for message in health_messages(values, self.remedies) if trainer.sanity_checking is False else []:
            pl.utilities.rank_zero_warn(message)


def empty_image_message(logits: torch.Tensor, task: str, class_names: tuple[str, ...]) -> str | None:
    """What follows from the classifier's logits ``[K]`` on an image of nothing but the fill; None if it is not sure of any class."""
    p, k = (logits.sigmoid() if task == "multilabel" else logits.softmax(0)).max(0)
    if p <= 0.5:
        return None
    return (
        f"the classifier answers {class_names[int(k)]} ({float(p):.0%}) on an empty image (masking.fill). The masks may hold scraps that "
        "only change this answer, or leave that class out. Train the classifier with classifier.occlusion.blank: 0.1, or use another fill."
    )


#: What :func:`health_messages` reads.
HEALTH = ("val/grey", "val/area", "val/own_area", "val/left", "val/drop")
_COMPARED = 8  # images whose masks are compared


def alike(net: Any, batch: Batch) -> float:
    """Mean correlation of the target masks of neighbouring images of a batch; near 1 they follow the position and not the image. NaN where
    fewer than two masks vary.

    Args:
        net: images, class indices -> masks.
        batch: some images with their labels.
    """
    classes = batch.targets.amax(dim=0).nonzero()[:, 0]
    if len(classes) == 0 or len(batch) < 2:
        return float("nan")
    with torch.no_grad():
        masks = aggregate(net(batch.images, classes).float(), batch.targets[:, classes])[0].flatten(1).double()
    masks = masks - masks.mean(dim=1, keepdim=True)
    masks = masks[masks.square().sum(dim=1) > 1e-6]
    unit = torch.nn.functional.normalize(masks, dim=1)
    return float((unit[1:] * unit[:-1]).sum(dim=1).mean()) if len(unit) > 1 else float("nan")


def remedies(config: RunConfig) -> list[str]:
    """What helps against masks that show nothing and is not set in this run yet."""
    m, e = config.masking, config.explainer
    done = {
        "masking.binarize: 0.5": m.binarize >= 0.5,
        "masking.subset: 0.5 with losses.remainder, where images have several labels": m.subset > 0,
        "explainer.init_encoder: true or explainer.encoder: shared": e.init_encoder or e.encoder == "shared",
        "a warm-up by losses.distillation": "distillation" in config.losses,
        "masking.fill: random": m.fill == "random",
        "a classifier trained with classifier.occlusion, if it was not": False,
    }
    return [name for name, is_set in done.items() if not is_set]


def health_messages(values: dict[str, float], remedies: Sequence[str] = ()) -> list[str]:
    """What is wrong with the masks, in words.

    Args:
        values: val/grey, val/area, val/own_area, val/left, val/drop, and ``alike`` (:func:`alike`); missing ones are not judged.
        remedies: what to try next.
    """
    messages = []
    grey, area, left = values.get("val/grey", 0.0), values.get("val/area", 0.5), values.get("val/left", 0.0)
    own, similar = values.get("val/own_area", 0.5), values.get("alike", 0.0)
    advice = f" Try: {'; '.join(remedies)}." if remedies else ""
    if grey > 0.5 and left > 0.3:
        messages.append(
            f"grey solution: {grey:.0%} of the target mask's values lie in [0.1, 0.9] and {left:.0%} of the labels are still detected "
            f"through the inverse mask.{advice}"
        )
    if similar > 0.9:
        messages.append(
            f"the masks of different images are alike (correlation {similar:.2f}): they follow the position, not the image.{advice}"
        )
    if area < 0.005:
        messages.append(f"dead masks: the mean area is {area:.4f}. Lower losses.target_area and area_bound weights, or the learning rate.")
    if own > 0.95:
        messages.append(
            f"full masks: the labels' own masks have a mean area of {own:.3f}. Raise losses.target_area and area_bound weights, or lower "
            "the learning rate."
        )
    return messages


class MaskPictures(pl.Callback):
    """Draw the masks of a fixed set of validation images every few epochs, and of the final weights, into ``<run>/images`` and wandb.

    Attributes:
        latest: the picture that was drawn last; None before the first.
    """

    def __init__(self, folder: Path, images: int = 6, every_n_epochs: int = 5) -> None:
        self.folder, self.images, self.every = folder, images, max(1, every_n_epochs)
        self.batch: Batch | None = None
        self.latest: Path | None = None
        self._step = -1  # at which it was drawn

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: Any
    ) -> None:
        """Keep images that are spread over the classes; the first ones where that cannot be known."""
        if batch_idx == 0 and self.batch is None and self.images:
            self.batch = _spread_images(trainer, self.images, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw every few epochs."""
        if not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every == 0:
            self._draw(trainer, pl_module, trainer.current_epoch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what the last step has left, whatever ended the training."""
        self._draw(trainer, pl_module, max(0, trainer.current_epoch - 1))

    @rank_zero_only
    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        if self.batch is None or self.images == 0 or self._step == trainer.global_step:
            return
        from explainer.figures import mask_sheet

        batch = self.batch
        # The classes that these images have: of a thousand, the others would be computed for nothing.
        some = batch.targets.amax(dim=0).nonzero()[:, 0]
        classes = some if len(some) else torch.zeros(1, dtype=torch.long, device=batch.targets.device)
        targets = batch.targets[:, classes]
        net: Any = module.explainer
        with torch.no_grad(), at_rest(net):
            masks = net(batch.images, classes).float()
        path = self.folder / f"epoch_{epoch:03d}.png"
        names = [net.class_names[k] for k in classes.tolist()]
        mask_sheet(batch.images, masks, targets, names, path, merged=aggregate(masks, targets)[0])
        self.latest, self._step = path, trainer.global_step
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("masks", [str(path)], step=trainer.global_step)


def _spread_images(trainer: pl.Trainer, number: int, first: Batch) -> Batch:
    """``number`` validation images of all classes in turn, or those of the first batch where reading a label costs an image."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DataModule) or not data.dataset("val").cheap_targets:
        return first[:number]
    chosen = spread_over_classes(data.members("val"), number)
    found = next(iter(data.batches("val", [chosen])), None)
    return first[:number] if found is None else found.to(first.images.device)


def in_torchrun() -> tuple[int, int] | None:
    """(processes per node, nodes) under torchrun, else None."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    local, world = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("WORLD_SIZE", "1"))
    return local, max(1, world // local)
