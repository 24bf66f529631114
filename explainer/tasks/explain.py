"""Training the Explainer (Stalder et al. 2022, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from explainer.attribution.gradients import require_gradients
from explainer.config import MaskingConfig, OptimizerConfig
from explainer.errors import ConfigError
from explainer.fills import alternative_fill, alternative_kind, blend, make_fill
from explainer.losses.base import Explanation, build_terms, total_loss
from explainer.metrics.segmentation import soft_iou
from explainer.models.area_conditioned import area_masks
from explainer.models.checkpoints import hyper_parameters
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from explainer.models.folding import folded
from explainer.models.masking import aggregate
from explainer.models.networks import encoder_of
from explainer.models.token_masking import forward_masked
from explainer.models.untrusted import self_contained
from explainer.tasks.class_sample import of_classes, sample_classes
from explainer.tasks.diagnostics import diagnostics
from explainer.tasks.draws import Draws
from explainer.tasks.handed_over import require_batch, require_data_order, require_fit, require_order
from explainer.tasks.optim import configure
from explainer.tasks.ranks import Means, mean_over_ranks
from explainer.tensors import Batch

RANDOM_FILLS = ("mean", "blur", "noise", "shuffle")


class ExplainTask(pl.LightningModule):
    """One Explainer learns to explain one frozen Explanandum; no pixel labels are used (ground truth, where present, is only scored).

    The Explanandum is kept out of the checkpoint; its fingerprint is in it and is checked on load.

    Args:
        explainer: the network that is trained.
        explanandum: the classifier.
        losses: terms by name with weight and options.
        masking: fill, binarisation, subsets.
        optimizer: optimiser and schedule.
        seed: seed of all that is random in a step, together with the step and the images.
        provenance: plain values stored in the checkpoint (the classifier's configuration, data, versions).
        teachers: gives target maps for terms that need them, see :class:`explainer.tasks.teachers.Teachers`.
        taught: positions of the training images for which ``teachers`` has maps; None stands for all.
        no_region: names of the classes that no pixel belongs to ("no defect", "background"). They get no mask of their own; their images
            teach that the other classes' masks stay empty.
    """

    def __init__(
        self,
        explainer: Explainer,
        explanandum: Explanandum,
        losses: dict[str, dict[str, Any]],
        masking: MaskingConfig | None = None,
        *,
        optimizer: OptimizerConfig | None = None,
        seed: int = 0,
        provenance: dict[str, Any] | None = None,
        teachers: Callable[..., Tensor] | None = None,
        taught: Sequence[int] | None = None,
        no_region: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_options(explainer, explanandum, losses, masking, optimizer=optimizer, taught=teachers is not None)
        self.explainer, self.explanandum = explainer, explanandum.eval()
        self.terms = build_terms(losses)
        self.teachers, self.taught = teachers, taught
        self.masking = masking or MaskingConfig()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.seed = seed
        self.fingerprint = explanandum.fingerprint()
        self.register_buffer("no_region", _members(explainer.class_names, no_region), persistent=False)
        network = {**explainer.config, "options": self_contained(explainer.config["options"])}
        # task, fill and area_temperature: whoever shows or refines these masks later has to read scores, remove pixels and cut areas as
        # training did.
        saved: dict[str, Any] = {"kind": "explainer", "explainer": network, "fingerprint": self.fingerprint, "losses": losses}
        saved |= {"task": explanandum.task, "fill": self.masking.fill, "area_temperature": self.masking.area_temperature}
        saved["no_region"] = list(no_region)
        saved["optimizer"] = asdict(self.optimizer_config)
        self.save_hyperparameters({**saved, **(provenance or {})}, logger=False)
        self.strict_loading = False  # the Explanandum's weights are left out on purpose; on_load_checkpoint checks the rest
        self.means = Means()
        self._believed = False
        self._learning: list[nn.Parameter] = []
        self._passes: list[Explanandum] = []  # in a list: no part of the module

    no_region: Tensor | None

    # ------------------------------------------------------------------ the classifier stays frozen
    def setup(self, stage: str) -> None:
        """Freeze the Explanandum, so that no strategy waits for gradients of a classifier that its user may still train elsewhere."""
        self._learning = [p for p in self.explanandum.parameters() if p.requires_grad]
        self.explanandum.requires_grad_(False)

    def on_fit_start(self) -> None:
        """The data's classes must be in the classifier's order."""
        require_data_order(self.trainer, self.explanandum.class_names, "the Explanandum")

    def teardown(self, stage: str) -> None:
        """Give the parameters their flags back."""
        for parameter in self._learning:
            parameter.requires_grad_(True)
        self._learning, self._passes = [], []

    # ------------------------------------------------------------------ checkpoints
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Without the Explanandum, which would double the size of every checkpoint."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        for key in [k for k in state if k.startswith("explanandum.")]:
            del state[key]
        return state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the Explanandum's fingerprint."""
        checkpoint["fingerprint"] = self.fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the kind, the fingerprint, and that only the Explanandum's keys are missing."""
        hyper_parameters(checkpoint, "explainer", "this file")
        self.explanandum.require_fingerprint(checkpoint.get("fingerprint", "none"), "this checkpoint")
        require_fit(self.state_dict(), checkpoint["state_dict"], "Explainer", "explainer")

    # ------------------------------------------------------------------ steps
    def forward(self, images: Tensor) -> Tensor:
        """Images in [0,1] -> class masks ``[B,K,H,W]``."""
        masks: Tensor = self.explainer(images)
        return masks

    def _explanation(self, batch: Batch, stage: str) -> Explanation:
        require_batch(batch)
        images = batch.images
        targets = batch.targets if self.no_region is None else batch.targets * ~self.no_region
        draws = Draws(self.seed, self.global_step if stage == "train" else -1, batch)
        classes = sample_classes(targets, self.masking.absent_classes, Draws(draws.seed, draws.step, batch, "classes"))
        present = of_classes(targets, classes)
        # Validation uses the final weights: under a schedule, the losses of different epochs could not be compared.
        progress = self._progress() if stage == "train" else 1.0
        active = [t for t in self.terms.values() if t.weight_at(progress) != 0]
        order_logits = None
        if stage == "train" and self.masking.area_conditioned > 0:
            class_masks = self._cut_to_areas(self.explainer.logits(images, classes).float(), present, draws)
        elif stage == "train" and self.explainer.has_order:
            logits, order_logits = (values.float() for values in self.explainer.logits_and_order(images, classes))
            # Zero times the order: distributed processes wait for a gradient of every weight, whatever the terms of this step ask for.
            class_masks = logits.sigmoid() + 0.0 * order_logits.mean()
        else:
            class_masks = self.explainer(images, classes).float()
        target_mask, non_target_mask = aggregate(class_masks, present)
        shown, shown_mask = targets, target_mask
        if stage == "train" and self.masking.subset > 0:
            shown = self._subset(targets, draws)
            shown_mask = aggregate(class_masks, of_classes(shown, classes))[0]
        if stage == "train" and self.masking.binarize > 0:
            shown_mask = self._binarize(shown_mask, draws)
        passing = [t.name for t in active if t.needs_passes]
        if stage == "train" and passing and not self._believed:
            require_gradients(self.explanandum, images, f"losses.{passing[0]}")
            self._believed = True
        # Evaluation measures what the masks keep and leave even where no term asks, but not where each look is paid for.
        if any(t.needs_passes for t in active) or (stage != "train" and self.explanandum.differentiable):
            logits_masked, logits_inverse = self._masked(images, shown_mask, draws).float().chunk(2)
        else:
            logits_masked = logits_inverse = targets.new_full(targets.shape, torch.nan)
        teacher = self._teach(batch, targets, stage, draws.common, classes) if any(t.needs_teacher for t in active) else None
        order = self._teach(batch, targets, stage, draws.common, classes, "order") if any(t.needs_order for t in active) else None
        return Explanation(
            images,
            targets,
            class_masks,
            target_mask,
            non_target_mask,
            logits_masked,
            logits_inverse,
            shown,
            self.explanandum.task,
            self.explanandum,
            draws.each,
            progress,
            batch.ids,
            teacher,
            order,
            classes,
            self.no_region,
            order_logits,
        )

    def copies_only(self, progress: float) -> bool:
        """Whether at this share of the training maps are copied and no term learns from the classifier: then an image without a map
        teaches next to nothing.
        """
        active = [t for t in self.terms.values() if t.weight_at(progress) != 0]
        return any(t.needs_teacher or t.needs_order for t in active) and not any(t.needs_passes or t.needs_classifier for t in active)

    def training_images(self, progress: float) -> Sequence[int] | None:
        """Positions of the images that a training batch is drawn from; None stands for all.

        Args:
            progress: share of the training that is done, in [0,1].
        """
        return self.taught if self.taught is not None and self.copies_only(progress) else None

    def _progress(self) -> float:
        if self._trainer is None:
            return 0.0
        total = self.trainer.estimated_stepping_batches
        return min(1.0, self.global_step / total) if 0 < total < float("inf") else 0.0

    def _teach(
        self, batch: Batch, targets: Tensor, stage: str, generator: torch.Generator, classes: Tensor | None, subject: str = "masks"
    ) -> Tensor:
        assert self.teachers is not None
        with torch.autocast(self.device.type, enabled=False):
            asked = {} if subject == "masks" else {"subject": subject}  # any callable may teach masks
            return self.teachers(replace(batch, targets=targets), stage, generator, classes, **asked)

    def _cut_to_areas(self, logits: Tensor, targets: Tensor, draws: Draws) -> Tensor:
        """Masks ``[B,K,H,W]``; for a share of the images those of the present classes have one random area, all others are plain."""
        least, greatest = (math.log(a) for a in self.masking.areas)
        area = torch.exp(least + (greatest - least) * draws.uniform()).to(logits)
        chosen = (draws.uniform() < self.masking.area_conditioned).to(logits.device)
        cut = area_masks(logits, area, self.masking.area_temperature)
        return torch.where((chosen[:, None] & (targets > 0.5))[:, :, None, None], cut, logits.sigmoid())

    def _masked(self, images: Tensor, mask: Tensor, draws: Draws) -> Tensor:
        """Logits ``[2B,K]`` of what the mask keeps, then of what it leaves: one pass through the classifier instead of two."""
        if self.masking.fill == "tokens":
            return forward_masked(self.explanandum, torch.cat([images, images]), torch.cat([mask, 1 - mask]))
        fill = self._fill(images, draws)
        if not self._passes or self._passes[0].mean.device != images.device:
            self._passes = [folded(self.explanandum, images.detach())]
        logits: Tensor = self._passes[0](torch.cat([blend(images, mask, fill), blend(images, 1 - mask, fill)]))
        return logits

    def _fill(self, images: Tensor, draws: Draws) -> Tensor:
        kind = self.masking.fill
        if kind == "alternative":
            which = alternative_kind(draws.common)
            return alternative_fill(images, self.explanandum.mean, self.explanandum.std, generator=draws.each, kind=which)
        if kind == "random":
            kind = RANDOM_FILLS[int(torch.randint(len(RANDOM_FILLS), (1,), generator=draws.common))]  # type: ignore[assignment]
        return make_fill(images, kind, mean=self.explanandum.mean, generator=draws.each)  # type: ignore[arg-type]

    def _subset(self, targets: Tensor, draws: Draws) -> Tensor:
        """A random part of the labels for a share of the multi-label images (never none of them), all labels for the others."""
        chosen = (draws.uniform(1) < self.masking.subset).to(targets)
        part = targets * (draws.uniform(targets.shape[1]) < 0.5).to(targets)
        usable = chosen * (part.sum(dim=1, keepdim=True) > 0).to(targets)
        return usable * part + (1 - usable) * targets

    def _binarize(self, mask: Tensor, draws: Draws) -> Tensor:
        """Threshold a share of the masks at random levels; the gradient passes as if they were soft (straight-through)."""
        level = 0.1 + 0.8 * draws.uniform(1, 1)
        chosen = (draws.uniform(1, 1) < self.masking.binarize).to(mask)
        hard = (mask > level.to(mask)).to(mask)
        return mask + chosen * (hard - mask).detach()

    def _shared_step(self, batch: Batch, stage: str) -> Tensor:
        e = self._explanation(batch, stage)
        with torch.autocast(self.device.type, enabled=False):
            total, values = total_loss(self.terms, e)
        if stage == "train":
            # A term without weight is logged as NaN: Lightning would repeat its last value until the end of the epoch.
            losses = {f"loss/{k}": values.get(k, total.new_tensor(torch.nan)) for k in self.terms}
            row = {"loss": total, **losses, **{k: v.nanmean() for k, v in diagnostics(e).items()}}
            row = mean_over_ranks({f"train/{k}": v.detach() for k, v in row.items()}, self)
            self.log("train/loss", row.pop("train/loss"), prog_bar=True, batch_size=len(batch))
            self.log_dict(row, batch_size=len(batch))
        else:
            row = {"loss": total.detach().expand(len(batch)), **{f"loss/{k}": v.detach().expand(len(batch)) for k, v in values.items()}}
            unseen = ("kept", "left", "drop") if bool(e.logits_masked.isnan().all()) else ()
            row |= {name: value for name, value in diagnostics(e).items() if name not in unseen}
            if batch.masks is not None:
                truth = aggregate(batch.masks, batch.targets)[0]
                row["iou"] = soft_iou(e.target_mask.detach(), truth, batch.void)
            self.means.update(row)
        return total

    def _finish(self, stage: str) -> None:
        results = {f"{stage}/{name}": value for name, value in self.means.compute(self.device).items()}
        self.log(f"{stage}/loss", results.pop(f"{stage}/loss"), prog_bar=True)
        self.log_dict(results)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One optimiser step."""
        return self._shared_step(batch, "train")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same losses with all labels shown and soft masks, and IoU where there is ground truth."""
        self._shared_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As validation."""
        self._shared_step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Class masks ``[B,K,H,W]``."""
        masks: Tensor = self.explainer(batch.images)
        return masks

    def on_validation_epoch_end(self) -> None:
        """Epoch means."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Epoch means."""
        self._finish("test")

    def configure_optimizers(self) -> Any:
        """Only the Explainer is trained."""
        return _optimizers(self.explainer, self.optimizer_config, lambda: int(self.trainer.estimated_stepping_batches))


def _optimizers(explainer: Explainer, config: OptimizerConfig, total_steps: Callable[[], int]) -> dict[str, Any]:
    inner = encoder_of(explainer.network)
    return configure(explainer.parameters(), config, total_steps, () if inner is None else inner.parameters())


def check_options(
    explainer: Explainer,
    explanandum: Explanandum,
    losses: dict[str, dict[str, Any]],
    masking: MaskingConfig | None,
    *,
    optimizer: OptimizerConfig | None,
    taught: bool,
) -> None:
    """Refuse what :class:`ExplainTask` cannot train with. Cheap, so that it can be asked before maps are computed.

    Args:
        explainer, explanandum, losses, masking, optimizer: what :class:`ExplainTask` is built from.
        taught: whether there are teachers.

    Raises:
        ConfigError: classes, losses, masking or optimiser do not fit each other or this classifier.
    """
    if explainer.num_classes != explanandum.num_classes:
        raise ConfigError(f"the Explainer has {explainer.num_classes} classes, the Explanandum {explanandum.num_classes}; they must agree.")
    require_order(explainer.class_names, explanandum.class_names, "the Explainer", "the Explanandum")
    for term in build_terms(losses).values():
        if isinstance(term, nn.Module):
            raise ConfigError(f"loss term {type(term).__name__} must not be a module: terms have no parameters.")
        if term.needs_passes and not explanandum.differentiable:
            raise ConfigError(
                f"losses.{term.name} backpropagates through the classifier, and this classifier gives scores only: use "
                "losses.coalition or losses.distillation, with terms that look at masks alone (area_bound, total_variation, "
                "non_target_area)."
            )
        if (term.needs_teacher or term.needs_order) and not taught:
            subject = ", teaches: order" if term.needs_order else ""
            raise ConfigError(f"losses.{term.name} needs teachers: add teachers: [{{name: grad_cam{subject}}}] to the configuration.")
    masking = masking or MaskingConfig()
    if masking.subset > 0 and explanandum.task != "multilabel":
        raise ConfigError("masking.subset needs a multilabel classifier; set it to 0.")
    if not (len(masking.areas) == 2 and 0 < masking.areas[0] <= masking.areas[1] < 1):
        raise ConfigError(f"masking.areas must be two shares of the image, 0 < least <= greatest < 1, received {masking.areas}.")
    for name in ("binarize", "subset", "area_conditioned"):
        if not 0 <= getattr(masking, name) <= 1:
            raise ConfigError(f"masking.{name} is a share of the images in [0,1], received {getattr(masking, name)}.")
    if masking.absent_classes is not None and masking.absent_classes < 1:
        raise ConfigError(f"masking.absent_classes must be at least 1, received {masking.absent_classes}.")
    if not masking.area_temperature > 0:
        raise ConfigError(f"masking.area_temperature must be positive, received {masking.area_temperature}.")
    _optimizers(explainer, optimizer or OptimizerConfig(), lambda: 1)


def _members(names: Sequence[str], chosen: Sequence[str]) -> Tensor | None:
    """``[K]`` bool, which of the names are chosen; None for none of them."""
    if unknown := [name for name in chosen if name not in names]:
        raise ConfigError(f"no_region names {unknown[0]!r}, which is not a class. Classes: {', '.join(names)}.")
    if chosen and len(set(chosen)) == len(names):
        raise ConfigError("no_region names every class: there is nothing left that a mask could show.")
    return torch.tensor([name in chosen for name in names]) if chosen else None
