"""From an :class:`~explainer.evaluation.config.EvaluateConfig` to its parts: images, classifier, methods and the runner."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import explainer
from explainer import baselines, plugins
from explainer.attribution import one_map
from explainer.attribution.map_cache import method_key
from explainer.commands.building import sized_options
from explainer.commands.numbers import check_seed
from explainer.data.contract import collate
from explainer.data.datamodule import DataModule
from explainer.data.samplers import class_by_class, spread
from explainer.errors import CheckpointError, ConfigError
from explainer.evaluation.config import EvaluateConfig, MethodConfig
from explainer.evaluation.manipulation import gradient_map
from explainer.evaluation.protocol import parse_protocols
from explainer.evaluation.runner import Runner, Settings
from explainer.evaluation.scene import DifferentiableMap, Method, Scale
from explainer.inference.describe import trained_geometry
from explainer.models.checkpoints import configured_explanandum, require_classes
from explainer.models.explainer import TrainedExplainer
from explainer.models.explanandum import Explanandum
from explainer.tasks.precision import laid_out
from explainer.tasks.predicted import use_predicted_targets
from explainer.tensors import state_digest

log = logging.getLogger(__name__)
EXPLAINER, SELF_SUPERVISED = "explainer", "agf_self_supervised"
#: Images among which agf_self_supervised looks for the nearest neighbour.
CANDIDATES = 64
_SCALES: dict[str, tuple[Scale, ...]] = {"raw": ("raw",), "minmax": ("minmax",), "both": ("raw", "minmax")}


def data_module(config: EvaluateConfig) -> DataModule:
    """The images."""
    d = config.data
    module = DataModule(
        d.name,
        max(d.batch_size, 2),
        eval_batch_size=d.eval_batch_size,
        num_workers=d.num_workers,
        seed=config.seed,
        options=sized_options(d, config.classifier),
        train_options=d.train_options,
        eval_options=d.eval_options,
        on_error=d.on_error,
        prefetch_factor=d.prefetch_factor,
        pin_memory=d.pin_memory,
    )
    if config.sample is not None:
        if config.sample < 1:
            raise ConfigError(f"sample must be at least 1, received {config.sample}.")
        dataset = module.dataset(config.split)
        dataset.keep(spread(len(dataset), config.sample, config.seed))
    elif config.limit is not None:
        dataset = module.dataset(config.split)
        if config.limit < len(dataset) and dataset.cheap_targets:
            # All of them, in an order whose every beginning is spread: rows stay valid when the limit grows, and what protocols take less
            # of is spread, too.
            dataset.keep(class_by_class(module.members(config.split), config.seed))
    return module


def classifier(config: EvaluateConfig, data: DataModule) -> Explanandum:
    """The Explanandum; missing data and a missing checkpoint are answered with where they come from, the data first."""
    c = config.classifier
    data.dataset(config.split)
    if c.checkpoint is not None and not Path(c.checkpoint).is_file():
        how = (
            f"python train.py fit --config {c.train_with}"
            if c.train_with
            else "python train.py fit --config configs/classifier/*.yaml; see the head of the configuration"
        )
        raise CheckpointError(f"classifier {c.checkpoint} does not exist. Train it ({how}), or give another with --classifier.checkpoint.")
    # Without a run's word channels_last: 1.4 times as fast in float32 on a CPU (VGG-style, 64 px).
    return laid_out(configured_explanandum(c, data.num_classes, data.task, data.class_names), c.checkpoint)


def build_method(
    label: str, method: MethodConfig, config: EvaluateConfig, explanandum: Explanandum, data: DataModule, *, option: str | None = None
) -> Method:
    """One entry of ``methods``.

    Args:
        label: label of the method in the tables.
        method: its entry.
        config: the evaluation.
        explanandum: the classifier.
        data: the images.
        option: the entry's place in the configuration, for messages; default ``methods.<label>``.

    Raises:
        CheckpointError, FingerprintMismatchError: of a trained Explainer.
        UnknownNameError, ConfigError: of a baseline's name or options.
    """
    name, option = method.name or label, option or f"methods.{label}"
    scales = _SCALES[method.rescale or config.rescale]
    size = method.batch_size or config.batch_size
    if name == EXPLAINER:
        return _trained(label, method, explanandum, data, config.split, scales, size, option)
    if method.checkpoint is not None:
        raise ConfigError(f"{option}: only a trained Explainer has a checkpoint; write name: {EXPLAINER}, or leave it out.")
    try:
        given = _options(name, method, config)
        if name == SELF_SUPERVISED:
            attributor: Any = _self_supervised(explanandum, config, data, dict(method.options))
        else:
            attributor = one_map(baselines.build(name, explanandum, **given))
    except ConfigError as error:
        raise type(error)(f"{option}: {error}") from error
    fingerprint = method_key(name, type(attributor), given)
    attack, smooth = _differentiable(name, attributor, explanandum)
    return Method(label, attributor, fingerprint, scales, size, attack, smooth, method.threshold)


def _options(name: str, method: MethodConfig, config: EvaluateConfig) -> dict[str, Any]:
    """A baseline's options: those of the configuration over those of its paper, in ``mode: paper``."""
    if name == SELF_SUPERVISED:
        return {"candidates": CANDIDATES, **method.options}
    cls = plugins.find(baselines.__name__, name)
    return {**(cls.paper_options if config.mode == "paper" else {}), **method.options}


