"""Quality against training time with and without a distillation warm-up, over seeds; and quality against the cost of the targets.

    python -m tests.benchmarks.bench_distillation [--recipes paper,grad_cam,rise:50,rise:500,extremal_perturbation:20,rtis,coalition]
        [--seeds 0 1 2] [--epochs 4] [--classifier runs/shapes_classifier/checkpoints/best.ckpt] [--data "{size: 64}"]
        [--out results/distillation]

Recipes: ``paper`` (the quickstart's loss), ``<baseline>[:cost]`` (the same with a warm-up copying that baseline; cost is RISE's masks or
EP's iterations; CAMs and gradients are asked on the fly, the others fill a cache first, whose seconds are counted), ``rtis``,
``coalition``.
Several times an epoch the validation IoU, the kept and the left share of labels are measured; seconds are those of the process's own CPU
time, so that other jobs do not count. Writes curves.csv and prints, per recipe, the final quality and the first second at which the
``paper`` recipe's final IoU (minus --margin) was reached: the target is at most half of the paper recipe's time.
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

from explainer.cli import main as command
from explainer.cli import parse_run
from explainer.tasks.run import build_task, build_trainer, data_module, quiet_lightning

ROOT = Path(__file__).parents[2]
LIVE = ("grad_cam", "grad_cam_pp", "layer_cam", "x_grad_cam", "hires_cam", "gradient", "input_x_gradient")
COST = {"rise": "n_masks", "extremal_perturbation": "iterations", "igos_pp": "iterations"}


class Curve(pl.Callback):
    """Validates every so many steps and keeps (CPU seconds of training, values)."""

    def __init__(self, every: int, batches: int, spent: float) -> None:
        self.every, self.batches, self.spent = every, batches, spent
        self.rows: list[dict[str, float]] = []
        self.start = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % self.every:
            return
        begin = time.process_time()
        pl_module.eval()
        sums: dict[str, list[float]] = defaultdict(list)
        with torch.no_grad():
            for number, batch in enumerate(trainer.datamodule.eval_dataloader("val")):
                if number == self.batches:
                    break
                for name, value in measure(pl_module, batch.to(pl_module.device)).items():
                    sums[name].append(value)
        pl_module.train()
        row = {name: statistics.mean(values) for name, values in sums.items()}
        self.rows.append({"step": trainer.global_step, "seconds": self.spent + begin - self.start, **row})
        self.start += time.process_time() - begin  # measuring is not training


def measure(task: Any, batch: Any) -> dict[str, float]:
    """IoU with the ground truth, kept and left share of labels, on one batch."""
    from explainer.metrics.segmentation import soft_iou
    from explainer.models.masking import aggregate
    from explainer.tasks.explain import diagnostics

    e = task._explanation(batch, "val")
    values = {k: v.nanmean().item() for k, v in diagnostics(e).items()}
    values["iou"] = soft_iou(e.target_mask, aggregate(batch.masks, batch.targets)[0], batch.void).nanmean().item()
    return values


def recipe_options(recipe: str, chosen: argparse.Namespace, out: Path) -> tuple[str, list[str], float]:
    """``(configuration, further options, CPU seconds spent on a cache)``."""
    folder = ROOT / "configs" / "explainer"
    if recipe in ("paper", "rtis", "coalition"):
        return str(folder / {"paper": "shapes_quickstart"}.get(recipe, f"shapes_{recipe}")) + ".yaml", [], 0.0
    name, _, cost = recipe.partition(":")
    options = {COST[name]: int(cost)} if cost else {}
    teacher: dict[str, Any] = {"name": name, "options": options, "scale": "max" if name in LIVE else "minmax"}
    spent = 0.0
    if name not in LIVE:
        teacher["cache"] = str(out / "maps")
        begin = time.process_time()
        code = command(["maps", "--method.name", name, "--method.options", yaml.safe_dump(options, default_flow_style=True).strip(),
                        "--cache.folder", teacher["cache"], "--data.options", chosen.data, "--classifier.checkpoint", chosen.classifier,
                        "--split", "train"])  # fmt: skip
        if code:
            raise SystemExit(code)
        spent = time.process_time() - begin
    text = yaml.safe_dump([teacher], default_flow_style=True).strip()
    return str(folder / "shapes_distilled.yaml"), ["--teachers", text], spent


def train(recipe: str, seed: int, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One training run; rows of its curve."""
    out = Path(chosen.out)
    config, extra, spent = recipe_options(recipe, chosen, out)
    arguments = ["fit", "--config", config, "--seed", str(seed), "--run_dir", str(out / f"{recipe.replace(':', '_')}_{seed}"),
                 "--classifier.checkpoint", chosen.classifier, "--data.options", chosen.data, "--trainer.max_epochs", str(chosen.epochs),
                 "--trainer.progress_bar", "false", "--trainer.accelerator", chosen.accelerator, "--evaluate_with", "null"]  # fmt: skip
    _, run, _ = parse_run([*arguments, *extra])
    Path(run.run_dir).mkdir(parents=True, exist_ok=True)
    pl.seed_everything(seed, workers=True, verbose=False)
    data = data_module(run)
    data.setup("fit")
    task = build_task(run, data)
    trainer = build_trainer(run, fitting=False)
    curve = Curve(chosen.every, chosen.batches, spent)
    trainer.callbacks.append(curve)  # type: ignore[attr-defined]
    trainer.limit_val_batches = 0
    trainer.fit(task, data)
    return [{"recipe": recipe, "seed": seed, **row} for row in curve.rows]


