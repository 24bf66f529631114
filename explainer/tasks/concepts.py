"""Fitting of concept probes: one weight vector a concept, all concepts of a layer in one Lightning run, none in another's way."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from explainer.concepts.classification import Features, balanced, classification_loss
from explainer.concepts.segmentation import background_share, combination_logits, segmentation_loss
from explainer.concepts.store import ConceptMasks
from explainer.concepts.supports import Supports
from explainer.data.samplers import sample_seed
from explainer.errors import ConfigError

#: A concept and the images of its next step.
Step = tuple[int, Tensor]
Objective = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
_PUBLISHED_SIDE = 112


@dataclass(frozen=True)
class Recipe:
    """How probes are fitted.

    Attributes:
        preset: ``published``: SGD, momentum 0.9, no weight decay. ``converged``: L-BFGS on all images of a concept at once, with an L2
            penalty, until the loss stands still.
        loss: loss of segmentation: ``linear`` (equation 4 as printed) or ``bce``.
        bias: whether segmentation has a bias; classification always has one.
        lr: learning rate of SGD; for segmentation it is of masks of 112 x 112 pixels and scaled to others, since the loss sums over pixels.
        batch_size, epochs: images per step of SGD, and passes over the data.
        l2: factor of L-BFGS's penalty, on the loss as a mean over pixels and images.
        tolerance: relative change of the loss at which L-BFGS is done with a concept.
        seed: random seed of initial weights, order and draws, with the concept's number.
    """

    preset: Literal["published", "converged"] = "converged"
    loss: Literal["linear", "bce"] = "bce"
    bias: bool = True
    lr: float = 1e-4
    batch_size: int = 64
    epochs: int = 30
    l2: float = 1e-4
    tolerance: float = 1e-6
    seed: int = 0

    @classmethod
    def named(cls, preset: str, seed: int = 0) -> Recipe:
        """``published``: equation 4 without bias; ``converged``: binary cross-entropy with bias.

        Raises:
            ConfigError: another name.
        """
        if preset == "published":
            return cls("published", "linear", False, seed=seed)
        if preset != "converged":
            raise ConfigError(f"preset must be published or converged, received {preset!r}.")
        return cls(seed=seed)


@dataclass
class Fitted:
    """Weights ``[C,K]`` and biases ``[C]`` (zeros without bias) of a layer's probes; NaN rows for concepts without a probe."""

    weights: Tensor
    bias: Tensor

    def of(self, concept: int) -> tuple[Tensor, Tensor | None]:
        """One concept's."""
        return self.weights[concept], self.bias[concept]


