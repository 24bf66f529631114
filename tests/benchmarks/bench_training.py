"""A training step of the Explainer against a straightforward transcription of the published algorithm.

    python -m tests.benchmarks.bench_training [--network deeplabv3] [--encoder resnet18] [--arch vgg16] [--size 224] [--batch 4]
        [--classes 20] [--labels 2] [--pairs 7] [--threads 1] [--device cpu] [--channels-last] [--bf16] [--compile] [--shared DECODER]

The transcription runs the classifier once on the masked and once on the inverse-masked images with its parameters left trainable, sorts
every present class's mask in a loop over images and classes, and takes total variation as a convolution. Both have the same weights,
images and losses (checked before timing) and end in an Adam step. Each pair times both one after the other; the median of the paired
ratios is reported, so that a drift of the machine's speed cancels. Target: >= 1.2 times the images/s; loss terms <= 3 % of the step at
224 px. Random weights: the arithmetic does not depend on them. The profile gives the time of each part of our step. With ``--shared fpn``
ours trains a decoder on the classifier's own features instead, against the same transcription with its own encoder (target: >= 3). With
``--bf16`` ours computes in mixed precision, as ``trainer.precision: auto`` does where it measures that to be faster; the transcription
stays in float32, as it was published.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from explainer import Explanandum
from explainer.config import OptimizerConfig
from explainer.losses.base import total_loss
from explainer.models.classifiers import build_classifier
from explainer.models.explainer import Explainer
from explainer.models.folding import folded
from explainer.tasks.explain import ExplainTask
from explainer.tensors import Batch

TARGET, LOSS_TARGET = 1.2, 0.03
WEIGHTS = {"entropy": 1.0, "target_area": 0.1, "non_target_area": 0.3, "area_bound": 1.0, "total_variation": 1.0}
LOW, HIGH = 0.05, 0.3


def published_loss(net: Explainer, explanandum: Explanandum, images: Tensor, targets: Tensor) -> Tensor:
    """Equations 2 to 8 as they are written: image by image, class by class, two passes."""
    masks = net(images)
    normalized = explanandum.normalize(images)
    shown, absent = [], []
    for i in range(len(images)):
        present = [masks[i, k] for k in range(masks.shape[1]) if targets[i, k] == 1]
        others = [masks[i, k] for k in range(masks.shape[1]) if targets[i, k] == 0]
        shown.append(torch.stack(present).max(dim=0).values)
        absent.append(torch.stack(others).max(dim=0).values)
    m, n = torch.stack(shown), torch.stack(absent)
    kept = explanandum.classifier(normalized * m.unsqueeze(1))
    left = explanandum.classifier(normalized * (1 - m).unsqueeze(1))
    loss = F.binary_cross_entropy_with_logits(kept, targets)
    q = torch.softmax(left, dim=1).clamp(min=1e-30)
    loss = loss + WEIGHTS["entropy"] * (q * q.log()).mean()
    loss = loss + WEIGHTS["target_area"] * m.mean() + WEIGHTS["non_target_area"] * n.mean()
    bound = torch.zeros((), device=images.device)
    for i in range(len(images)):
        for k in range(masks.shape[1]):
            if targets[i, k] == 1:
                values = masks[i, k].reshape(-1).sort(descending=True).values
                first, last = int(len(values) * LOW), int(len(values) * HIGH)
                bound = bound + ((1 - values[:first]).sum() + values[last:].sum()) / len(values)
    loss = loss + WEIGHTS["area_bound"] * bound / len(images)
    return loss + WEIGHTS["total_variation"] * (convolved_variation(m) + convolved_variation(n))


def convolved_variation(mask: Tensor) -> Tensor:
    """Differences to the next row and column by a 3x3 convolution with reflect padding."""
    kernel = mask.new_zeros(2, 1, 3, 3)
    kernel[:, 0, 1, 1] = -1
    kernel[0, 0, 2, 1] = kernel[1, 0, 1, 2] = 1
    return F.conv2d(F.pad(mask.unsqueeze(1), (1, 1, 1, 1), mode="reflect"), kernel).abs().sum() / mask.numel()


def seconds(call: Callable[[], object], device: str) -> float:
    """Of one call. One thread on the CPU: the process's own time, which other processes on the machine hardly change."""
    if device == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        begin = clock()
        call()
        return clock() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def median_seconds(call: Callable[[], object], device: str, repeat: int = 3) -> float:
    return statistics.median(seconds(call, device) for _ in range(repeat))


def make_task(options: argparse.Namespace, shared: str | None = None) -> ExplainTask:
    torch.manual_seed(0)
    explanandum = Explanandum(build_classifier(options.arch, options.classes), options.classes)
    network = {} if options.network == "vgg_unet" else {"encoder_name": options.encoder}
    if shared is None:
        net = Explainer(options.network, options.classes, network)
    else:
        net = Explainer(shared, options.classes, encoder="shared", explanandum=explanandum)
    losses: dict[str, dict[str, Any]] = {name: {"weight": weight} for name, weight in WEIGHTS.items()}
    losses["classification"] = {"weight": 1.0}
    losses["area_bound"] |= {"min_area": LOW, "max_area": HIGH, "reduction": "sum"}
    losses["total_variation"]["padding"] = "reflect"
    return ExplainTask(net, explanandum, losses, None, optimizer=OptimizerConfig()).to(options.device)


