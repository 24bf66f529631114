"""Two processes (gloo, CPU) train and measure what one does; nobody waits for ever, nobody trains alone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from explainer.tasks.csv_log import read_rows
from tests.integration.launch import CLASSIFIER, CONTEXT, DATA, EXPLAINER, free_port, group, reduce_unevenly, run, run_group

ROOT = Path(__file__).parents[2]
# BatchNorm sees half of the batch in each of two processes: equality needs a network without it.
PLAIN = [
    "--explainer.network",
    "unet",
    "--explainer.options",
    "{encoder_name: vgg11, encoder_depth: 3, decoder_channels: [16, 8, 8], decoder_use_norm: false}",
]
# Adam divides by the size of gradients that may be nothing but rounding: it would amplify the order of a sum to a different run.
EQUAL = ["--data.global_batch", "true", "--trainer.max_epochs", "2", "--optimizer.name", "sgd", "--optimizer.lr", "0.005"]


def curve(folder, name):
    return [(r["step"], r[name]) for r in read_rows(folder / "metrics.csv") if name in r]


def assert_same_run(a, b, names, tolerance):
    for name in names:
        one, two = curve(a, name), curve(b, name)
        assert one and [s for s, _ in one] == [s for s, _ in two], name
        assert [v for _, v in two] == pytest.approx([v for _, v in one], abs=tolerance, rel=tolerance), name


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    assert run([*CLASSIFIER, "--trainer.max_epochs", "1", "--run_dir", f"{folder}/c"], folder) == 0
    return f"{folder}/c/checkpoints/best.ckpt"


@pytest.fixture(scope="module")
def plain(classifier, tmp_path_factory):
    """One process; and the arguments that repeat it."""
    folder = tmp_path_factory.mktemp("plain")
    argv = [*EXPLAINER, *PLAIN, *EQUAL, "--classifier.checkpoint", classifier]
    assert run([*argv, "--run_dir", f"{folder}/one"], folder) == 0
    return folder / "one", argv


NAMES = ("train/loss", "train/loss/entropy", "train/area", "val/loss", "val/loss/area_bound", "val/iou", "val/area")


def test_two_processes_equal_one(plain, tmp_path):
    one, argv = plain
    assert run_group([*argv, "--run_dir", f"{tmp_path}/two"], tmp_path) == [0, 0]
    assert_same_run(one, tmp_path / "two", NAMES, 1e-4)
    a, b = (json.loads((p / "summary.json").read_text()) for p in (one, tmp_path / "two"))
    assert {k: v for k, v in b.items() if k.startswith("val/")} == pytest.approx(
        {k: v for k, v in a.items() if k.startswith("val/")}, abs=1e-4
    )
    a, b = (torch.load(p / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for p in (one, tmp_path / "two"))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, atol=2e-4, rtol=1e-3)
    assert not [k for k in b if k.startswith("explanandum.")], "the frozen classifier is in no checkpoint"


def test_two_processes_draw_the_random_numbers_of_one(classifier, tmp_path):
    """All that is random in a step, at the rate where rounding does not grow: losses agree to 1e-5."""
    noisy = ["--masking.binarize", "0.5", "--masking.subset", "0.5", "--masking.area_conditioned", "0.5", "--masking.fill", "noise"]
    argv = [*EXPLAINER, *PLAIN, *EQUAL, *noisy, "--trainer.max_epochs", "1", "--classifier.checkpoint", classifier]
    assert run([*argv, "--run_dir", f"{tmp_path}/one"], tmp_path) == 0
    assert run_group([*argv, "--run_dir", f"{tmp_path}/two"], tmp_path) == [0, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two", ("train/loss", "train/loss/classification", "val/loss"), 1e-5)


def test_batch_norm_in_several_processes_is_said(classifier, tmp_path):
    """Its statistics are each process's own on the CPU: this is not the training of one process, and nobody should think so."""
    argv = [*EXPLAINER, *EQUAL, "--trainer.max_epochs", "1", "--classifier.checkpoint", classifier]
    jobs = group([*argv, "--explainer.options", "{widths: [8, 8], decoder_channels: [8]}", "--run_dir", f"{tmp_path}/two"], tmp_path)
    assert [job.wait() for job in jobs] == [0, 0]
    assert "BatchNorm layers take their statistics from each process's own images" in jobs[0].text
    assert "BatchNorm layers" not in jobs[1].text