def _trained(
    label: str,
    method: MethodConfig,
    explanandum: Explanandum,
    data: DataModule,
    split: str,
    scales: tuple[Scale, ...],
    size: int,
    option: str,
) -> Method:
    if method.checkpoint is None:
        raise ConfigError(f"{option}: name the trained Explainer with --{option}.checkpoint runs/<run>/checkpoints/best.ckpt.")
    if method.options:
        raise ConfigError(f"{option}: a trained Explainer has no options, received {method.options}.")
    if not Path(method.checkpoint).exists():
        how = (
            f"python train.py fit --config {method.train_with}"
            if method.train_with
            else "python train.py fit --config configs/explainer/*.yaml"
        )
        raise CheckpointError(
            f"{option}: checkpoint {method.checkpoint} does not exist. Train it ({how}), or give another with --{option}.checkpoint."
        )
    net = laid_out(explainer.load(method.checkpoint, explanandum).to(explanandum.mean.device), method.checkpoint)
    if net.num_classes != explanandum.num_classes or tuple(net.class_names) != tuple(explanandum.class_names):
        raise ConfigError(
            f"{option}: {method.checkpoint} explains the classes {', '.join(net.class_names)}, "
            f"the classifier has {', '.join(explanandum.class_names)}."
        )
    check_meaning(net, data, split, f"{option}: {method.checkpoint}")
    trained_for = net.metadata.get("fingerprint")
    if trained_for is not None and not method.allow_mismatch:
        explanandum.require_fingerprint(trained_for, f"{option}: {method.checkpoint}")
    fingerprint = {"name": EXPLAINER, "config": net.config, "weights": state_digest(net.state_dict())}

    def attack(images: Tensor, class_index: Tensor) -> Tensor:
        masks: Tensor = net(images)[torch.arange(len(images), device=images.device), class_index]
        return masks

    return Method(label, TrainedExplainer(net), fingerprint, scales, size, attack, threshold=method.threshold)


def check_meaning(net: Any, data: DataModule, split: str, source: str) -> None:
    """An Explainer against the images that it is measured on: classes and their order must be the same, another geometry is said.

    The classifier's fingerprint does not tell: a plain state_dict takes its names from the data.

    Raises:
        ConfigError: other classes, or the same in another order.
    """
    require_classes(net.class_names, data.class_names, source)
    trained, given = trained_geometry(net.metadata), getattr(data.dataset(split), "geometry", None)
    if given is not None and isinstance(net.metadata.get("data"), dict) and given != trained:
        log.warning(
            "%s was trained on pictures of the geometry %s, data.options.geometry is %s: it sees other shapes.", source, trained, given
        )


def _differentiable(name: str, attributor: Any, explanandum: Explanandum) -> tuple[DifferentiableMap | None, bool]:
    """``(map with a graph to the images, needs the softplus surrogate)``."""
    own = getattr(attributor, "differentiable_map", None)
    if own is not None:
        return own, False
    if name in ("gradient", "input_x_gradient", "integrated_gradients"):
        return gradient_map(explanandum, name), True  # type: ignore[arg-type]
    return None, False


def _self_supervised(explanandum: Explanandum, config: EvaluateConfig, data: DataModule, options: dict[str, Any]) -> Any:
    """The neighbours are the first ``candidates`` images of the val split."""
    from explainer.baselines.kernels.agf_neighbor import AGFNeighbor

    number = options.pop("candidates", CANDIDATES)
    dataset = data.dataset("val")
    images = collate([dataset[i] for i in range(min(number, len(dataset)))]).images
    return AGFNeighbor(explanandum, images.to(explanandum.mean.device), **options)


def device_of(name: str) -> str:
    """``auto`` is this process's GPU where there is one, else the CPU.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA says so by an assertion
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(
            f"device {name!r} cannot be used here ({reason}). Leave device at auto, or name one of this machine's."
        ) from error
    return name


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """``(rank, number of processes)``; under torchrun the processes can wait for each other."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1
        return
    ours = not torch.distributed.is_initialized()
    if ours:
        # Processes wait at the end only, as long as the slowest takes.
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        if ours:
            torch.distributed.destroy_process_group()


def build_runner(config: EvaluateConfig, rank: int = 0, world: int = 1) -> Runner:
    """Everything but the run itself: protocols, data, classifier and methods are checked, in this order."""
    check_seed(config.seed)
    protocols = parse_protocols(config.protocols, config.mode)
    if not config.methods and any(p.uses_maps for p in protocols.values()):
        raise ConfigError("methods is empty: name at least one, e.g. methods: {grad_cam: {}}.")
    device = device_of(config.device)
    data = data_module(config)
    explanandum = classifier(config, data).to(device)
    if config.data.targets == "predicted":
        use_predicted_targets(explanandum, data, (config.split,), top=config.data.top, threshold=config.data.threshold, folder=config.out)
    methods = [build_method(label, m, config, explanandum, data) for label, m in config.methods.items()]
    cache = config.cache
    settings = Settings(
        Path(config.out),
        config.split,
        config.limit,
        config.classes,
        config.seed,
        config.batch_size,
        device,
        None if cache.folder is None else Path(cache.folder),
        cache.dtype,
        config.time_budget,
        config.progress,
        config.gallery,
        rank,
        world,
    )
    return Runner(methods, protocols, explanandum, data, settings)