class _Steps(IterableDataset[list[Step]]):
    """Epoch after epoch, the steps that ``plan`` makes: each holds the next images of every concept that has some left."""

    def __init__(self, plan: Callable[[int], list[list[Step]]]) -> None:
        self.plan, self.epoch = plan, 0

    def __iter__(self) -> Iterator[list[Step]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return iter(self.plan(epoch))


class ProbeTask(pl.LightningModule):
    """Probes of several concepts.

    Each concept has a parameter of its own. A step that has no image of a concept leaves its parameter without gradient, so that
    momentum does not move it: fitted together or one by one, the weights are the same.

    Args:
        start: initial weights ``{concept: [K]}``.
        allowed: ``[K]`` per concept, 1 where the weight may differ from 0; None: everywhere.
        objective: ``(concept, images, weights, bias) -> loss``.
        recipe: settings of the fit; see :class:`Recipe`.
        bias: fit one.
        lr: learning rate of SGD.
        decay: SGD's rate is multiplied by 0.1 after every so many epochs; None: never.
    """

    def __init__(
        self,
        start: dict[int, Tensor],
        allowed: dict[int, Tensor] | None,
        objective: Objective,
        recipe: Recipe,
        *,
        bias: bool,
        lr: float,
        decay: int | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.concepts = list(start)
        self.place = {c: i for i, c in enumerate(self.concepts)}
        self.weights = nn.ParameterList([nn.Parameter(w.clone()) for w in start.values()])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(())) for _ in self.concepts] if bias else [])
        self.allowed, self.objective, self.recipe, self.lr, self.decay = allowed, objective, recipe, lr, decay
        self.last: dict[int, float] = {}
        self.done: set[int] = set()

    def vector(self, concept: int) -> tuple[Tensor, Tensor | None]:
        """A concept's weights ``[K]``, those that are not allowed at 0, and its bias."""
        w = self.weights[self.place[concept]]
        if self.allowed is not None:
            w = w * self.allowed[concept]
        return w, self.biases[self.place[concept]] if len(self.biases) else None

    def configure_optimizers(self) -> Any:
        """SGD for all, or one L-BFGS a concept."""
        if self.recipe.preset == "published":
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        both = [[w, *([self.biases[i]] if len(self.biases) else [])] for i, w in enumerate(self.weights)]
        return [
            torch.optim.LBFGS(p, max_iter=20, history_size=20, tolerance_change=1e-12, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
            for p in both
        ]

    def training_step(self, batch: list[Step], _: int) -> None:
        """One step of SGD for the concepts of the step, or up to 20 iterations of L-BFGS for each."""
        optimizers = self.optimizers()
        if self.recipe.preset == "published":
            optimizer: Any = optimizers
            for group in optimizer.param_groups:
                group["lr"] = self.lr * (0.1 ** (self.current_epoch // self.decay) if self.decay else 1)
            optimizer.zero_grad(set_to_none=True)
            self.manual_backward(torch.stack([self.objective(c, images, *self.vector(c)) for c, images in batch]).sum())
            optimizer.step()
            return
        each: Any = optimizers if isinstance(optimizers, list) else [optimizers]
        for concept, images in batch:
            if concept not in self.done:
                self._iterate(each[self.place[concept]], concept, images)

    def _iterate(self, optimizer: Any, concept: int, images: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            w, b = self.vector(concept)
            loss = self.objective(concept, images, w, b) + 0.5 * self.recipe.l2 * (w**2).sum()
            self.manual_backward(loss)
            return loss

        loss = float(optimizer.step(closure))  # at the start of these iterations
        before = self.last.get(concept, math.inf)
        self.last[concept] = loss
        if abs(before - loss) <= self.recipe.tolerance * max(abs(loss), 1e-12):
            self.done.add(concept)

    def on_train_epoch_end(self) -> None:
        """Stop once every concept is done."""
        if len(self.done) == len(self.concepts):
            self.trainer.should_stop = True


def initial(K: int, concept: int, seed: int) -> Tensor:
    """``U(-1/sqrt(K), 1/sqrt(K))``, seeded by concept, ``[K]``."""
    generator = torch.Generator().manual_seed(sample_seed(seed, concept, K))
    return (torch.rand(K, generator=generator) * 2 - 1) / math.sqrt(K)


def _run(task: ProbeTask, plan: Callable[[int], list[list[Step]]], epochs: int) -> None:
    loader = DataLoader(_Steps(plan), batch_size=None)
    quiet = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                max_epochs=epochs,
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(task, loader)
    finally:
        quiet.setLevel(level)


def _fitted(task: ProbeTask, C: int, K: int) -> Fitted:
    out = Fitted(torch.full((C, K), torch.nan), torch.zeros(C))
    for concept in task.concepts:
        w, b = task.vector(concept)
        out.weights[concept] = w.detach()
        if b is not None:
            out.bias[concept] = b.detach()
    return out


def _shuffled(images: Tensor, recipe: Recipe, *key: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sample_seed(recipe.seed, *key))
    return list(images[torch.randperm(len(images), generator=generator)].split(recipe.batch_size))


def _side_by_side(parts: dict[int, list[Tensor]]) -> list[list[Step]]:
    longest = max(len(p) for p in parts.values())
    return [[(c, p[i]) for c, p in parts.items() if i < len(p)] for i in range(longest)]


def fit_segmentation(
    supports: Supports, truth: ConceptMasks, concepts: list[int], recipe: Recipe, allowed: dict[int, Tensor] | None = None
) -> Fitted:
    """Weights that segment each concept on the training images that show it.

    Args:
        supports: filter supports of the training split.
        truth: concept masks of the training split.
        concepts: numbers; each must have an image with a mask.
        recipe: settings of the fit; see :class:`Recipe`.
        allowed: filters that may be used, ``{concept: [K] in {0,1}}``; None: all.
    """
    C, K, pixels = truth.labels.shape[1], supports.K, truth.side[0] * truth.side[1]
    if not concepts:
        return Fitted(torch.full((C, K), torch.nan), torch.zeros(C))
    images = {c: truth.images_with(c) for c in concepts}
    alpha = {c: background_share(truth, c, images[c]) for c in concepts}
    kept: dict[int, tuple[Supports, Tensor, Tensor | None]] = {}

    def of(c: int, some: Tensor) -> tuple[Supports, Tensor, Tensor | None]:
        return supports.only(some), truth.masks(c, some), truth.valid(some)

    if recipe.preset == "converged":  # L-BFGS sees the same images at every step
        kept = {c: of(c, images[c]) for c in concepts}

    def objective(c: int, some: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        part, masks, valid = kept[c] if c in kept else of(c, some)
        loss = segmentation_loss(combination_logits(part, w, b, truth.side), masks, alpha[c], recipe.loss, valid)
        return loss / pixels if recipe.preset == "converged" else loss

    def plan(epoch: int) -> list[list[Step]]:
        if recipe.preset == "converged":
            return [[(c, images[c])] for c in concepts]
        return _side_by_side({c: _shuffled(images[c], recipe, c, epoch) for c in concepts})

    start = {c: initial(K, c, recipe.seed) if recipe.preset == "published" else torch.zeros(K) for c in concepts}
    task = ProbeTask(start, allowed, objective, recipe, bias=recipe.bias, lr=recipe.lr * _PUBLISHED_SIDE**2 / pixels, decay=None)
    _run(task, plan, recipe.epochs)
    return _fitted(task, C, K)


def fit_classification(
    features: Features, labels: Tensor, concepts: list[int], recipe: Recipe, allowed: dict[int, Tensor] | None = None
) -> Fitted:
    """Weights and biases that tell the training images that show each concept from the others, in the units of ``features``.

    Args:
        features: feature maps of the training split.
        labels: ``[N,C]`` bool.
        concepts: numbers; each must have images that show it and images that do not.
        recipe: settings of the fit; see :class:`Recipe`. ``published`` draws as many negatives as there are positives, anew each epoch;
            ``converged`` lets both sides weigh the same.
        allowed: filters that may be used, ``{concept: [K] in {0,1}}``; None: all.
    """
    C, K = labels.shape[1], features.values.shape[1]
    if not concepts:
        return Fitted(torch.full((C, K), torch.nan), torch.zeros(C))
    everything = torch.arange(len(labels))

    def objective(c: int, some: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return classification_loss(features.values[some], labels[some, c], w, b, recipe.preset == "converged")

    def plan(epoch: int) -> list[list[Step]]:
        if recipe.preset == "converged":
            return [[(c, everything)] for c in concepts]
        drawn = {c: list(balanced(labels[:, c], recipe.seed, c, epoch).split(recipe.batch_size)) for c in concepts}
        return _side_by_side(drawn)

    start = {c: initial(K, c, recipe.seed) if recipe.preset == "published" else torch.zeros(K) for c in concepts}
    task = ProbeTask(start, allowed, objective, recipe, bias=True, lr=recipe.lr, decay=10)
    _run(task, plan, recipe.epochs)
    return _fitted(task, C, K)
