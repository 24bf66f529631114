"""``trainer.precision: auto``: the number format and the memory layout in which this run's own networks train fastest, by the clock.

Which is faster depends on the layers and on the processor: bfloat16 halves the time of large matrix products where the hardware computes
in it, and multiplies that of depthwise convolutions where it does not.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from explainer.config import RunConfig, TrainerConfig
from explainer.errors import CheckpointError
from explainer.files import parse_json, write_text
from explainer.geometry import Size, height_width
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.explain import ExplainTask

log = logging.getLogger(__name__)
FILE = "precision.json"
ROUNDS = 3
#: A combination this many times slower than the best so far is not tried again.
HOPELESS = 1.5


@dataclass(frozen=True)
class Combination:
    """What is timed.

    Attributes:
        precision: ``32-true`` or ``bf16-mixed``.
        channels_last: memory layout.
    """

    precision: str
    channels_last: bool

    def __str__(self) -> str:
        return f"{'bfloat16' if self.precision == 'bf16-mixed' else 'float32'} {'channels_last' if self.channels_last else 'contiguous'}"


ALL = tuple(Combination(precision, layout) for precision in ("32-true", "bf16-mixed") for layout in (True, False))


def fastest(run: Callable[[Combination], float], among: Sequence[Combination] = ALL) -> tuple[Combination, dict[str, float]]:
    """The combination with the least time of :data:`ROUNDS` rounds, and all least times in seconds.

    The rounds are interleaved, so that what else the machine does meets all alike; the first call of each warms it up and counts only
    to leave the hopeless out.

    Args:
        run: does one step and says how many seconds it took.
        among: the combinations that may be chosen.
    """
    first = {c: run(c) for c in among}
    left = [c for c in among if first[c] <= HOPELESS**2 * min(first.values())]
    least: dict[Combination, float] = {}
    for _ in range(ROUNDS):
        for c in left:
            least[c] = min(run(c), least.get(c, float("inf")))
        left = [c for c in left if least[c] <= HOPELESS * min(least.values())]
    times = {**first, **least}
    return min(least, key=lambda c: least[c]), {str(c): times[c] for c in among}


def step_of(task: ClassifyTask | ExplainTask) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A copy of the task's networks, and the part of a training step that takes its time: ``(networks, images) -> a loss``."""
    if isinstance(task, ClassifyTask):
        return copy.deepcopy(task.classifier).train(), lambda net, images: net(images).float().square().mean()
    nets = copy.deepcopy(nn.ModuleList([task.explainer, task.explanandum]))  # together: a shared encoder stays shared
    sees_classifier = task.explanandum.differentiable

    def step(nets: Any, images: Tensor) -> Tensor:
        masks: Tensor = nets[0](images).float()
        if not sees_classifier:
            return masks.mean()
        mask = masks.mean(dim=1, keepdim=True)
        logits: Tensor = nets[1](torch.cat([images * mask, images * (1 - mask)])).float()
        return masks.mean() + logits.square().mean()

    return nets.train(), step


def timed_step(task: ClassifyTask | ExplainTask, batch_size: int, size: Size, device: torch.device) -> Callable[[Combination], float]:
    """What does one step of a copy of the task's networks on random images ``[B,3,H,W]``, and says how many seconds it took."""
    nets, step = step_of(task)
    nets.to(device)
    images = torch.rand(batch_size, 3, *height_width(size), generator=torch.Generator().manual_seed(0)).to(device)

    def run(c: Combination) -> float:
        nets.to(memory_format=torch.channels_last if c.channels_last else torch.contiguous_format)
        nets.zero_grad(set_to_none=True)
        _wait(device)
        start = time.perf_counter()
        with torch.enable_grad():
            with torch.autocast(device.type, torch.bfloat16, enabled=c.precision == "bf16-mixed"):
                loss = step(nets, images)
            loss.backward()
        _wait(device)
        return time.perf_counter() - start

    return run


def measure(
    task: ClassifyTask | ExplainTask, batch_size: int, size: Size, device: torch.device, among: Sequence[Combination] = ALL
) -> tuple[Combination, dict[str, float]]:
    """Time steps of the task's own networks on random images; the task is left as it is.

    Args:
        task: the run's.
        batch_size, size: number and size of the images ``[B,3,H,W]``.
        device: where it will train.
        among: the combinations that may be chosen.
    """
    run = timed_step(task, batch_size, size, device)
    with torch.random.fork_rng():
        return fastest(run, among)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _remembered(file: Path, t: TrainerConfig) -> TrainerConfig:
    """What was measured when the run began.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        saved = parse_json(file.read_bytes())
        known = next(c for c in ALL if (c.precision, c.channels_last) == (saved["precision"], saved["channels_last"]))
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise CheckpointError(
            f"{file} does not say any more which precision this run was begun with ({type(error).__name__}: {error}). Give it yourself: "
            "--trainer.precision and --trainer.channels_last as the run's log names them, for a resumed run must not change them."
        ) from error
    return replace(t, precision=known.precision, channels_last=known.channels_last)


def settled(config: RunConfig, task: ClassifyTask | ExplainTask, size: Size, *, resumes: bool, alone: bool, by_rule: str) -> TrainerConfig:
    """The ``trainer`` section without ``auto``.

    Measured once: ``precision.json`` in the run folder remembers it for whoever resumes or tests the run. Several processes, which must
    agree, follow a rule instead of their clocks.

    Args:
        config: the run.
        task: its networks.
        size: size of the images in pixels.
        resumes: the run folder holds this run already.
        alone: one process on one device.
        by_rule: the precision where nothing is measured, see :func:`~explainer.tasks.trainer.native_precision`.
    """
    t = config.trainer
    if t.precision != "auto":
        return replace(t, channels_last=t.channels_last is not False)
    file = Path(config.run_dir) / FILE
    if resumes and file.is_file():
        return _remembered(file, t)
    if not alone or resumes:
        return replace(t, precision=by_rule, channels_last=t.channels_last is not False)
    on_gpu = t.accelerator != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    native = by_rule == "bf16-mixed"  # elsewhere bfloat16 is emulated: timing it would only take time
    among = [c for c in ALL if t.channels_last in (None, c.channels_last) and (native or c.precision == "32-true")]
    # On a processor two images (BatchNorm needs them) tell the same as a full batch, in a fraction of the time.
    best, seconds = measure(task, config.data.batch_size if on_gpu else 2, size, device, among)
    log.warning("trainer.precision: auto: %s (%s).", best, ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items()))
    record = {"precision": best.precision, "channels_last": best.channels_last, "seconds": seconds, "device": str(device)}
    write_text(file, json.dumps(record, indent=1) + "\n")
    return replace(t, precision=best.precision, channels_last=best.channels_last)
