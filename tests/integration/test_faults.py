"""SIGKILL at many moments of training and evaluation, then a resume, again and again: nothing is lost, nothing is done twice."""

import functools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from explainer.tasks.csv_log import read_rows
from tests.integration.launch import CLASSIFIER, DATA, EXPLAINER, Job, group, run, run_group

NOISY = ["--masking.binarize", "0.5", "--masking.subset", "0.5", "--masking.fill", "random", "--optimizer.schedule", "one_cycle"]
WITHIN_EPOCHS = ["--trainer.save_every_n_steps", "2"]
EVALUATE = [
    *DATA[:2],
    "--batch_size",
    "3",
    "--methods",
    "{grad_cam: {}, random: {}, gradient: {}, rise: {options: {n_masks: 30}}}",
    "--bootstrap",
    "20",
    "--protocols",
    "[segmentation]",
    "--split",
    "test",
    "--device",
    "cpu",
    "--progress",
    "false",
]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    assert run([*CLASSIFIER, "--trainer.max_epochs", "1", "--run_dir", f"{folder}/c"], folder) == 0
    return f"{folder}/c/checkpoints/best.ckpt"


def check_checkpoints(folder):
    """Every checkpoint that is there is whole."""
    for path in (folder / "checkpoints").glob("*.ckpt"):
        assert torch.load(path, weights_only=True)["state_dict"], path


def moments(kills, seed, kinds):
    """When each process dies. Two checkpoints at least are written before a third of the deaths, so the run gets on."""
    chance = random.Random(seed)
    most = {"step": 9, "sync": 12, "time": 150}
    return [(kind, chance.randint(1, most[kind])) for kind in (chance.choice(kinds) for _ in range(kills))]


def assert_same_end(a, b, validations=True):
    """``validations`` False: rows of whole validations may be missing in ``b``, but none may differ or stand there twice."""
    one, two = (torch.load(p / "checkpoints/last.ckpt", weights_only=True) for p in (a, b))
    assert one["global_step"] == two["global_step"]
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    for name in ("train/loss", "val/loss", "val/iou"):
        x, y = ([(r["step"], r[name]) for r in read_rows(p / "metrics.csv") if name in r] for p in (a, b))
        if validations or name.startswith("train"):
            assert x == y, f"{name}: rows are lost, doubled or different"
        else:
            assert len(set(y)) == len(y) and set(y) <= set(x), f"{name}: rows are doubled or different"
    if not validations:
        return
    best = [torch.load(p / "checkpoints/best.ckpt", weights_only=True)["global_step"] for p in (a, b)]
    assert best[0] == best[1]


def train_through(classifier, tmp_path, dies, epochs):
    """A run killed at each of the moments in turn against one that was not; how many kills tore a file."""
    argv = [*EXPLAINER, *NOISY, *WITHIN_EPOCHS, "--classifier.checkpoint", classifier, "--trainer.max_epochs", str(epochs)]
    assert run([*argv, "--run_dir", f"{tmp_path}/whole"], tmp_path) == 0
    argv += ["--run_dir", f"{tmp_path}/cut", "--ckpt_path", "auto"]
    torn = 0
    for die in dies:
        job = Job(argv, tmp_path, strike=die)
        assert job.wait() == -signal.SIGKILL, (die, job.text)
        torn += any((tmp_path / "cut/checkpoints").glob(".last.ckpt~*.tmp"))
        check_checkpoints(tmp_path / "cut")
    assert run(argv, tmp_path) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "cut")
    return torn


def evaluate_through(classifier, tmp_path, dies):
    argv = [*EVALUATE, "--classifier.checkpoint", classifier]
    assert run([*argv, "--out", f"{tmp_path}/whole"], tmp_path, program="evaluate") == 0
    argv += ["--out", f"{tmp_path}/cut"]
    for die in dies:
        job = Job(argv, tmp_path, program="evaluate", strike=die)
        assert job.wait() == -signal.SIGKILL, (die, job.text)
    assert run(argv, tmp_path, program="evaluate") == 0
    one, two = ((tmp_path / p / "results.jsonl").read_text() for p in ("whole", "cut"))
    assert one == two
    keys = [tuple(json.loads(line)[k] for k in ("method", "scale", "protocol", "image", "class")) for line in two.splitlines()]
    assert len(keys) == len(set(keys)) > 100, "no row twice"


def test_kills_in_training_change_nothing(classifier, tmp_path):
    """After some steps, in the middle of writing a checkpoint, and between its renaming and what follows."""
    assert train_through(classifier, tmp_path, [("step", 5), *(("sync", n) for n in range(5, 9))], epochs=6) >= 1


def test_two_kills_in_evaluation_change_nothing(classifier, tmp_path):
    evaluate_through(classifier, tmp_path, [("sync", 2), ("sync", 5)])


