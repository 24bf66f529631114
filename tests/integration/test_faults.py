"""SIGKILL at random moments of training and evaluation, then a resume, again and again: nothing is lost, nothing is done twice."""

import json
import random
import signal
import time

import pytest
import torch

from explainer.tasks.csv_log import read_rows
from tests.integration.launch import CLASSIFIER, DATA, EXPLAINER, Job, group, run, run_group

NOISY = ["--masking.binarize", "0.5", "--masking.subset", "0.5", "--masking.fill", "random", "--optimizer.schedule", "one_cycle"]
WITHIN_EPOCHS = ["--trainer.save_every_n_steps", "2"]
EVALUATE = [
    *DATA[:2], "--batch_size", "3", "--methods", "{grad_cam: {}, random: {}, gradient: {}, rise: {options: {n_masks: 30}}}",
    "--bootstrap", "20",
    "--protocols", "[segmentation]", "--split", "test", "--device", "cpu", "--progress", "false",
]  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    assert run([*CLASSIFIER, "--trainer.max_epochs", "1", "--run_dir", f"{folder}/c"], folder) == 0
    return f"{folder}/c/checkpoints/best.ckpt"


class Chaos:
    """Kills a training run: anywhere, soon after a checkpoint, or while one is being written."""

    def __init__(self, folder, seed):
        self.checkpoints, self.random = folder / "checkpoints", random.Random(seed)
        self.kills = self.torn = 0

    def strike(self, jobs):
        """Wait for the moment, then kill one of the processes."""
        kind = self.random.choice(("anywhere", "after", "writing", "writing"))
        victim, before = self.random.choice(jobs), self._saved()
        if kind == "anywhere":
            time.sleep(self.random.uniform(0, 3))
        else:
            self._until(jobs, lambda: self._saved() != before)  # some progress, or the test would not end
            if kind == "writing":
                self._until(jobs, lambda: any(self.checkpoints.glob(".last.ckpt.*.tmp")))
            else:
                time.sleep(self.random.uniform(0, 0.2))
        victim.send(signal.SIGKILL)
        codes = [job.wait() for job in jobs]
        self.kills += -signal.SIGKILL in codes
        self.torn += any(self.checkpoints.glob(".last.ckpt.*.tmp"))
        self.check()
        return codes

    def check(self):
        """Every checkpoint that is there is whole."""
        for path in self.checkpoints.glob("*.ckpt"):
            assert torch.load(path, weights_only=True)["state_dict"], path

    def _saved(self):
        last = self.checkpoints / "last.ckpt"
        return last.stat().st_mtime_ns if last.is_file() else 0

    @staticmethod
    def _until(jobs, condition):
        end = time.monotonic() + 60
        while not condition() and all(job.process.exitcode is None for job in jobs) and time.monotonic() < end:
            time.sleep(0.0005)


def assert_same_end(a, b):
    one, two = (torch.load(p / "checkpoints/last.ckpt", weights_only=True) for p in (a, b))
    assert one["global_step"] == two["global_step"]
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    for name in ("train/loss", "val/loss", "val/iou"):
        x, y = ([(r["step"], r[name]) for r in read_rows(p / "metrics.csv") if name in r] for p in (a, b))
        assert x == y, f"{name}: rows are lost, doubled or different"
    best = [torch.load(p / "checkpoints/best.ckpt", weights_only=True)["global_step"] for p in (a, b)]
    assert best[0] == best[1]


def train_through(classifier, tmp_path, kills, epochs, seed):
    argv = [*EXPLAINER, *NOISY, *WITHIN_EPOCHS, "--classifier.checkpoint", classifier, "--trainer.max_epochs", str(epochs)]
    assert run([*argv, "--run_dir", f"{tmp_path}/whole"], tmp_path) == 0
    argv += ["--run_dir", f"{tmp_path}/cut", "--ckpt_path", "auto"]
    chaos = Chaos(tmp_path / "cut", seed)
    while chaos.kills < kills:
        codes = chaos.strike([Job(argv, tmp_path)])
        assert codes in ([-signal.SIGKILL], [0]), codes
        if codes == [0]:
            break
    assert run(argv, tmp_path) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    return chaos


def evaluate_through(classifier, tmp_path, kills, seed):
    argv = [*EVALUATE, "--classifier.checkpoint", classifier]
    assert run([*argv, "--out", f"{tmp_path}/whole"], tmp_path, program="evaluate") == 0
    argv += ["--out", f"{tmp_path}/cut"]
    chance, done = random.Random(seed), 0
    rows = tmp_path / "cut/rows"
    stored = lambda: sum(p.stat().st_size for p in rows.glob("*.jsonl"))  # noqa: E731
    for _ in range(kills):
        before, wanted = stored(), chance.randint(0, 3)
        job = Job(argv, tmp_path, program="evaluate")
        for _ in range(wanted):
            end = time.monotonic() + 60
            while stored() == before and job.process.exitcode is None and time.monotonic() < end:
                time.sleep(0.001)
            before = stored()
        time.sleep(chance.uniform(0, 0.1))
        job.send(signal.SIGKILL)
        done += job.wait() == -signal.SIGKILL
    assert run(argv, tmp_path, program="evaluate") == 0
    one, two = ((tmp_path / p / "results.jsonl").read_text() for p in ("whole", "cut"))
    assert one == two
    keys = [tuple(json.loads(line)[k] for k in ("method", "scale", "protocol", "image", "class")) for line in two.splitlines()]
    assert len(keys) == len(set(keys)) > 100, "no row twice"
    return done


def test_three_kills_in_training_change_nothing(classifier, tmp_path):
    assert train_through(classifier, tmp_path, kills=3, epochs=10, seed=0).kills == 3


def test_two_kills_in_evaluation_change_nothing(classifier, tmp_path):
    assert evaluate_through(classifier, tmp_path, kills=2, seed=0) >= 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_in_training_change_nothing(classifier, tmp_path):
    chaos = train_through(classifier, tmp_path, kills=20, epochs=60, seed=1)
    assert chaos.kills == 20 and chaos.torn >= 1, (chaos.kills, chaos.torn)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_eight_kills_in_evaluation_change_nothing(classifier, tmp_path):
    assert evaluate_through(classifier, tmp_path, kills=8, seed=1) >= 4


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_of_one_rank_change_nothing(classifier, tmp_path):
    argv = [*EXPLAINER, *NOISY, *WITHIN_EPOCHS, "--classifier.checkpoint", classifier, "--trainer.max_epochs", "20"]
    assert run_group([*argv, "--run_dir", f"{tmp_path}/whole"], tmp_path) == [0, 0]
    argv += ["--run_dir", f"{tmp_path}/cut", "--ckpt_path", "auto"]
    chaos = Chaos(tmp_path / "cut", 2)
    for _ in range(4):
        codes = chaos.strike(group(argv, tmp_path))
        assert 0 not in codes, "the survivor must not take the run for finished"
    assert run_group(argv, tmp_path) == [0, 0]
    assert chaos.kills == 4
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
