"""``trainer.precision: auto``: the number format and the memory layout in which this run's own networks train fastest, by the clock.

Which is faster depends on the layers and on the processor: bfloat16 halves the time of large matrix products where the hardware computes
in it, and multiplies that of depthwise convolutions where it does not.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from explainer.config import RunConfig, TrainerConfig
from explainer.errors import CheckpointError
from explainer.files import parse_json, write_json
from explainer.geometry import Size, height_width
from explainer.models.folding import folded
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.explain import ExplainTask

log = logging.getLogger(__name__)
FILE = "precision.json"
N = TypeVar("N", bound=nn.Module)
#: Rounds after which a combination may be left out, and after which the choice is made at the latest.
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
#: A combination this many times slower than the best, in the median of the rounds and in its best one, is not timed any more.
HOPELESS = 1.25
#: After the first call, which also warms up and meets the machine in one state only, no more than what is plainly slower is left out.
PLAINLY = 4.0
#: Times within this factor of the best count as equal; the first in :data:`ALL` is taken, so that a repetition chooses the same.
EQUAL = 1.03
#: Seconds of timed steps after which the choice is made with what was measured.
BUDGET = 30.0
#: Seconds that one timed step on a processor should take: with so many images as that allows, up to the run's own batch.
STEP = 0.8


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
    """The combination with the least time, and the median times in seconds.

    The rounds are interleaved and compared round by round, so that what else the machine does meets all alike; the first call of each
    warms it up. No combination is left out before :data:`LEAST_ROUNDS`, unless it is plainly slower; more rounds follow until one is left,
    up to :data:`MOST_ROUNDS` or :data:`BUDGET` seconds.

    Args:
        run: does one step and says how many seconds it took.
        among: the combinations that may be chosen, the preferred ones first.
    """
    first = {c: run(c) for c in among}
    spent = sum(first.values())
    left = [c for c in among if first[c] <= PLAINLY * min(first.values())]
    times: dict[Combination, list[float]] = {c: [] for c in left}
    for done in range(1, MOST_ROUNDS + 1):
        for c in left:
            times[c].append(run(c))
            spent += times[c][-1]
        if done < LEAST_ROUNDS:
            continue
        best = min(left, key=lambda c: statistics.median(times[c]))
        left = [c for c in left if min(_slower(times[c], times[best]), min(times[c]) / min(times[best])) <= HOPELESS]
        if len(left) == 1 or spent > BUDGET:
            break
    best = min(left, key=lambda c: statistics.median(times[c]))
    chosen = next(c for c in left if _slower(times[c], times[best]) <= EQUAL)
    return chosen, {str(c): statistics.median(times.get(c, [first[c]])) for c in among}


def _slower(times: Sequence[float], other: Sequence[float]) -> float:
    """How many times slower than another, the median over the rounds that both took part in."""
    return statistics.median(a / b for a, b in zip(times, other, strict=False))


def step_of(task: ClassifyTask | ExplainTask, images: Tensor) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A copy of the task's networks, and the part of a training step that takes its time: ``(networks, images) -> a loss``.

    Args:
        task: the run's, on the images' device.
        images: ``[B,3,H,W]``; with them the classifier's batch norms are folded as training does.
    """
    if isinstance(task, ClassifyTask):
        return copy.deepcopy(task.classifier).train(), lambda net, images: net(images).float().square().mean()
    nets = copy.deepcopy(nn.ModuleList([task.explainer, task.explanandum]))  # together: a shared encoder stays shared
    nets[1] = folded(nets[1].to(images.device), images)  # type: ignore[arg-type]
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
    """What does one step of a copy of the task's networks on random images ``[B,3,H,W]``, and says how many seconds it took.

    One processor thread is timed by its own clock, which stands still while another program has the processor.
    """
    images = torch.rand(batch_size, 3, *height_width(size), generator=torch.Generator().manual_seed(0)).to(device)
    nets, step = step_of(task, images)
    nets.to(device)
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

    def run(c: Combination) -> float:
        nets.to(memory_format=torch.channels_last if c.channels_last else torch.contiguous_format)
        nets.zero_grad(set_to_none=True)
        _wait(device)
        start = clock()
        with torch.enable_grad():
            with torch.autocast(device.type, torch.bfloat16, enabled=c.precision == "bf16-mixed"):
                loss = step(nets, images)
            loss.backward()
        _wait(device)
        return clock() - start

    return run


def measure(
    task: ClassifyTask | ExplainTask, batch_size: int, size: Size, device: torch.device, among: Sequence[Combination] = ALL
) -> tuple[Combination, dict[str, float]]:
    """Time steps of the task's own networks on random images; the task is left as it is.

    Args:
        task: the run's.
        batch_size, size: number and size of the run's images ``[B,3,H,W]``; a processor may time fewer, see :func:`affordable`.
        device: where it will train.
        among: the combinations that may be chosen.
    """
    with torch.random.fork_rng():
        if device.type == "cpu":
            batch_size = affordable(timed_step(task, 2, size, device), among[0], batch_size)
        return fastest(timed_step(task, batch_size, size, device), among)


def affordable(run: Callable[[Combination], float], combination: Combination, batch_size: int) -> int:
    """Images of a step of about :data:`STEP` seconds: two (BatchNorm needs them) up to the run's own batch, on which the choice may depend
    (a linear layer's weights are converted once a step, whatever the batch).

    Args:
        run: a step with two images.
        combination: what it is timed in.
        batch_size: the run's.
    """
    run(combination)
    return max(2, min(batch_size, int(2 * STEP / max(run(combination), 1e-9))))


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


def remembered(checkpoint: str | Path | None) -> Combination | None:
    """What the run that a checkpoint lies in has measured; None for another file."""
    if checkpoint is None:
        return None
    file = Path(checkpoint).absolute().parent.parent / FILE
    try:
        saved = parse_json(file.read_bytes())
        return Combination(str(saved["precision"]), bool(saved["channels_last"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def laid_out(net: N, checkpoint: str | Path | None, otherwise: bool | None = True) -> N:
    """A network in the memory layout that its run has found the faster one; the same numbers up to rounding.

    The number format is not taken over: what is measured and shown later is computed in float32, so that tables of two machines agree.

    Args:
        net: changed in place.
        checkpoint: where it came from.
        otherwise: channels_last, where no run says it; None leaves the layout alone.
    """
    known = remembered(checkpoint)
    last = otherwise if known is None else known.channels_last
    if last is None:
        return net
    return net.to(memory_format=torch.channels_last if last else torch.contiguous_format)


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
    start = time.perf_counter()
    best, seconds = measure(task, config.data.batch_size, size, device, among)
    told = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
    log.warning("trainer.precision: auto: %s (%s a step; measured in %.0f s).", best, told, time.perf_counter() - start)
    record = {"precision": best.precision, "channels_last": best.channels_last, "seconds": seconds, "device": str(device)}
    write_json(file, record)
    return replace(t, precision=best.precision, channels_last=best.channels_last)
