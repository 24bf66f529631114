"""What an explanation costs beside the classification: Explainers of every compact configuration, the paper's architecture, VGG-16 and
ResNet-50, all in onnxruntime.

    python -m tests.benchmarks.bench_latency [--size 224] [--classes 20] [--threads 1] [--repeats 7] [--only NAME ...] [--out FILE]

Random weights (the arithmetic does not depend on them), float32, batch 1. All contestants are called in turn, round after round, so
that all meet the same load; the ratios are those of the medians. The same ratio of processor times stands
beside it, which is the steadier one on a busy machine with one thread. Targets: the default <= 0.15 x VGG-16 and <= 0.5 x ResNet-50.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torchvision.models as tvm
import yaml

from explainer.commands.measuring import BenchReport, Contestant, bench, onnx_contestant
from explainer.inference.formats import ExportModel
from explainer.models.explainer import Explainer

CONFIGS = Path(__file__).parents[2] / "configs" / "explainer" / "compact"
DEFAULT = "deeplabv3plus_mobilenetv3_large"
PAPER: dict[str, dict[str, Any]] = {
    "paper: deeplabv3_resnet50 (smp)": {"network": "deeplabv3", "options": {"encoder_name": "resnet50"}, "stride": 8},
    "paper: deeplabv3_resnet50 (torchvision)": {"network": "torchvision_deeplabv3", "options": {}, "stride": 8},
}
TARGETS = {"VGG-16": 0.15, "ResNet-50": 0.5}


def compact_configs() -> dict[str, dict[str, Any]]:
    """The ``explainer`` section of every compact configuration, by file name."""
    return {path.stem: yaml.safe_load(path.read_text())["explainer"] for path in sorted(CONFIGS.glob("*.yaml"))}


def network(section: dict[str, Any], classes: int, size: int) -> Explainer:
    """The Explainer that a configuration describes, with random weights."""
    torch.manual_seed(0)
    options = {**section["options"], "encoder_weights": None} if "encoder_name" in section["options"] else section["options"]
    return Explainer(
        section["network"], classes, options, image_size=size, downscale=section.get("downscale", 1), stride=section["stride"]
    ).eval()


def contestants(only: list[str], classes: int, size: int, threads: int) -> tuple[list[Contestant], dict[str, int]]:
    """All in onnxruntime, the two classifiers last, and the parameters of each."""
    sections = {k: v for k, v in {**PAPER, **compact_configs()}.items() if not only or any(word in k for word in only)}
    found: list[Contestant] = []
    parameters: dict[str, int] = {}
    nets: list[tuple[str, torch.nn.Module]] = [(name, network(section, classes, size)) for name, section in sections.items()]
    nets += [("ResNet-50", tvm.resnet50().eval()), ("VGG-16", tvm.vgg16().eval())]
    for name, net in nets:
        parameters[name] = sum(p.numel() for p in net.parameters())
        found.append(onnx_contestant(name, ExportModel(net, ("out",)), (size, size), threads))
        print(f"exported {name}", flush=True)
    return found, parameters


def ratios(report: BenchReport, name: str, reference: str) -> tuple[float, float]:
    """Wall and processor time of ``name`` relative to ``reference``, at batch 1."""
    rows = {row.name: row for row in report.rows}
    return rows[name].wall_ms / rows[reference].wall_ms, rows[name].cpu_ms / rows[reference].cpu_ms


def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help="parts of configuration names")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    rivals, parameters = contestants(args.only, args.classes, args.size, args.threads)
    report = bench(rivals, (1,), args.repeats, args.threads)
    print(f"\nload {report.load}, {args.threads} thread(s), {args.size} px, {args.classes} classes, medians of {args.repeats}")
    print("| network | M parameters | ms | CPU ms | x VGG-16 (CPU) | x ResNet-50 (CPU) |\n|---|---|---|---|---|---|")
    table = []
    for row in report.rows:
        vgg, resnet = ratios(report, row.name, "VGG-16"), ratios(report, row.name, "ResNet-50")
        table.append(
            {"name": row.name, "parameters": parameters[row.name], "ms": row.wall_ms, "cpu_ms": row.cpu_ms, "vgg": vgg, "resnet": resnet}
        )
        print(
            f"| {row.name} | {parameters[row.name] / 1e6:.1f} | {row.wall_ms:.1f} | {row.cpu_ms:.1f} | "
            f"{vgg[0]:.3f} ({vgg[1]:.3f}) | {resnet[0]:.3f} ({resnet[1]:.3f}) |"
        )
    default = next((entry for entry in table if entry["name"] == DEFAULT), None)
    if default is not None:
        verdicts = [
            f"{default[key][1]:.3f} x {name} (target {TARGETS[name]})" for key, name in (("vgg", "VGG-16"), ("resnet", "ResNet-50"))
        ]
        print(f"default {DEFAULT}, processor time: " + ", ".join(verdicts))
    if args.out:
        Path(args.out).write_text(json.dumps({"rows": table, "report": report.as_dict()}, indent=1))


if __name__ == "__main__":
    main()