def stopped(job):
    """Whether the process was stopped by a signal and waits."""
    return Path(f"/proc/{job.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_two_commands_in_one_folder(classifier, tmp_path):
    """While one writes, the other is refused and changes nothing; what a killed one held is free."""
    fit = [
        *EXPLAINER,
        "--classifier.checkpoint",
        classifier,
        "--trainer.max_epochs",
        "2",
        "--run_dir",
        f"{tmp_path}/r",
        "--ckpt_path",
        "auto",
    ]
    evaluate = [*EVALUATE, "--classifier.checkpoint", classifier, "--out", f"{tmp_path}/results"]
    for program, argv, strike in (("train", fit, ("step", 8)), ("evaluate", evaluate, ("sync", 2))):
        holder = Job(argv, tmp_path, program=program, strike=(*strike, signal.SIGSTOP))
        try:
            holder.wait_for(lambda holder=holder: stopped(holder))
            folder = tmp_path / {"train": "r", "evaluate": "results"}[program]
            before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
            second = Job([*argv, *(["--overwrite", "true"] if program == "train" else [])], tmp_path / "second", program=program)
            assert second.wait() == 2, second.text
            assert f"of process {holder.process.pid} on" in second.text and "Traceback" not in second.text
            assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        finally:
            holder.process.kill()
            holder.process.join()
        assert run(argv, tmp_path, program=program) == 0
        assert not list(folder.rglob(".in-use*"))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_kills_in_training_change_nothing(classifier, tmp_path):
    assert train_through(classifier, tmp_path, moments(30, 1, ("step", "sync", "sync", "time")), epochs=60) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_in_evaluation_change_nothing(classifier, tmp_path):
    evaluate_through(classifier, tmp_path, [("sync", 1 + i % 3) for i in range(5)])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kills_of_one_rank_change_nothing(classifier, tmp_path):
    argv = [*EXPLAINER, *NOISY, *WITHIN_EPOCHS, "--classifier.checkpoint", classifier, "--trainer.max_epochs", "20"]
    assert run_group([*argv, "--run_dir", f"{tmp_path}/whole"], tmp_path) == [0, 0]
    argv += ["--run_dir", f"{tmp_path}/cut", "--ckpt_path", "auto"]
    for rank, die in ((0, ("step", 5)), (1, ("step", 3)), (0, ("sync", 5)), (0, ("sync", 2)), (1, ("step", 9))):
        jobs = group(argv, tmp_path, strikes={rank: die})
        codes = [job.wait() for job in jobs]
        assert codes[rank] == -signal.SIGKILL, (rank, die, codes)
        assert 0 not in codes, "the survivor must not take the run for finished"
        check_checkpoints(tmp_path / "cut")
    assert run_group(argv, tmp_path) == [0, 0]
    # The survivor saves at once, and where that is behind an epoch's last step, the validation that it stood before is not made up for.
    assert_same_end(tmp_path / "whole", tmp_path / "cut", validations=False)


# ---------------------------------------------------------------------- every command that works for long
#: Deaths of each command: 20 make 140 of the seven.
KILLS = int(os.environ.get("EXPLAINER_KILLS", "20"))


@pytest.fixture(scope="module")
def model(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    argv = [*EXPLAINER, "--classifier.checkpoint", classifier, "--trainer.max_epochs", "1", "--run_dir", f"{folder}/e"]
    assert run(argv, folder) == 0
    return f"{folder}/e/checkpoints/best.ckpt"


def maps_in(folder):
    """``{(image, class): stored values}`` of a map cache; the same pair from two processes must be the same map."""
    found = {}
    for path in folder.rglob("shard-*.npz"):
        with np.load(path) as shard:
            for i, pair in enumerate(zip(shard["ids"].tolist(), shard["classes"].tolist(), strict=True)):
                values = tuple(shard[name][i].tobytes() for name in ("maps", "low", "scale"))
                assert found.setdefault(pair, values) == values, pair
    return found


def files_in(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def weights_in(folder):
    """An exported model, and the names of what lies beside it: the card and the drift report tell times."""
    return {p.name: p.read_bytes() if p.name in ("model.safetensors", "config.json") else None for p in folder.iterdir()}


def concepts_in(folder):
    """Numbers, weights and pictures; the provenance tells times."""
    found = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".safetensors", ".jpg")}
    return {**json.loads((folder / "concepts.json").read_text()), "provenance": None}, found


def rows_in(folder):
    return (folder / "results.jsonl").read_text().splitlines()


def training_in(folder):
    """What a training ended with: its last weights, which epoch is the best, and every row of its table."""
    check_checkpoints(folder)
    last, best = (torch.load(folder / f"checkpoints/{name}.ckpt", weights_only=True) for name in ("last", "best"))
    names = ("train/loss", "val/loss", "val/iou")
    rows = [(name, row["step"], row[name]) for row in read_rows(folder / "metrics.csv") for name in names if name in row]
    assert len(set(rows)) == len(rows), "rows are doubled"
    return {key: value.numpy().tobytes() for key, value in last["state_dict"].items()}, best["global_step"], rows


COMMANDS = {
    "train": (
        [
            *EXPLAINER,
            *NOISY,
            *WITHIN_EPOCHS,
            "--classifier.checkpoint",
            "<classifier>",
            "--trainer.max_epochs",
            "6",
            "--ckpt_path",
            "auto",
            "--run_dir",
            "<out>",
        ],
        1,
        training_in,
    ),
    "evaluate": ([*EVALUATE, "--classifier.checkpoint", "<classifier>", "--out", "<out>"], 1, rows_in),
    "maps": (
        [
            "maps",
            *DATA[:2],
            "--batch_size",
            "3",
            "--method.name",
            "grad_cam",
            "--split",
            "train",
            "--cache.folder",
            "<out>",
            "--device",
            "cpu",
            "--classifier.checkpoint",
            "<classifier>",
        ],
        2,
        maps_in,
    ),
    "export": (["export", "<model>", "--format", "safetensors", "--size", "32", "--out", "<out>"], 1, weights_in),
    "calibrate": (
        [
            "calibrate",
            "--model",
            "<model>",
            *DATA[:2],
            "--classifier.checkpoint",
            "<classifier>",
            "--alpha",
            "0.5",
            "--predicted_from",
            "0",
            "--out",
            "<out>/selector.json",
        ],
        1,
        files_in,
    ),
    "concepts": (
        [
            "concepts",
            "fit",
            *DATA[:2],
            "--classifier.checkpoint",
            "<classifier>",
            "--layers",
            "[features.5]",
            "--mask_side",
            "16",
            "--tau",
            "0.05",
            "--bootstrap",
            "10",
            "--pictures",
            "1",
            "--store",
            "<out>/store",
            "--out",
            "<out>",
        ],
        1,
        concepts_in,
    ),
    "explain": (["explain", "<model>", "<photos>", "--classifier", "<classifier>", "--quiet", "--out", "<out>"], 1, files_in),
}


def photographs(tmp_path):
    """A folder with a dozen."""
    folder = tmp_path / "photos"
    if not folder.exists():
        folder.mkdir()
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def killed_at_random(command, number, kinds, classifier, model, tmp_path):
    """A command that dies ``number`` times ends as one that never died; of ``maps`` two processes at once, each of which may die."""
    words, together, result = COMMANDS[command]
    program = "evaluate" if command == "evaluate" else "train"

    def argv(out):
        places = {"<classifier>": classifier, "<model>": model, "<photos>": str(photographs(tmp_path)), "<out>": str(out)}
        return [functools.reduce(lambda text, place: text.replace(*place), places.items(), word) for word in words]

    assert run(argv(tmp_path / "whole"), tmp_path, program=program) == 0
    expected = result(tmp_path / "whole")
    chance, kills, out = random.Random(command), 0, tmp_path / "cut"
    for _ in range(6 * number):
        if kills >= number:
            break
        strikes = [(kind, chance.randint(1, {"sync": 8, "time": 150}[kind])) for kind in chance.choices(kinds, k=together)]
        jobs = [Job(argv(out), tmp_path / str(i), program=program, strike=strike) for i, strike in enumerate(strikes)]
        codes = [job.wait() for job in jobs]
        assert set(codes) <= {0, -signal.SIGKILL}, (strikes, *(job.text for job in jobs))
        kills += sum(code != 0 for code in codes)
        if 0 in codes:  # finished in spite of all: begin anew
            assert result(out) == expected, strikes
            shutil.rmtree(out)
    assert kills >= number, "too few of the kills struck"
    assert run(argv(out), tmp_path, program=program) == 0
    assert result(out) == expected
    assert not [p for p in out.rglob(".*") if p.name.endswith(".tmp")], "what the dead were writing is removed"


@pytest.mark.parametrize("command", ["maps", "export", "calibrate", "concepts", "explain"])
def test_a_kill_leaves_what_the_same_command_finishes(command, classifier, model, tmp_path):
    """Training and evaluation are sampled above. What is cheap to make again is not synced: there the clock strikes."""
    kinds = ("time",) if command in ("concepts", "explain") else ("sync",)
    killed_at_random(command, 1, kinds, classifier, model, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("command", COMMANDS)
def test_random_kills_leave_what_the_same_command_finishes(command, classifier, model, tmp_path):
    """By syncs of the disk, in the middle of a file, and by the clock."""
    killed_at_random(command, KILLS, ("sync", "time"), classifier, model, tmp_path)
