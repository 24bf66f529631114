"""The steps behind ``explainer reproduce``: what has to be trained and evaluated, what it costs, and doing it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from explainer.commands import evaluation
from explainer.commands.building import data_module
from explainer.commands.fit import FitRequest, fit
from explainer.commands.parsing import parse_evaluate, parse_run
from explainer.config import RunConfig
from explainer.errors import ConfigError
from explainer.evaluation.config import EvaluateConfig, MethodConfig
from explainer.geometry import height_width
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from explainer.report.write import write
from explainer.tasks.run_folder import finished

#: A backward pass costs about two forward passes.
FORWARD_BACKWARD = 3


@dataclass(frozen=True)
class Request:
    """What ``explainer reproduce`` was asked for; see its options."""

    name: str
    configs: Path
    data: str | None
    download: bool
    tables: list[str] | None
    out: str
    with_classifier: str | None
    with_explainer: str | None
    with_evaluation: str | None


@dataclass
class Plan:
    """Configurations in the order in which they run.

    Attributes:
        trainings: ``(file, arguments)`` of the classifier, the Explainer and the Explainers of other rows.
        evaluations: ``(file, arguments)`` of the tables.
    """

    trainings: list[tuple[Path, list[str]]]
    evaluations: list[tuple[Path, list[str]]]


def plan(request: Request) -> Plan:
    """Every table whose row ``explainer`` is the one asked for, and what its rows have to be trained with.

    Raises:
        ConfigError: there is no such table.
    """
    own = f"explainer/{request.name}.yaml"
    tables = []
    for path in sorted((request.configs / "evaluate").glob("*.yaml")):
        rows = (yaml.safe_load(path.read_text("utf-8")) or {}).get("methods") or {}
        if str((rows.get("explainer") or {}).get("train_with", "")).endswith(own):
            tables.append(path)
    if request.tables is not None:
        known = {p.stem for p in tables}
        for name in request.tables:
            if name not in known:
                raise ConfigError(f"tables names {name!r}, which is no table of {request.name}. Its tables: {', '.join(sorted(known))}.")
        tables = [p for p in tables if p.stem in request.tables]
    trained: dict[Path, list[str]] = {}
    where = [] if request.data is None else ["--data.options.root", request.data]
    for path in [request.configs / own, *[request.configs.parent / f for t in tables for f in _trained_with(t)]]:
        classifier = yaml.safe_load(path.read_text("utf-8"))["classifier"].get("train_with")
        for file, over in ((request.configs.parent / classifier, request.with_classifier), (path, request.with_explainer)):
            trained.setdefault(file, _arguments(file, over, where))
    return Plan(list(trained.items()), [(t, _arguments(t, request.with_evaluation, where)) for t in tables])


def _trained_with(table: Path) -> list[str]:
    rows = yaml.safe_load(table.read_text("utf-8"))["methods"]
    return [row["train_with"] for row in rows.values() if row and "train_with" in row]


def _arguments(file: Path, over: str | None, where: list[str]) -> list[str]:
    return ["--config", str(file), *([] if over is None else ["--config", over]), *where]


def reproduce(request: Request, dry_run: bool) -> int:
    """Do it, or say what it would cost; returns the exit code."""
    steps = plan(request)
    runs = [parse_run(["fit", *arguments]) for _, arguments in steps.trainings]
    evaluations = [parse_evaluate(arguments) for _, arguments in steps.evaluations]
    sizes = _images(runs[0][1], request.download and not dry_run)
    if dry_run:
        print(estimate(steps, [r[1] for r in runs], [e[0] for e in evaluations], sizes))
        return 0
    for (file, _), (_, config, rest) in zip(steps.trainings, runs, strict=True):
        if finished(Path(config.run_dir)):
            print(f"{file.name}: {config.run_dir} is trained")
            continue
        print(f"{file.name}: training into {config.run_dir}")
        if code := fit(FitRequest(config, "auto", rest.resolved)):
            return code
    worst = 0
    for table, resolved in evaluations:
        worst = max(worst, evaluation.run(table, resolved))
    for path in write([table.out for table, _ in evaluations], Path(request.out), title=f"Reproduction: {request.name}"):
        print(path)
    return worst


def _images(config: RunConfig, download: bool) -> dict[str, int]:
    """Images of each split; missing data is answered with where it comes from."""
    if download:
        if config.data.name != "voc":
            raise ConfigError(
                f"download: {config.data.name} has no downloader here. Its configuration in configs/data says where it comes from."
            )
        config.data.options["download"] = True
    module = data_module(config)
    sizes = {split: len(module.dataset(split)) for split in ("train", "val", "test")}
    config.data.options.pop("download", None)
    return sizes


# ---------------------------------------------------------------------- what it costs
def estimate(steps: Plan, runs: list[RunConfig], evaluations: list[EvaluateConfig], sizes: dict[str, int]) -> str:
    """A table of images, passes and hours; times are measured here on one batch with untrained networks."""
    classifier, explainer = _seconds_per_image(runs)
    lines = [f"{'step':48} {'images':>8} {'passes':>14} {'hours':>9}"]
    total = 0.0

    def add(name: str, images: int, passes: float, seconds: float) -> None:
        nonlocal total
        total += seconds
        lines.append(f"{name:48} {images:8d} {passes:14,.0f} {seconds / 3600:9.2f}")

    for (file, _), config in zip(steps.trainings, runs, strict=True):
        images = sizes["train"] * max(1, config.trainer.max_epochs)
        if config.task == "classify":
            add(f"train {file.stem}, at most", images, FORWARD_BACKWARD * images, FORWARD_BACKWARD * images * classifier)
        else:  # the Explainer once, the classifier on what its mask keeps and on what it removes
            cost = explainer + 2 * classifier
            add(f"train {file.stem}, at most", images, 3 * FORWARD_BACKWARD * images, FORWARD_BACKWARD * images * cost)
    for (file, _), table in zip(steps.evaluations, evaluations, strict=True):
        images = _evaluated(table)
        for label, method in table.methods.items():
            passes = passes_of(method.name or label, method)
            trained = method.checkpoint is not None
            add(f"{file.stem}: {label}", images, passes * images, passes * images * (explainer if trained else classifier))
    lines.append(f"{'all (training stops earlier where it stands still)':48} {'':8} {'':14} {total / 3600:9.2f}")
    return "\n".join(lines)


def passes_of(name: str, method: MethodConfig) -> float:
    """Forward passes for one image and class; a backward pass counts as two."""
    o = method.options
    if name in ("constant", "centre", "random", "edges", "ground_truth"):
        return 0
    if method.checkpoint is not None:
        return 1
    if name == "rise":
        return float(o.get("n_masks", 4000))
    if name == "extremal_perturbation":
        return FORWARD_BACKWARD * float(o.get("iterations") or 800) * len(o.get("areas", (1, 1, 1, 1)))
    if name == "igos_pp":  # keeping and removing, and a line search
        return 2 * FORWARD_BACKWARD * float(o.get("iterations", 15)) * float(o.get("points", 20))
    return FORWARD_BACKWARD


def _evaluated(table: EvaluateConfig) -> int:
    from explainer.commands.assembly import data_module as evaluated_data

    number = len(evaluated_data(table).dataset(table.split))
    return number if table.limit is None else min(number, table.limit)


def _seconds_per_image(runs: list[RunConfig]) -> tuple[float, float]:
    """Forward pass of the classifier and of the Explainer, on this machine, one image of a small batch."""
    first, second = runs[0], runs[1]
    module = data_module(second)
    size, K = module.size, module.num_classes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.rand(2, 3, *height_width(size), device=device)
    options = {k: v for k, v in first.classifier.options.items() if k != "weights"}
    classifier = build_classifier(first.classifier.arch, K, **options).to(device).eval()
    e = second.explainer
    unpretrained: dict[str, Any] = {**e.options, **({"encoder_weights": None} if "encoder_weights" in e.options else {})}
    network = (
        Explainer(e.network, K, unpretrained, class_names=module.class_names, stride=e.stride, downscale=e.downscale).to(device).eval()
    )
    return _time(classifier, images), _time(network, images)


def _time(function: Callable[[torch.Tensor], Any], images: torch.Tensor) -> float:
    with torch.no_grad():
        function(images)
        start = time.perf_counter()
        function(images)
        if images.is_cuda:
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(images)
