"""Quality against training time and classifier queries: the paper's loss, a distillation warm-up from other methods, other objectives.

    python -m tests.benchmarks.bench_distillation [--base configs/explainer/shapes_quickstart.yaml] [--seeds 0 1 2]
        [--recipes paper@4,grad_cam@2,rise:50@2,srd@2,extremal_perturbation:20@2,rtis@4,coalition@4] [--targets 1000]
        [--goals "{iou: 0.75, iou_50: 0.83, class_iou_50: 0.78, left: 0.02}"] [--out results/distillation]

A recipe is ``kind[:cost][@epochs]`` on the data, classifier, network and optimiser of --base. Kinds: ``paper`` (the base's own losses),
a baseline (the same with a warm-up that copies its maps; the cost is RISE's masks or the iterations of a search; CAMs and gradients are
asked on the fly, the others fill a cache for the first --targets images, whose seconds and queries count), ``rtis`` and ``coalition``
(the losses of configs/explainer/shapes_rtis.yaml and shapes_coalition.yaml). The learning rate's schedule fits the epochs of each recipe.

Several times an epoch quality is measured on validation images. Seconds are CPU time of the process, so that other jobs hardly count;
queries are images shown to the classifier in a forward pass of its own (SRD and AGF walk through its layers: not counted). Writes
curves.csv and prints per recipe the final values and the first second at which all --goals held (median over seeds).
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from explainer import plugins
from explainer.cli import main as command
from explainer.cli import parse_run
from explainer.metrics.segmentation import iou, mean_absolute_error, soft_iou
from explainer.models.explanandum import Explanandum
from explainer.models.masking import aggregate
from explainer.tasks.explain import diagnostics
from explainer.tasks.run import build_task, build_trainer, data_module, quiet_lightning

ROOT = Path(__file__).parents[2]
LIVE = ("grad_cam", "grad_cam_pp", "layer_cam", "x_grad_cam", "hires_cam", "gradient", "input_x_gradient")
COLUMNS = ("iou", "iou_50", "mae", "class_iou", "class_iou_50", "kept", "left", "seconds", "queries")
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


def configuration(kind: str, cost: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The base's configuration with the recipe's losses and teachers, without the cache that it may need."""
    folder = ROOT / "configs" / "explainer"
    config = yaml.safe_load(Path(chosen.base).read_text())
    config["explainer"]["init_encoder"] &= not chosen.random_encoder
    if kind in ("rtis", "coalition"):
        other = yaml.safe_load((folder / f"shapes_{kind}.yaml").read_text())
        config["losses"], config["masking"] = other["losses"], other.get("masking", {})
        config["explainer"]["init_encoder"] &= other["explainer"]["init_encoder"]
    elif kind != "paper":
        distilled = yaml.safe_load((folder / "shapes_distilled.yaml").read_text())["losses"]
        for name, schedule in distilled.items():  # the warm-up's schedule, with the base's weights
            if name == "distillation":
                config["losses"][name] = schedule
            elif name in config["losses"] and isinstance(schedule["weight"], list):
                top = max(w for _, w in schedule["weight"]) or 1.0
                own = config["losses"][name]["weight"]
                config["losses"][name]["weight"] = [[at, own * w / top] for at, w in schedule["weight"]]
        options: dict[str, Any] = {COST[kind]: int(cost)} if cost else {}
        if kind == "extremal_perturbation":
            options["schedule"] = "fast"  # the published steps are too short to arrive anywhere in a few iterations
        signed = plugins.find("explainer.baselines", kind).signed  # type: ignore[attr-defined]
        # Of a CAM or a signed map, what is below 0 is no evidence, not a little of it.
        config["teachers"] = [{"name": kind, "options": options, "scale": "max" if kind in LIVE or signed else "minmax"}]
    return config


def fill_cache(config: dict[str, Any], chosen: argparse.Namespace, folder: Path) -> float:
    """Fill the teacher's cache for the first images; CPU seconds, also of an earlier run that filled it."""
    teacher, note = config["teachers"][0], folder / "seconds.json"
    teacher["cache"] = str(folder)
    if note.exists():
        return float(note.read_text())
    begin = time.process_time()
    options, data = (yaml.safe_dump(value, default_flow_style=True).strip() for value in (teacher["options"], config["data"]["options"]))
    code = command(["maps", "--method.name", teacher["name"], "--method.options", options, "--cache.folder", str(folder),
                    "--data.name", config["data"]["name"], "--data.options", data, "--limit", str(chosen.targets),
                    "--split", "train", "--classifier.checkpoint", config["classifier"]["checkpoint"]])  # fmt: skip
    if code:
        raise SystemExit(code)
    note.write_text(str(time.process_time() - begin))
    return float(note.read_text())


def train(recipe: str, seed: int, chosen: argparse.Namespace, queries: Queries) -> list[dict[str, Any]]:
    """One training run; rows of its curve."""
    out = Path(chosen.out)
    what, _, epochs = recipe.partition("@")
    kind, _, cost = what.partition(":")
    config = configuration(kind, cost, chosen)
    before = queries.images
    spent = 0.0
    if "teachers" in config and kind not in LIVE:
        spent = fill_cache(config, chosen, out / f"maps_{what.replace(':', '_')}")
    cached = queries.images - before
    config |= {"seed": seed, "run_dir": str(out / f"{recipe.replace(':', '_')}_{seed}"), "evaluate_with": None}
    config["trainer"] |= {"progress_bar": False, "accelerator": chosen.accelerator}
    if epochs:
        config["trainer"]["max_epochs"] = int(epochs)
    file = Path(config["run_dir"]) / "recipe.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    _, run, _ = parse_run(["fit", "--config", str(file)])
    pl.seed_everything(seed, workers=True, verbose=False)
    data = data_module(run)
    data.setup("fit")
    task = build_task(run, data)
    trainer = build_trainer(run, fitting=False)
    curve = Curve(chosen.every, chosen.batches, queries, (spent, cached))
    trainer.callbacks.append(curve)  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    trainer.fit(task, data)
    return [{"recipe": recipe, "seed": seed, **row} for row in curve.rows]


def report(rows: list[dict[str, Any]], goals: dict[str, float]) -> None:
    """Final values per recipe, and when the goals held."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[row["recipe"], row["seed"]].append(row)
    print(f"{'recipe':28}" + "".join(f"{name:>13}" for name in COLUMNS) + f"{'goals after':>14}")
    for recipe in dict.fromkeys(r for r, _ in runs):
        curves = [curve for (r, _), curve in runs.items() if r == recipe]
        last = [statistics.mean(curve[-1][name] for curve in curves) for name in COLUMNS]
        reached = [next((row["seconds"] for row in curve if met(row, goals)), float("inf")) for curve in curves]
        print(f"{recipe:28}" + "".join(f"{value:13.0f}" if value > 10 else f"{value:13.3f}" for value in last)
              + f"{statistics.median(reached):12.0f} s")  # fmt: skip


def met(row: dict[str, Any], goals: dict[str, float]) -> bool:
    """Errors and what is left must be small, all else large."""
    return all(row[name] <= goal if name in ("left", "mae") else row[name] >= goal for name, goal in goals.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default=str(ROOT / "configs/explainer/shapes_quickstart.yaml"))
    parser.add_argument("--recipes", default="paper@4,grad_cam@2,rise:50@2,srd@2,extremal_perturbation:20@2,rtis@4,coalition@4")
    parser.add_argument("--random-encoder", action="store_true", help="the encoder does not start from the classifier's weights")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--targets", type=int, default=1000, help="training images whose maps a cache holds")
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
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


if __name__ == "__main__":
    main()
