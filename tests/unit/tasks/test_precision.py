"""trainer.precision: auto is decided by the clock and remembered."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from explainer.config import ClassifierConfig, DataConfig, RunConfig, TrainerConfig
from explainer.tasks import precision
from explainer.tasks.classify import ClassifyTask
from explainer.tasks.precision import ALL, Combination, affordable, fastest, laid_out, measure, remembered, settled


def test_the_fastest_is_chosen_and_the_hopeless_is_tried_once() -> None:
    seconds = {ALL[0]: 1.0, ALL[1]: 1.3, ALL[2]: 9.0, ALL[3]: 2.0}
    calls: Counter[Combination] = Counter()

    def run(c: Combination) -> float:
        calls[c] += 1
        return seconds[c] + (5.0 if c == ALL[1] and calls[c] == 2 else 0.0)  # the machine was busy once

    best, times = fastest(run)
    assert best == ALL[0] and times["float32 channels_last"] == 1.0 and times["bfloat16 channels_last"] == 9.0
    assert calls[ALL[2]] == 1, "nine times slower: not asked again"
    assert calls[ALL[3]] == 4, "twice as slow: left out after the third round"


def test_a_slow_first_call_does_not_decide() -> None:
    calls: Counter[Combination] = Counter()

    def run(c: Combination) -> float:
        calls[c] += 1
        return 2.0 if calls[c] == 1 and c == ALL[3] else {ALL[3]: 0.5}.get(c, 1.0)

    assert fastest(run)[0] == ALL[3]


def test_a_busy_machine_does_not_leave_the_fastest_out() -> None:
    """Its first three calls meet the machine at half its speed; a least time of few rounds dropped it for good."""
    calls: Counter[Combination] = Counter()

    def run(c: Combination) -> float:
        calls[c] += 1
        return {ALL[2]: 0.16 if calls[c] <= 3 else 0.08, ALL[3]: 0.1}.get(c, 0.3)

    assert fastest(run)[0] == ALL[2]


def test_among_equals_the_first_is_chosen() -> None:
    assert fastest({ALL[0]: 1.02, ALL[1]: 1.01, ALL[2]: 1.0, ALL[3]: 1.0}.__getitem__)[0] == ALL[0]
    assert fastest({ALL[0]: 1.06, ALL[1]: 1.05, ALL[2]: 1.02, ALL[3]: 1.0}.__getitem__)[0] == ALL[2]


def test_the_choice_takes_no_longer_than_it_may() -> None:
    calls: Counter[Combination] = Counter()

    def run(c: Combination) -> float:
        calls[c] += 1
        return 20.0 + ALL.index(c)

    assert fastest(run)[0] == ALL[0] and set(calls.values()) == {4}, "long steps: no more than the least number of rounds"
    assert affordable(lambda _: 0.4, ALL[0], 16) == 4, "0.8 s of steps of 0.2 s an image"
    assert affordable(lambda _: 0.01, ALL[0], 16) == 16 and affordable(lambda _: 9.0, ALL[0], 16) == 2


def task() -> ClassifyTask:
    return ClassifyTask(ClassifierConfig(options={"widths": [4, 4]}), 3, "multiclass", ("a", "b", "c"))


def test_measuring_leaves_the_task_and_the_random_numbers_alone() -> None:
    mine = task()
    before = {k: v.clone() for k, v in mine.state_dict().items()}
    state = torch.get_rng_state()
    best, times = measure(mine, 2, 16, torch.device("cpu"))
    assert best in ALL and set(times) == {str(c) for c in ALL} and min(times.values()) > 0
    assert all(torch.equal(v, before[k]) for k, v in mine.state_dict().items()) and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in mine.parameters())


def test_the_choice_is_remembered_and_several_processes_follow_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(run_dir=str(tmp_path), data=DataConfig(), trainer=TrainerConfig(precision="auto", accelerator="cpu"))
    answer = (Combination("bf16-mixed", False), {"x": 1.0})
    monkeypatch.setattr(precision, "measure", lambda *_: answer)
    chosen = settled(config, task(), 16, resumes=False, alone=True, by_rule="32-true")
    assert (chosen.precision, chosen.channels_last) == ("bf16-mixed", False)
    assert json.loads((tmp_path / "precision.json").read_text())["precision"] == "bf16-mixed"
    monkeypatch.setattr(precision, "measure", None)
    again = settled(config, task(), 16, resumes=True, alone=True, by_rule="32-true")
    assert (again.precision, again.channels_last) == ("bf16-mixed", False)
    many = settled(config, task(), 16, resumes=False, alone=False, by_rule="32-true")
    assert (many.precision, many.channels_last) == ("32-true", True)
    fixed = RunConfig(run_dir=str(tmp_path), trainer=TrainerConfig(precision="16-mixed", channels_last=False))
    assert settled(fixed, task(), 16, resumes=False, alone=True, by_rule="32-true").channels_last is False


def test_a_layout_that_is_given_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Combination] = []

    def spy(*arguments: object) -> tuple[Combination, dict[str, float]]:
        seen.extend(arguments[-1])  # type: ignore[arg-type]
        return seen[0], {}

    monkeypatch.setattr(precision, "measure", spy)
    config = RunConfig(run_dir=str(tmp_path), trainer=TrainerConfig(precision="auto", accelerator="cpu", channels_last=False))
    settled(config, task(), 16, resumes=False, alone=True, by_rule="bf16-mixed")
    assert [(c.precision, c.channels_last) for c in seen] == [("32-true", False), ("bf16-mixed", False)]
    seen.clear()
    settled(config, task(), 16, resumes=False, alone=True, by_rule="32-true")
    assert [c.precision for c in seen] == ["32-true"], "bfloat16 is timed only where the hardware has it"


@pytest.mark.parametrize("last", [True, False])
def test_who_uses_a_checkpoint_takes_over_the_layout_that_its_run_measured(tmp_path: Path, last: bool) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "precision.json").write_text(json.dumps({"precision": "bf16-mixed", "channels_last": last}))
    checkpoint = tmp_path / "checkpoints" / "best.ckpt"
    assert remembered(checkpoint) == Combination("bf16-mixed", last)
    net = laid_out(torch.nn.Conv2d(3, 4, 3), checkpoint, otherwise=not last)
    assert net.weight.is_contiguous(memory_format=torch.channels_last) == last and net.weight.dtype == torch.float32
    elsewhere = tmp_path / "elsewhere.ckpt"
    assert remembered(elsewhere) is None is remembered(None)
    assert laid_out(torch.nn.Conv2d(3, 4, 3), elsewhere).weight.is_contiguous(memory_format=torch.channels_last)
    assert laid_out(torch.nn.Conv2d(3, 4, 3), elsewhere, otherwise=None).weight.is_contiguous()
    (tmp_path / "precision.json").write_text("{")
    assert remembered(checkpoint) is None
