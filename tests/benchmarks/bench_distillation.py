"""Quality against training time and classifier queries: the paper's loss, a distillation warm-up from other methods, other objectives.

    python -m tests.benchmarks.bench_distillation [--base configs/explainer/shapes_small.yaml] [--seeds 0 1 2]
        [--recipes paper@1,srd@1,grad_cam@1,agf@1,rise:50@1,extremal_perturbation:20@1,rtis@1,coalition@1] [--lr 5e-3 --encoder-lr 0.1]
        [--targets 400] [--smooth 0.04 --radius 0.125 --thresholds "{srd: 0.35}"]
        [--goals "{iou: 0.75, iou_50: 0.83, class_iou_50: 0.78, left: 0.02}"] [--out results/distillation]

A recipe is ``kind[:cost][@epochs]`` on the data, classifier, network and optimiser of --base. Kinds: ``paper`` (the base's own losses),
a baseline (the same after a warm-up that copies its maps, guided-filtered and made binary; the cost is RISE's masks or the iterations of a
search; CAMs and gradients are asked on the fly, the others fill a cache for --targets training images, whose seconds and queries count;
--warm-up is its share of the training), ``rtis`` and ``coalition`` (the losses of configs/explainer/shapes_rtis.yaml and
shapes_coalition.yaml). The learning rate's schedule fits the epochs of each recipe, which may be a fraction of one: what a recipe reaches
in a given time is the end of the run of that length, not the middle of a longer one.

Every so many steps and at the end quality is measured on validation images. Seconds are CPU time of the process, so that other jobs
hardly count; queries are images shown to the classifier in a forward pass of its own (AGF, which walks through its layers: not counted).
Writes curves.csv and curves.png and prints per recipe the mean final values and in how many seeds all --goals held at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from explainer import plugins
from explainer.commands.building import build_task, data_module
from explainer.commands.fit import fill_cache
from explainer.commands.parsing import parse_run
from explainer.config import RunConfig
from explainer.lightning_internals import quiet_lightning
from explainer.metrics.segmentation import iou, mean_absolute_error, soft_iou
from explainer.models.explanandum import Explanandum
from explainer.models.masking import aggregate
from explainer.tasks.diagnostics import diagnostics
from explainer.tasks.trainer import build_trainer

ROOT = Path(__file__).parents[2]
LIVE = ("grad_cam", "grad_cam_pp", "layer_cam", "x_grad_cam", "hires_cam", "gradient", "input_x_gradient")
COLUMNS = ("iou", "iou_50", "mae", "class_iou", "class_iou_50", "kept", "left", "seconds", "queries")
# How a teacher's map becomes a mask: the guided filter's radius, scale and threshold; the best of a few on 60 validation images of shapes.
TARGETS: dict[str, tuple[float, str, float]] = {
    "srd": (0.125, "max", 0.35),
    "agf": (0.125, "max", 0.5),
    "guided_backprop": (0.125, "max", 0.45),
    "grad_cam": (0.25, "max", 0.7),
    "layer_cam": (0.25, "max", 0.7),
    "occlusion": (0.25, "max", 0.5),
    "rise": (0.25, "minmax", 0.6),
    "extremal_perturbation": (0.125, "minmax", 0.6),
}
COST = {"rise": "n_masks", "extremal_perturbation": "iterations", "igos_pp": "iterations"}


class Queries:
    """Counts the images shown to any Explanandum."""

    def __init__(self) -> None:
        self.images = 0
        torch.nn.modules.module.register_module_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Explanandum):
            self.images += len(args[0])


class Curve(pl.Callback):
    """Validates every so many steps and keeps (CPU seconds and queries of training, values)."""

    def __init__(self, every: int, batches: int, queries: Queries, spent: tuple[float, int]) -> None:
        self.every, self.batches, self.queries = every, batches, queries
        self.seconds, self.asked = spent
        self.rows: list[dict[str, float]] = []
        self.start, self.before = 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start, self.before = time.process_time(), self.queries.images

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every and trainer.global_step != trainer.estimated_stepping_batches:
            return
        self.seconds += time.process_time() - self.start
        self.asked += self.queries.images - self.before
        sums: dict[str, list[float]] = defaultdict(list)
        pl_module.eval()
        with torch.no_grad():
            for number, batch in enumerate(trainer.datamodule.eval_dataloader("val")):
                if number == self.batches:
                    break
                for name, value in measure(pl_module, batch.to(pl_module.device)).items():
                    sums[name].append(value)
        pl_module.train()
        row = {name: statistics.mean(values) for name, values in sums.items()}
        self.rows.append({"step": trainer.global_step, "seconds": self.seconds, "queries": self.asked, **row})
        self.start, self.before = time.process_time(), self.queries.images  # measuring is not training


def measure(task: Any, batch: Any) -> dict[str, float]:
    """IoU with the ground truth (union of the true classes, and each true class's own mask), MAE, kept and left share of labels."""
    e = task._explanation(batch, "val")
    values = {k: v.nanmean().item() for k, v in diagnostics(e).items()}
    truth = aggregate(batch.masks, batch.targets)[0]
    rows, classes = (batch.targets > 0.5).nonzero(as_tuple=True)
    own, own_truth = e.class_masks[rows, classes], batch.masks[rows, classes]
    void = None if batch.void is None else batch.void[rows]
    values["iou"] = soft_iou(e.target_mask, truth, batch.void).nanmean().item()
    values["iou_50"] = iou(e.target_mask, truth, batch.void).nanmean().item()
    values["mae"] = mean_absolute_error(e.target_mask, truth, batch.void).nanmean().item()
    values["class_iou"] = soft_iou(own, own_truth, void).nanmean().item()
    values["class_iou_50"] = iou(own, own_truth, void).nanmean().item()
    return values


def training_steps(config: dict[str, Any], epochs: float) -> int:
    """Optimiser steps of so many epochs."""
    data = config["data"]
    images = len(plugins.build("explainer.data", data["name"], split="train", **{**data["options"], **data.get("train_options", {})}))
    return max(1, round(epochs * (images // data["batch_size"])))


def configuration(kind: str, cost: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The base's configuration with the recipe's losses and teachers, without the cache that it may need."""
    folder = ROOT / "configs" / "explainer"
    config = yaml.safe_load(Path(chosen.base).read_text())
    config["explainer"]["init_encoder"] &= not chosen.random_encoder
    if chosen.lr is not None:
        config["optimizer"]["lr"] = chosen.lr
    if kind in ("rtis", "coalition"):
        other = yaml.safe_load((folder / f"shapes_{kind}.yaml").read_text())
        base = config["losses"]["area_bound"]  # bounds belong to the data; what an objective needs on top stays
        config["losses"], config["masking"] = other["losses"], other.get("masking", {})
        if bound := config["losses"].get("area_bound"):
            bound |= {"min_area": max(bound["min_area"], base["min_area"]), "max_area": base["max_area"]}
        config["explainer"]["init_encoder"] &= other["explainer"]["init_encoder"]
    elif kind != "paper":
        end, off = chosen.warm_up, min(1.0, chosen.warm_up + 0.1)
        for loss in config["losses"].values():
            loss["weight"] = [[end, 0.0], [off, loss["weight"]]]
        config["losses"]["distillation"] = {"weight": [[0.0, 1.0], [end, 1.0], [off, 0.0]], "kind": "dice"}
        options: dict[str, Any] = {COST[kind]: int(cost)} if cost else {}
        if kind == "extremal_perturbation":
            options["schedule"] = "fast"  # the published steps are too short to arrive anywhere in a few iterations
        radius, scale, threshold = TARGETS.get(kind, (0.125, "max", 0.5))
        filtered = {
            "method": kind,
            "options": options,
            "smooth": chosen.smooth,
            "radius": radius if chosen.radius is None else chosen.radius,
        }
        threshold = yaml.safe_load(chosen.thresholds).get(kind, threshold)
        config["teachers"] = [{"name": "guided_filter", "options": filtered, "scale": scale, "threshold": threshold}]
    if chosen.encoder_lr is not None and config["explainer"]["init_encoder"]:  # an encoder at random has to learn like the rest
        config["optimizer"]["encoder_lr"] = chosen.encoder_lr
    return config


def maps_once(run: RunConfig, folder: Path, queries: Queries) -> tuple[float, int]:
    """Fill the teacher's cache as the run would; CPU seconds and queries, also of the earlier run that filled it."""
    note, teacher = folder / "cost.json", run.teachers[0]
    of = json.dumps([teacher.name, teacher.options, teacher.images, asdict(run.data), asdict(run.classifier)], sort_keys=True, default=str)
    if not note.exists():
        begin, before = time.process_time(), queries.images
        fill_cache(teacher, run)
        cost = {"of": of, "seconds": time.process_time() - begin, "queries": queries.images - before}
        note.write_text(json.dumps(cost))
    cost = json.loads(note.read_text())
    if cost.get("of") != of:
        raise SystemExit(f"{folder} holds the maps of other images, options or another classifier: choose another --out.")
    return cost["seconds"], cost["queries"]


def train(recipe: str, seed: int, chosen: argparse.Namespace, queries: Queries) -> list[dict[str, Any]]:
    """One training run; rows of its curve."""
    out = Path(chosen.out)
    what, _, epochs = recipe.partition("@")
    kind, _, cost = what.partition(":")
    length = float(epochs or yaml.safe_load(Path(chosen.base).read_text())["trainer"]["max_epochs"])
    config = configuration(kind, cost, chosen)
    folder = out / f"maps_{what.replace(':', '_')}"
    cached = "teachers" in config and kind not in LIVE
    if cached:
        config["teachers"][0] |= {"cache": str(folder), "images": chosen.targets}
    config |= {"seed": seed, "run_dir": str(out / f"{recipe.replace(':', '_')}_{seed}"), "evaluate_with": None}
    config["trainer"] |= {"progress_bar": False, "accelerator": chosen.accelerator, "max_epochs": -1}
    config["trainer"]["max_steps"] = training_steps(config, length)
    file = Path(config["run_dir"]) / "recipe.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    _, run, _ = parse_run(["fit", "--config", str(file)])
    pl.seed_everything(seed, workers=True, verbose=False)
    data = data_module(run)
    data.setup("fit")
    spent, asked = maps_once(run, folder, queries) if cached else (0.0, 0)
    task = build_task(run, data)
    trainer = build_trainer(run, fitting=False)
    curve = Curve(chosen.every, chosen.batches, queries, (spent, asked))
    trainer.callbacks.append(curve)  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    trainer.fit(task, data)
    return [{"recipe": recipe, "seed": seed, "cache_seconds": spent, **row} for row in curve.rows]


def report(rows: list[dict[str, Any]], goals: dict[str, float]) -> None:
    """Final values per recipe, and how often the goals held."""
    print(f"{'recipe':28}" + "".join(f"{name:>13}" for name in COLUMNS) + f"{'goals held':>14}")
    for recipe, ends in final(rows).items():
        means = [statistics.mean(row[name] for row in ends) for name in COLUMNS]
        print(
            f"{recipe:28}"
            + "".join(f"{value:13.0f}" if value > 10 else f"{value:13.3f}" for value in means)
            + f"{sum(met(row, goals) for row in ends):10d} / {len(ends)}"
        )


def final(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The last row of each seed, by recipe."""
    ends: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        ends[row["recipe"]][row["seed"]] = row
    return {recipe: list(by_seed.values()) for recipe, by_seed in ends.items()}


def draw(rows: list[dict[str, Any]], goals: dict[str, float], file: Path) -> None:
    """IoU at 0.5 at the end of runs of several lengths: a dot per seed, filled where all goals held, and a line through the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for recipe, ends in final(rows).items():
        kind = recipe.partition("@")[0]
        kinds[kind].append(tuple(statistics.mean(row[name] for row in ends) for name in ("seconds", "iou_50")))  # type: ignore[arg-type]
        color = f"C{list(kinds).index(kind)}"
        for row in ends:
            axes.plot(row["seconds"], 100 * row["iou_50"], "o", color=color, mfc=color if met(row, goals) else "none", ms=5)
    for number, (kind, points) in enumerate(kinds.items()):
        seconds, quality = zip(*sorted(points), strict=True)
        axes.plot(seconds, [100 * q for q in quality], color=f"C{number}", label=kind, lw=1)
    if "iou_50" in goals:
        axes.axhline(100 * goals["iou_50"], color="grey", lw=0.8, ls="--")
    axes.set_xlabel("processor seconds of the whole training, the targets included")
    axes.set_ylabel("IoU at 0.5 on validation images, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=130)


def met(row: dict[str, Any], goals: dict[str, float]) -> bool:
    """Errors and what is left must be small, all else large."""
    return all(row[name] <= goal if name in ("left", "mae") else row[name] >= goal for name, goal in goals.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default=str(ROOT / "configs/explainer/shapes_small.yaml"))
    parser.add_argument("--recipes", default="paper@1,srd@1,grad_cam@1,agf@1,rise:50@1,extremal_perturbation:20@1,rtis@1,coalition@1")
    parser.add_argument("--lr", type=float, help="learning rate instead of the base's")
    parser.add_argument("--encoder-lr", type=float, help="its factor for the encoder instead of the base's")
    parser.add_argument(
        "--warm-up", type=float, default=0.6, help="share of the training that copies maps alone; then the paper's losses take over"
    )
    parser.add_argument("--random-encoder", action="store_true", help="the encoder does not start from the classifier's weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", type=int, default=400, help="training images whose maps a cache holds")
    parser.add_argument("--smooth", type=float, default=0.04, help="of the teachers' guided filter")
    parser.add_argument("--radius", type=float, help="of the teachers' guided filter instead of the one for shapes")
    parser.add_argument("--thresholds", default="{}", help="of the teachers' maps instead of those for shapes")
    parser.add_argument("--every", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--batches", type=int, default=4, help="validation batches per measurement")
    parser.add_argument("--goals", default="{iou: 0.75, iou_50: 0.83, class_iou_50: 0.78, mae: 0.07, left: 0.02}")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", default="results/distillation")
    chosen = parser.parse_args()
    quiet_lightning()
    queries, rows = Queries(), []
    file = Path(chosen.out) / "curves.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    for seed in chosen.seeds:
        for recipe in chosen.recipes.split(","):
            rows += train(recipe, seed, chosen, queries)
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            print(f"{recipe} seed {seed}: IoU {rows[-1]['iou']:.3f} after {rows[-1]['seconds']:.0f} CPU s", flush=True)
    report(rows, yaml.safe_load(chosen.goals))
    draw(rows, yaml.safe_load(chosen.goals), file.with_name("curves.png"))


if __name__ == "__main__":
    main()