@pytest.mark.slow
def test_two_nodes_on_loopback(plain, tmp_path):
    one, argv = plain
    assert run_group([*argv, "--run_dir", f"{tmp_path}/two"], tmp_path, world=2, nodes=2) == [0, 0]
    assert_same_run(one, tmp_path / "two", NAMES, 1e-4)


def test_measuring_an_uneven_number_of_images(plain, tmp_path):
    """3 images in batches of 2: the first process has two, the second one. Means must weigh images, not processes."""
    one, argv = plain
    here = ["validate", *argv[1:], "--data.eval_options", "{length: 3}", "--data.eval_batch_size", "2"]
    here += ["--ckpt_path", f"{one}/checkpoints/last.ckpt"]
    assert run([*here, "--run_dir", f"{tmp_path}/a"], tmp_path) == 0
    assert run_group([*here, "--run_dir", f"{tmp_path}/b"], tmp_path) == [0, 0]
    a, b = (json.loads((tmp_path / f"{x}/validate.json").read_text()) for x in "ab")
    assert b == pytest.approx(a, abs=1e-6, nan_ok=True)


def test_classifier_metrics_of_an_uneven_number_of_images(classifier, tmp_path):
    here = ["validate", *CLASSIFIER[1:], "--ckpt_path", classifier, "--data.eval_options", "{length: 5}"]
    assert run([*here, "--run_dir", f"{tmp_path}/a"], tmp_path) == 0
    assert run_group([*here, "--run_dir", f"{tmp_path}/b"], tmp_path) == [0, 0]
    a, b = (json.loads((tmp_path / f"{x}/validate.json").read_text()) for x in "ab")
    assert b.pop("ap_per_class") == pytest.approx(a.pop("ap_per_class"), abs=1e-6, nan_ok=True)
    assert b == pytest.approx(a, abs=1e-6, nan_ok=True)


def test_fewer_images_than_processes_is_refused(classifier, tmp_path):
    here = ["validate", *CLASSIFIER[1:], "--ckpt_path", classifier, "--data.eval_options", "{length: 1}", "--run_dir", f"{tmp_path}/r"]
    jobs = group(here, tmp_path)
    assert [job.wait() for job in jobs] == [2, 2]
    assert "the val split has 1 image(s) for 2 processes" in jobs[0].text