def report(rows: list[dict[str, Any]], margin: float) -> None:
    """Final quality per recipe and the time to the reference's."""
    runs: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        runs[row["recipe"], row["seed"]].append(row)
    target = {seed: curve[-1]["iou"] - margin for (recipe, seed), curve in runs.items() if recipe == "paper"}
    print(f"{'recipe':28} {'IoU':>6} {'kept':>6} {'left':>6} {'CPU s':>8} {'s to target':>12} {'of paper':>9}")
    for recipe in dict.fromkeys(r for r, _ in runs):
        curves = {seed: curve for (r, seed), curve in runs.items() if r == recipe}
        last = {k: statistics.mean(c[-1][k] for c in curves.values()) for k in ("iou", "kept", "left", "seconds")}
        reached, ratios = [], []
        for seed, curve in curves.items():
            goal = target.get(seed, float("inf"))
            first = next((row["seconds"] for row in curve if row["iou"] >= goal), float("inf"))
            reference = next((row["seconds"] for row in runs.get(("paper", seed), []) if row["iou"] >= goal), float("nan"))
            reached.append(first)
            ratios.append(first / reference)
        print(f"{recipe:28} {last['iou']:6.3f} {last['kept']:6.3f} {last['left']:6.3f} {last['seconds']:8.1f} "
              f"{statistics.median(reached):12.1f} {statistics.median(ratios):9.2f}")  # fmt: skip
    print("target: a warm-up reaches the paper recipe's IoU in at most 0.50 of its time (median over seeds)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipes", default="paper,grad_cam,rise:50,rise:500,extremal_perturbation:20,rtis,coalition")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, default=50, help="steps between two measurements")
    parser.add_argument("--batches", type=int, default=4, help="validation batches per measurement")
    parser.add_argument("--margin", type=float, default=0.01)
    parser.add_argument("--classifier", default="runs/shapes_classifier/checkpoints/best.ckpt")
    parser.add_argument("--data", default="{size: 64}")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--out", default="results/distillation")
    chosen = parser.parse_args()
    quiet_lightning()
    rows: list[dict[str, Any]] = []
    Path(chosen.out).mkdir(parents=True, exist_ok=True)
    for seed in chosen.seeds:
        for recipe in chosen.recipes.split(","):
            rows += train(recipe, seed, chosen)
            with (Path(chosen.out) / "curves.csv").open("w", newline="") as stream:
                writer = csv.DictWriter(stream, sorted({k for row in rows for k in row}))
                writer.writeheader()
                writer.writerows(rows)
            print(f"{recipe} seed {seed}: IoU {rows[-1]['iou']:.3f} after {rows[-1]['seconds']:.0f} CPU s", flush=True)
    report(rows, chosen.margin)


if __name__ == "__main__":
    main()