def make_batch(options: argparse.Namespace) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(options.batch, 3, options.size, options.size, generator=generator)
    targets = torch.zeros(options.batch, options.classes)
    for row in targets:
        row[torch.randperm(options.classes, generator=generator)[: options.labels]] = 1
    batch = Batch(images, targets, None, None, tuple(str(i) for i in range(options.batch)))
    return batch.to(options.device)


def stepper(task: ExplainTask, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(task.explainer.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def loss_terms_seconds(task: ExplainTask, batch: Batch, device: str) -> float:
    """Forward and backward of the loss terms alone, from the masks and logits."""
    with torch.no_grad():
        e = task._explanation(batch, "train")
    names = ("class_masks", "target_mask", "non_target_mask", "logits_masked", "logits_inverse")

    def run() -> None:
        for name in names:
            setattr(e, name, getattr(e, name).detach().requires_grad_())
        total_loss(task.terms, e)[0].backward()

    run()
    return median_seconds(run, device, 5)


def profile(task: ExplainTask, batch: Batch, device: str) -> dict[str, float]:
    """Seconds of each part of our step."""
    parts: dict[str, float] = {}
    net, explanandum = task.explainer, folded(task.explanandum, batch.images)  # as training does
    parts["Explainer forward"] = median_seconds(lambda: net(batch.images), device)
    masks = net(batch.images)
    seed = torch.randn_like(masks)
    parts["Explainer backward"] = median_seconds(lambda: masks.backward(seed, retain_graph=True), device)
    both = torch.cat([batch.images, batch.images]).requires_grad_()
    parts["classifier forward"] = median_seconds(lambda: explanandum(both), device)
    logits = explanandum(both)
    parts["classifier backward"] = median_seconds(lambda: torch.autograd.grad(logits.sum(), both, retain_graph=True), device)
    parts["loss terms, both ways"] = loss_terms_seconds(task, batch, device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5)
    parts["Adam"] = median_seconds(optimizer.step, device)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="deeplabv3")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--arch", default="vgg16")
    for name, value in (("size", 224), ("batch", 4), ("classes", 20), ("labels", 2), ("pairs", 7), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--shared", metavar="DECODER")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message=r".*self\.log.*")
    device = options.device
    ours, batch = make_task(options), make_batch(options)
    published = copy.deepcopy(ours)
    published.explanandum.classifier.requires_grad_(True)
    if options.channels_last:
        ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for task in (ours, published):
        # Dropout and batch statistics off: both must compute the same numbers.
        task.eval()
    with torch.no_grad():
        a = float(ours.training_step(batch, 0))
        b = float(published_loss(published.explainer, published.explanandum, batch.images, batch.targets))
    if abs(a - b) > 1e-3 * max(1, abs(b)):
        raise SystemExit(f"the two do not compute the same loss: {a} and {b}")
    if options.shared:
        ours = make_task(options, options.shared)
        if options.channels_last:
            ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for task in (ours, published):
        task.train()
    if options.compile:
        ours.explainer.network.compile()
        ours.explanandum.classifier.compile()

    def own_loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
            return ours.training_step(batch, 0)

    own = stepper(ours, own_loss)
    theirs = stepper(published, lambda: published_loss(published.explainer, published.explanandum, batch.images, batch.targets))
    for step in (own, theirs):
        step()
    pairs = [(seconds(own, device), seconds(theirs, device)) for _ in range(options.pairs)]
    ratio = statistics.median(t / o for o, t in pairs)
    mine = statistics.median(o for o, _ in pairs)
    chosen = "".join(f", {name}" for name in ("channels_last", "bf16", "compile") if getattr(options, name))
    how = f"{options.threads} thread(s), {device}{chosen}"
    what = f"{options.size} px, batch {options.batch}, {options.labels} labels of {options.classes}"
    against = f"shared {options.shared} against " if options.shared else ""
    print(f"{against}{options.network} {options.encoder} explains {options.arch}, {what}, {how}")
    print(f"images/s: ours {options.batch / mine:.2f}, published {options.batch / statistics.median(t for _, t in pairs):.2f}")
    print(
        f"median of {options.pairs} paired ratios: {ratio:.2f} (target >= {TARGET}), range {min(t / o for o, t in pairs):.2f} to "
        f"{max(t / o for o, t in pairs):.2f}"
    )
    with torch.autocast(device, torch.bfloat16, enabled=options.bf16):
        parts = profile(ours, batch, device)
    share = statistics.median(loss_terms_seconds(ours, batch, device) / seconds(own, device) for _ in range(3))
    print(f"loss terms: {share:.1%} of the step (target <= {LOSS_TARGET:.0%})")
    for name, value in parts.items():
        print(f"  {name:24}{1000 * value:9.1f} ms {value / mine:7.1%}")
    rest = mine - sum(parts.values())
    print(f"  {'masking and the rest':24}{1000 * rest:9.1f} ms {rest / mine:7.1%}")


if __name__ == "__main__":
    main()