def test_a_process_whose_images_were_all_skipped_takes_part(tmp_path):
    port = free_port()
    jobs = [CONTEXT.Process(target=reduce_unevenly, args=(rank, port, str(tmp_path / f"{rank}.json"))) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    scores = {"val/ap_per_class": [1.0, 1.0], "val/f1": 1.0, "val/precision": 1.0, "val/recall": 1.0, "accuracy": 0.5}
    scores["val/confusion"] = [[[1, 0], [0, 1]], [[1, 0], [0, 1]]]  # type: ignore[assignment]
    assert a == b == {"loss": 2.0, "iou": 5.0, "area": 3.0, **scores}


def test_predict_shares_the_images(plain, tmp_path):
    one, argv = plain
    here = ["predict", *argv[1:], "--ckpt_path", f"{one}/checkpoints/last.ckpt", "--run_dir", f"{tmp_path}/p"]
    assert run_group(here, tmp_path) == [0, 0]
    assert len(list((tmp_path / "p/predictions").glob("*.npz"))) == 24


@pytest.mark.slow
def test_sigterm_stops_all_processes_at_one_step_and_the_resume_is_exact(plain, tmp_path):
    """Only one process is told; dropout, random masks and fills are on, so that the random numbers of both ranks matter."""
    _, argv = plain
    noisy = ["--masking.binarize", "0.5", "--masking.subset", "0.5", "--masking.fill", "random", "--trainer.max_epochs", "3"]
    argv = [*argv, *noisy]
    assert run_group([*argv, "--run_dir", f"{tmp_path}/whole"], tmp_path) == [0, 0]
    jobs = group([*argv, "--run_dir", f"{tmp_path}/cut"], tmp_path, strikes={1: ("step", 8, signal.SIGTERM)})
    assert [job.wait() for job in jobs] == [143, 143], [job.text for job in jobs]
    assert torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)["global_step"] in (8, 9)
    assert run_group([*argv, "--run_dir", f"{tmp_path}/cut", "--ckpt_path", "last"], tmp_path) == [0, 0]
    a, b = (torch.load(tmp_path / p / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for p in ("whole", "cut"))
    for key, value in a.items():
        assert torch.equal(value, b[key]), key
    assert_same_run(tmp_path / "whole", tmp_path / "cut", ("train/loss", "val/loss"), 0)


def test_a_process_that_fails_does_not_let_the_others_wait(plain, tmp_path):
    """SIGKILL of one rank during training; the other ends with an error of its own and the checkpoint is whole."""
    _, argv = plain
    jobs = group([*argv, "--trainer.max_epochs", "200", "--run_dir", f"{tmp_path}/r"], tmp_path)
    jobs[0].wait_for(lambda: (tmp_path / "r/checkpoints/last.ckpt").is_file())
    jobs[1].send(signal.SIGKILL)
    assert jobs[1].wait() == -signal.SIGKILL
    assert jobs[0].wait(60) != 0
    assert torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["global_step"] >= 6


def test_the_classifier_is_not_trained_by_several_processes(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("task: classify\n")
    argv = [*EXPLAINER, "--classifier.checkpoint", f"{tmp_path}/missing.ckpt", "--classifier.train_with", str(config)]
    jobs = group([*argv, "--run_dir", f"{tmp_path}/r"], tmp_path)
    assert [job.wait() for job in jobs] == [2, 2]
    assert "Train it before a distributed run: python train.py fit --config" in jobs[0].text


def test_batch_that_cannot_be_shared(classifier, tmp_path):
    argv = [*EXPLAINER, "--data.global_batch", "true", "--data.batch_size", "5", "--classifier.checkpoint", classifier]
    jobs = group([*argv, "--run_dir", f"{tmp_path}/r"], tmp_path)
    assert [job.wait() for job in jobs] == [2, 2]
    assert "batch_size 5 cannot be shared evenly by 2 devices" in jobs[0].text


def test_a_batch_that_grows_with_the_processes_is_reported(tmp_path):
    argv = [*CLASSIFIER, "--trainer.max_epochs", "1", "--run_dir"]
    jobs = group([*argv, f"{tmp_path}/a"], tmp_path)
    assert [job.wait() for job in jobs] == [0, 0]
    message = "2 processes with data.batch_size 4 each train with 8 images per step, not the 4 of one process."
    assert [job.text.count(message) for job in jobs] == [1, 0]
    jobs = group([*argv, f"{tmp_path}/b", "--data.global_batch", "true"], tmp_path / "shared")
    assert [job.wait() for job in jobs] == [0, 0]
    assert "images per step" not in jobs[0].text


def test_missing_classifier_is_trained_by_one_process_then_explained(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"task: classify\nrun_dir: {tmp_path}/c\ndata: {{options: {{size: 32, length: 24}}, batch_size: 4}}\n"
        "classifier: {options: {widths: [8, 8]}}\nlogging: {wandb: 'off'}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, progress_bar: false, devices: 2}\n"
    )
    checkpoint = tmp_path / "c/checkpoints/best.ckpt"
    argv = [*EXPLAINER, "--classifier.checkpoint", str(checkpoint), "--classifier.train_with", str(config), "--trainer.max_epochs", "1"]
    assert run([*argv, "--run_dir", f"{tmp_path}/r"], tmp_path) == 0
    assert checkpoint.is_file() and (tmp_path / "r/checkpoints/best.ckpt").is_file()


# ---------------------------------------------------------------------- the real launchers
def launch(command, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "WORLD", "RANK", "LOCAL_"))}
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**clean, "OMP_NUM_THREADS": "1", **env}
    )


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.mark.slow
def test_torchrun_with_defaults_is_one_training(plain, tmp_path):
    """Lightning's defaults would run two independent trainings in one folder."""
    one, argv = plain
    job = launch([*TORCHRUN, "--standalone", "--nproc-per-node", "2", "train.py", *argv, "--run_dir", f"{tmp_path}/two"])
    text, _ = job.communicate(timeout=240)
    assert job.returncode == 0, text
    assert_same_run(one, tmp_path / "two", NAMES, 1e-4)


