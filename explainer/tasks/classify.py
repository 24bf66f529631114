"""Training the classifier that is later explained."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from explainer.config import ClassifierConfig, MaskAugmentationConfig, OptimizerConfig
from explainer.errors import CheckpointError, ConfigError, NumericalError
from explainer.fills import blend, make_fill
from explainer.geometry import Size
from explainer.losses.training import balanced_weights, classifier_loss
from explainer.models.checkpoints import hyper_parameters, load_explanandum, read_weights, require_same_order
from explainer.models.classifiers import build_classifier
from explainer.models.explanandum import check_input_size, check_normalization
from explainer.models.masking import aggregate
from explainer.models.preprocessing import differ, normalization, recorded
from explainer.models.scores import AUXILIARY_WEIGHTS, auxiliary_logits, logits_of
from explainer.models.transfer import body_names, calm_head, freeze, has_fresh_head, init_from, still
from explainer.models.untrusted import without_files, without_start
from explainer.tasks.class_report import ClassReport
from explainer.tasks.classifier_scores import nothing, scores
from explainer.tasks.draws import Draws
from explainer.tasks.handed_over import require_batch, require_data_order, require_fit
from explainer.tasks.occluding import Occluder
from explainer.tasks.optim import configure
from explainer.tasks.ranks import mean_over_ranks
from explainer.tensors import Batch

log = logging.getLogger(__name__)


class ClassifyTask(pl.LightningModule):
    """Binary cross-entropy (multi-label) or cross-entropy (single-label), with optional augmentation: occlusion, an Explainer's masks.

    Args:
        config: the classifier.
        num_classes: number of classes K.
        task: ``multilabel`` or ``multiclass``.
        class_names: names of the K classes, stored in the checkpoint.
        optimizer: optimiser and schedule.
        seed: random seed of the occlusion masks and of the mask augmentation.
        mask_explainer: the Explainer of ``config.mask_augmentation``: images in [0,1] -> class masks ``[B,K,H,W]``.
        class_counts: number of training images of each class and of all, ``([K], N)``; needed for balanced class weights.
        image_size: size of the training images in pixels, the side or (height, width); stored in the checkpoint.

    The files that ``config.checkpoint`` and ``config.init_from`` name are read by :meth:`start`, which a fresh training calls and a
    resumed one does not.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        num_classes: int,
        task: Literal["multilabel", "multiclass"],
        class_names: tuple[str, ...],
        *,
        optimizer: OptimizerConfig | None = None,
        seed: int = 0,
        mask_explainer: nn.Module | None = None,
        class_counts: tuple[Tensor, int] | None = None,
        image_size: Size | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 2 and task == "multiclass":
            raise ConfigError(
                f"the data has one class ({', '.join(class_names)}) and one label an image: there is nothing to tell apart. Add a "
                "folder of images without it (a class of its own), or use data.name: csv with empty labels for them."
            )
        if config.checkpoint is not None and config.init_from is not None:
            raise ConfigError(
                f"classifier.checkpoint ({config.checkpoint}) and classifier.init_from ({config.init_from}) both say what training starts "
                "from: give one. checkpoint has to fit whole, init_from may leave the head out."
            )
        if config.init_from is not None or config.checkpoint is not None:
            # The library's trained start would be replaced at once: it is not fetched.
            config = replace(config, options=without_start(config.arch, config.options))
        own = recorded(config.arch, config.options)
        if config.input_size is None and own is not None and own.fixed and image_size not in (None, own.size):
            config = replace(config, input_size=own.size)
        self._given = (config.mean, config.std)
        mean, std = normalization(config.arch, config.options, config.mean, config.std)
        config = replace(config, mean=mean, std=std, options=dict(config.options))
        for name in ("probability", "max_share", "keep", "jitter", "blank"):
            if not 0 <= getattr(config.occlusion, name) <= 1:
                raise ConfigError(f"classifier.occlusion.{name} is a share between 0 and 1, received {getattr(config.occlusion, name)}.")
        self.config, self.task, self.seed = config, task, seed
        self._mask_explainer: list[nn.Module] = []  # a list: neither a part of the checkpoint nor trained
        self._masked_classes: Tensor | None = None
        if mask_explainer is not None:
            self._mask_explainer = [mask_explainer.eval().requires_grad_(False)]
            self._masked_classes = _class_selection(config.mask_augmentation, mask_explainer, class_names)
        self.optimizer_config = optimizer or OptimizerConfig()
        self.save_hyperparameters(
            {
                "kind": "classifier",
                "classifier": without_files(config),
                "num_classes": num_classes,
                "task": task,
                "class_names": list(class_names),
                "image_size": list(image_size) if isinstance(image_size, tuple) else image_size,
                "optimizer": asdict(self.optimizer_config),
            },
            logger=False,
        )
        self.classifier: nn.Module = build_classifier(config.arch, num_classes, **config.options)
        if without_start(config.arch, config.options) != config.options and has_fresh_head(self.classifier, num_classes):
            calm_head(self.classifier, num_classes)
        freeze(self.classifier, config.freeze, num_classes)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        check_normalization(self.mean, self.std)
        check_input_size(config.input_size)
        self._occluder = Occluder(config, self.classifier, num_classes, task)
        weights = _class_weights(config, task, class_names, class_counts)
        self.register_buffer("class_weights", weights, persistent=False)
        self.losses = nn.ModuleDict({stage: MeanMetric() for stage in ("fit", "val", "test")})
        self.scores = nn.ModuleDict({stage: scores(task, num_classes, stage) for stage in ("val", "test")})
        self.per_class: list[float] = []
        self.report: ClassReport | None = None

    mean: Tensor
    std: Tensor
    class_weights: Tensor | None

    def start(self) -> None:
        """Load what ``config.checkpoint`` or ``config.init_from`` names.

        Raises:
            CheckpointError: the file is missing or unusable, or too little of it fits.
            ConfigError: a checkpoint of this project is for other classes.
        """
        c, K = self.config, self.hparams["num_classes"]
        source = c.checkpoint or c.init_from
        if source is None:
            return
        if c.checkpoint is not None:
            names = self.hparams["class_names"]
            try:
                whole = load_explanandum(
                    c.checkpoint, c.arch, c.options, K, task=self.task, class_names=names, mean=c.mean, std=c.std, input_size=c.input_size
                )
                self.classifier.load_state_dict(whole.classifier.state_dict())
            except (CheckpointError, RuntimeError) as error:
                raise CheckpointError(
                    f"{' '.join(str(error).split())[:600]} With task classify, all of classifier.checkpoint has to fit; "
                    "classifier.init_from takes what fits and may leave the head out."
                ) from error
            log.warning("classifier.checkpoint: training goes on from all weights of %s.", c.checkpoint)
        saved = hyper_parameters(read_weights(source), "classifier", source)
        if c.checkpoint is None:
            if saved is not None:
                require_same_order(saved.get("class_names", ()), self.hparams["class_names"], f"classifier.init_from {source}")
            log.warning("%s", init_from(self.classifier, source, K).description)
        if saved is not None:
            self.adopt_normalization(saved.get("classifier"), source)

    def adopt_normalization(self, section: Any, source: str) -> None:
        """Take over mean and std of a classifier of this project, unless the configuration gives its own."""
        if not isinstance(section, dict):
            return
        for label, given, buffer in zip(("mean", "std"), self._given, (self.mean, self.std), strict=True):
            value = section.get(label)
            if value is None or len(value) != buffer.numel():
                continue
            if given is None:
                buffer.copy_(torch.tensor(value).view_as(buffer))
                setattr(self.config, label, list(value))
                self.hparams["classifier"][label] = list(value)
            elif differ(given, value):
                log.warning("classifier.%s is %s, but %s was trained with %s: leave it out to use the same.", label, given, source, value)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the weights; they go with the normalisation that they were trained with."""
        hyper_parameters(checkpoint, "classifier", "this file")
        require_fit(self.state_dict(), checkpoint["state_dict"], "classifier", "classifier")
        self.adopt_normalization(checkpoint.get("hyper_parameters", {}).get("classifier"), "the checkpoint")

    def on_fit_start(self) -> None:
        """The data's classes must be in this classifier's order."""
        require_data_order(self.trainer, self.hparams["class_names"], "the classifier")

    def train(self, mode: bool = True) -> ClassifyTask:
        """What is frozen keeps its statistics, too; with ``config.batch_norm`` keep, all layers do."""
        super().train(mode)
        still(self.classifier, every=self.config.batch_norm == "keep")
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B,3,H,W]`` in [0,1] -> logits ``[B,K]``."""
        return logits_of(self._outputs(images), self.hparams["num_classes"])

    def _outputs(self, images: Tensor) -> Any:
        """What the classifier itself returns: logits, or whatever :func:`~explainer.models.scores.logits_of` reads."""
        size = self.config.input_size
        if size is not None and images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
        return self.classifier((images - self.mean) / self.std)

    def _shared_step(self, batch: Batch, stage: str) -> Tensor:
        require_batch(batch)
        images, targets = batch.images, batch.targets
        if stage == "fit":
            images, targets = self._occlude(self._mask_evidence(batch), batch)
            if self.config.occlusion.joint:
                images, targets = torch.cat([batch.images, images]), torch.cat([batch.targets, targets])
        outputs, how, K = self._outputs(images), self.config.loss, self.hparams["num_classes"]
        logits = logits_of(outputs, K).float()

        def loss_of(scores: Tensor) -> Tensor:
            return classifier_loss(
                scores, targets, self.task, class_weights=self.class_weights, gamma=how.gamma, label_smoothing=how.label_smoothing
            )

        loss = loss_of(logits)
        if stage == "fit" and (others := auxiliary_logits(outputs, K)):
            loss = loss + AUXILIARY_WEIGHTS.get(len(others), 0.3) * sum(loss_of(other.float()) for other in others)
        if not torch.isfinite(loss):  # of val, too: the last step's weights would be saved as the best ones
            raise NumericalError(
                f"the classification loss is {float(loss.detach())} in {stage}. Images of the batch: {', '.join(batch.ids)}. Lower the "
                f"learning rate (optimizer.lr is {self.optimizer_config.lr:g}), or use another checkpoint of the run."
            )
        self.losses[stage].update(loss.detach(), len(batch))  # type: ignore[operator]
        if stage != "fit":
            labels = batch.targets.int() if self.task == "multilabel" else batch.targets.argmax(dim=1)
            self.scores[stage].update(logits, labels)  # type: ignore[operator]
        return loss

    def _occlude(self, images: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's images with random occlusions, and their targets: those of blank images say nothing."""
        targets = batch.targets
        o = self.config.occlusion
        if o.probability == 0 and o.blank == 0:
            return images, targets
        draws = Draws(self.seed, self.global_step, batch)
        masks = self._occluder(batch, draws)
        masks[draws.uniform() >= o.probability] = 1.0
        fill = make_fill(images, o.fill, mean=self.mean, generator=draws.each)
        if o.blank > 0:
            blank = draws.uniform() < o.blank
            masks[blank] = 0.0
            nothing = 0.0 if self.task == "multilabel" else 1.0 / targets.shape[1]
            targets = torch.where(blank.to(targets.device)[:, None], nothing, targets)
        return blend(images, masks.to(images), fill), targets

    def _mask_evidence(self, batch: Batch) -> Tensor:
        """Keep only, or remove, what the Explainer shows for (some of) the image's labels, in a share of the images."""
        m = self.config.mask_augmentation
        if not self._mask_explainer or self._masked_classes is None or m.probability == 0:
            return batch.images
        images = batch.images
        draws = Draws(self.seed, self.global_step, batch, "evidence")
        labels = batch.targets * self._masked_classes.to(batch.targets)
        with torch.no_grad():
            net = self._mask_explainer[0].to(images.device)
            mask = aggregate(net(images).to(images), labels)[0]
        chosen = draws.uniform() < m.probability
        remove = draws.uniform() < 0.5
        if m.mode != "both":
            remove = torch.full_like(remove, m.mode == "remove")
        chosen = chosen.to(images.device) & (labels.sum(dim=1) > 0)
        mask = torch.where(remove.to(images.device)[:, None, None], 1 - mask, mask)
        shown = blend(images, mask, make_fill(images, m.fill, mean=self.mean, generator=draws.each))
        return torch.where(chosen[:, None, None, None], shown, images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One optimiser step."""
        loss = self._shared_step(batch, "fit")
        self.log("train/loss", mean_over_ranks({"loss": loss.detach()}, self)["loss"], prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Whole images."""
        self._shared_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Whole images."""
        self._shared_step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Logits ``[B,K]``."""
        logits: Tensor = self(batch.images)
        return logits

    def on_train_epoch_end(self) -> None:
        """The epoch's mean loss."""
        self.log("train/loss_epoch", self.losses["fit"].compute())  # type: ignore[operator]
        self.losses["fit"].reset()  # type: ignore[operator]

    def _finish(self, stage: str) -> None:
        if not self.losses[stage].update_called:  # all images of this process were unreadable: it must take part all the same
            self.losses[stage].update(0.0, 0.0)  # type: ignore[operator]
            self.scores[stage].update(*nothing(self.task, self.hparams["num_classes"], self.device))  # type: ignore[operator]
        # torchmetrics reduces over processes by itself, with the right weights; self.log(sync_dist=True) would average ranks equally.
        self.log(f"{stage}/loss", self.losses[stage].compute(), prog_bar=True)  # type: ignore[operator]
        results: dict[str, Any] = self.scores[stage].compute()  # type: ignore[operator]
        per_class = results.pop(f"{stage}/ap_per_class", None)
        if per_class is not None:
            self.per_class = per_class.reshape(-1).tolist()  # torchmetrics makes a number of a vector of one
            results[f"{stage}/map"] = per_class.nanmean()
        report = ClassReport.multi_label if self.task == "multilabel" else ClassReport.single_label
        self.report = report(self.hparams["class_names"], results.pop(f"{stage}/confusion"))
        self.log_dict(results, prog_bar=stage == "val")
        self.losses[stage].reset()  # type: ignore[operator]
        self.scores[stage].reset()  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Epoch metrics."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Epoch metrics."""
        self._finish("test")

    def configure_optimizers(self) -> Any:
        """See :func:`explainer.tasks.optim.configure`."""
        named = dict(self.classifier.named_parameters())
        body = [named[name] for name in body_names(self.classifier, self.hparams["num_classes"]) if name in named]
        total = lambda: int(self.trainer.estimated_stepping_batches)  # noqa: E731
        return configure(self.classifier.parameters(), self.optimizer_config, total, body)


def _class_weights(
    config: ClassifierConfig,
    task: Literal["multilabel", "multiclass"],
    class_names: tuple[str, ...],
    class_counts: tuple[Tensor, int] | None,
) -> Tensor | None:
    """``[K]`` weights of the loss as ``classifier.loss.class_weights`` says, or None."""
    given = config.loss
    if given.gamma < 0 or not 0 <= given.label_smoothing < 1:
        raise ConfigError(
            f"classifier.loss: gamma is at least 0 and label_smoothing in [0,1), received {given.gamma} and {given.label_smoothing}."
        )
    if given.class_weights is None:
        return None
    if given.class_weights == "balanced":
        if class_counts is None:
            raise ConfigError("classifier.loss.class_weights: balanced needs the classes' numbers of training images (class_counts).")
        return balanced_weights(*class_counts, task)
    for name, weight in given.class_weights.items():
        if name not in class_names or not weight > 0:
            raise ConfigError(
                f"classifier.loss.class_weights gives {name!r} the weight {weight}; weights are positive, the classes "
                f"{', '.join(class_names)}."
            )
    return torch.tensor([float(given.class_weights.get(name, 1.0)) for name in class_names])


def _class_selection(config: MaskAugmentationConfig, net: nn.Module, class_names: tuple[str, ...]) -> Tensor:
    """``[K]`` in {0,1}: the labels whose masks are applied. The Explainer's classes must be the data's."""
    known = tuple(getattr(net, "class_names", class_names))
    if known != tuple(class_names):
        raise ConfigError(
            f"classifier.mask_augmentation.checkpoint explains the classes {', '.join(known)}, the data has {', '.join(class_names)}."
        )
    if not 0 <= config.probability <= 1:
        raise ConfigError(f"classifier.mask_augmentation.probability must lie in [0,1], received {config.probability}.")
    chosen = class_names if config.classes is None else config.classes
    for name in chosen:
        if name not in class_names:
            raise ConfigError(f"classifier.mask_augmentation.classes names {name!r}; the classes are {', '.join(class_names)}.")
    return torch.tensor([float(name in chosen) for name in class_names])