@pytest.mark.slow
def test_lightning_launches_processes_itself(plain, tmp_path):
    one, argv = plain
    job = launch([sys.executable, "train.py", *argv, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--run_dir", f"{tmp_path}/two"])
    text, _ = job.communicate(timeout=240)
    assert job.returncode == 0, text
    assert_same_run(one, tmp_path / "two", NAMES, 1e-4)


@pytest.mark.slow
def test_two_torchruns_meet_on_loopback(plain, tmp_path):
    one, argv = plain
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    jobs = [
        launch([*TORCHRUN, *meet, "--node-rank", str(n), "train.py", *argv, "--run_dir", f"{tmp_path}/two"], GLOO_SOCKET_IFNAME="lo")
        for n in range(2)
    ]
    texts = [job.communicate(timeout=300)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], texts
    assert_same_run(one, tmp_path / "two", NAMES, 1e-4)


@pytest.mark.slow
def test_torchrun_restarts_and_resumes_by_itself(plain, tmp_path):
    """One worker is killed; torchrun starts both again, and without --ckpt_path they go on from last.ckpt."""
    import time

    _, argv = plain
    argv = [*argv, "--trainer.max_epochs", "12"]
    assert run_group([*argv, "--run_dir", f"{tmp_path}/whole"], tmp_path) == [0, 0]
    job = launch(
        [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "train.py", *argv, "--run_dir", f"{tmp_path}/cut"]
    )
    end = time.monotonic() + 200
    while not (tmp_path / "cut/checkpoints/last-previous.ckpt").is_file():
        assert time.monotonic() < end and job.poll() is None
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    text, _ = job.communicate(timeout=280)
    assert job.returncode == 0, text
    assert "resuming from" in text
    a, b = (torch.load(tmp_path / p / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for p in ("whole", "cut"))
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


EVALUATE = [
    *DATA[:2],
    "--batch_size",
    "5",
    "--methods",
    "{grad_cam: {}, random: {}, centre: {}}",
    "--bootstrap",
    "20",
    "--progress",
    "false",
    "--protocols",
    "[segmentation, insertion_deletion]",
    "--split",
    "test",
    "--device",
    "cpu",
]


def test_evaluation_by_two_processes_gives_the_same_rows(classifier, tmp_path):
    argv = [*EVALUATE, "--classifier.checkpoint", classifier]
    assert run([*argv, "--out", f"{tmp_path}/one"], tmp_path, program="evaluate") == 0
    assert run_group([*argv, "--out", f"{tmp_path}/two"], tmp_path, program="evaluate") == [0, 0]
    one, two = ((tmp_path / p / "results.jsonl").read_text() for p in ("one", "two"))
    assert one == two and one.count("\n") > 24


def test_evaluation_after_a_distributed_fit_uses_all_processes(plain, tmp_path):
    _, argv = plain
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        f"out: {tmp_path}/results\ndata: {{options: {{size: 32, length: 24}}}}\nbatch_size: 5\nprogress: false\nbootstrap: 20\n"
        "device: cpu\n"
        f"classifier: {{checkpoint: {argv[argv.index('--classifier.checkpoint') + 1]}}}\nprotocols: [segmentation]\n"
        f"methods: {{explainer: {{checkpoint: {tmp_path}/two/checkpoints/best.ckpt}}}}\n"
    )
    argv = [*argv, "--trainer.max_epochs", "1", "--evaluate_with", str(config)]
    assert run_group([*argv, "--run_dir", f"{tmp_path}/two"], tmp_path) == [0, 0]
    assert len(list((tmp_path / "results/rows").glob("*.jsonl"))) == 2, "each process computed a share"
    assert json.loads((tmp_path / "results/summary.json").read_text())
