"""Stopping and saving: signals, requeueing, full disks, checkpoints that are damaged or hostile."""

import errno
import os
import pickle
import shutil
import signal
import stat
import time
import zipfile

import pytest
import torch

from explainer import files
from explainer.errors import CheckpointError, ConfigError
from explainer.tasks import run_folder
from explainer.tasks.csv_log import AppendingCSVLogger, read_rows
from explainer.tasks.run_folder import check_run_dir, resolve_checkpoint
from explainer.tasks.saving import AtomicCheckpointIO
from explainer.tasks.stopping import GracefulStop
from tests.integration.launch import CLASSIFIER, CONTEXT, EXPLAINER, Job, run, write_without_pause


def weights(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def assert_same_weights(a, b):
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of 3 epochs, 18 steps; and the arguments that repeat it."""
    folder = tmp_path_factory.mktemp("stop")
    argv = [*CLASSIFIER, "--trainer.max_epochs", "3"]
    assert run([*argv, "--run_dir", f"{folder}/whole"], folder) == 0
    return folder / "whole", argv


@pytest.mark.parametrize(
    ("strike", "code", "saved"),
    [
        (("step", 8, signal.SIGTERM), 143, 8),
        (("step", 8, signal.SIGINT), 130, 8),
        (("step", 8, signal.SIGHUP), 129, 8),
        (("validation", 3, signal.SIGTERM), 143, 12),  # the first of the second epoch's two batches
    ],
    ids=["SIGTERM", "SIGINT", "SIGHUP", "validation"],
)
def test_a_signal_saves_and_the_resumed_run_is_exact(whole, tmp_path, strike, code, saved):
    reference, argv = whole
    here = [*argv, "--run_dir", f"{tmp_path}/r"]
    job = Job(here, tmp_path, strike=strike)
    assert job.wait() == code, job.text
    content = torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == saved
    assert run([*here, "--ckpt_path", "last"], tmp_path) == 0
    assert_same_weights(reference, tmp_path / "r")
    for name in ("train/loss", "val/loss"):
        a, b = ([(r["step"], r[name]) for r in read_rows(p / "metrics.csv") if name in r] for p in (reference, tmp_path / "r"))
        assert a == b, name


def test_nohup_is_respected_and_a_closed_terminal_is_left(monkeypatch):
    stop, former = GracefulStop(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.listening(None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "nohup: the run goes on"
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        left = []
        monkeypatch.setattr(os, "isatty", lambda stream: stream == 2)
        monkeypatch.setattr(os, "dup2", lambda new, stream: left.append(stream))
        with stop.listening(None):
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP and left == [2], "what is printed into a closed terminal is an error"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)


def test_slurm_requeues_and_goes_on_by_itself(whole, tmp_path):
    reference, argv = whole
    stub = tmp_path / "bin/scontrol"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)
    env = {
        "PATH": f"{stub.parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "night",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NODELIST": "localhost",
    }
    here = [*argv, "--run_dir", f"{tmp_path}/r"]
    job = Job(here, tmp_path, env, strike=("step", 8, signal.SIGUSR1))
    assert job.wait() == 0, job.text
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert run(here, tmp_path, {**env, "SLURM_RESTART_COUNT": "1"}) == 0
    assert_same_weights(reference, tmp_path / "r")


def test_gradient_accumulation_is_stopped_between_two_steps(whole, tmp_path):
    """2 batches a step: 3 steps an epoch. A checkpoint in between would lose a gradient."""
    _, argv = whole
    argv = [*argv, "--trainer.accumulate_grad_batches", "2"]
    assert run([*argv, "--run_dir", f"{tmp_path}/whole"], tmp_path) == 0
    job = Job([*argv, "--run_dir", f"{tmp_path}/r"], tmp_path, strike=("backward", 9, signal.SIGTERM))
    assert job.wait() == 143, job.text
    assert run([*argv, "--run_dir", f"{tmp_path}/r", "--ckpt_path", "last"], tmp_path) == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "r")
    steps = [r["step"] for r in read_rows(tmp_path / "r/metrics.csv") if "train/loss" in r]
    assert steps == list(range(9))


# ---------------------------------------------------------------------- the writer
def save(path, value):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((4,), float(value))}}, path)


def value(path):
    return float(torch.load(path, weights_only=True)["state_dict"]["w"][0])


def test_writer_keeps_the_previous_file(tmp_path):
    last = tmp_path / "checkpoints/last.ckpt"
    for i in range(3):
        save(last, i)
    assert value(last) == 2 and value(last.with_name("last-previous.ckpt")) == 1
    save(last.with_name("best.ckpt"), 9)
    assert sorted(p.name for p in last.parent.iterdir()) == ["best.ckpt", "last-previous.ckpt", "last.ckpt"]


@pytest.mark.parametrize("broken", ["save", "fsync", "replace"])
def test_full_disk_leaves_the_earlier_files(tmp_path, monkeypatch, broken):
    last = tmp_path / "last.ckpt"
    save(last, 1)
    save(last, 2)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_in_torch(content, file):
        file.write(b"PK half a file")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    if broken == "save":
        monkeypatch.setattr(torch, "save", full_in_torch)
    else:
        monkeypatch.setattr(*{"fsync": (files.os, "fsync"), "replace": (type(last), "replace")}[broken], full)
    with pytest.raises(CheckpointError, match=r"last\.ckpt could not be written .*untouched: free some space"):
        save(last, 3)
    monkeypatch.undo()
    assert value(last) == 2
    assert value(tmp_path / "last-previous.ckpt") in (1, 2)
    save(last, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-previous.ckpt", "last.ckpt"], "leftovers are removed"


def test_without_hard_links_the_previous_file_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(files.os, "link", refuse)
    last = tmp_path / "last.ckpt"
    save(last, 1)
    save(last, 2)
    assert value(last) == 2 and value(tmp_path / "last-previous.ckpt") == 1


def test_a_full_disk_ends_training_in_words(whole, tmp_path, monkeypatch, capsys):
    from explainer.cli import main as train

    _, argv = whole
    original = os.fsync

    def full_later(handle):
        if (tmp_path / "r/checkpoints/last.ckpt").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    monkeypatch.setattr(files.os, "fsync", full_later)
    assert train([*argv, "--run_dir", f"{tmp_path}/r"]) == 2
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["global_step"] in (6, 12)
    assert train([*argv, "--run_dir", f"{tmp_path}/r", "--ckpt_path", "last"]) == 0
    assert_same_weights(whole[0], tmp_path / "r")


def test_kills_while_writing_leave_a_whole_file(tmp_path):
    """A writer that saves without pause is killed at random moments: last.ckpt always loads."""
    last, unfinished = tmp_path / "last.ckpt", 0
    for i in range(60):  # a write is hit at about every second attempt
        if unfinished and i >= 4:
            break
        last.unlink(missing_ok=True)
        process = CONTEXT.Process(target=write_without_pause, args=(str(last),))
        process.start()
        while not last.is_file():
            time.sleep(0.005)
        process.join(0.02 + 0.0137 * (i % 8))
        process.kill()
        process.join(20)
        for path in (last, tmp_path / "last-previous.ckpt"):
            if path.is_file():
                content = torch.load(path, weights_only=True)["w"]
                assert bool((content == content[0]).all()) and content.shape == (300_000,)
        unfinished += len(list(tmp_path.glob(".last.ckpt*.tmp")))
    assert unfinished, "no kill hit a write"


# ---------------------------------------------------------------------- before training
def test_unusable_folders_are_reported_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir .*file is not writable"):
        check_run_dir(tmp_path / "file")
    usage = type("Usage", (), {"free": 3 * 2**20})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="has 3 MiB free, fewer than the 500"):
        check_run_dir(tmp_path / "new")


def test_space_grows_with_the_network():
    assert run_folder.bytes_of_checkpoints(torch.nn.Linear(2, 2)) == 500 * 2**20
    large = torch.nn.Linear(10_000, 10_000, bias=False, device="meta")
    assert run_folder.bytes_of_checkpoints(large) == 4 * 3 * 4 * 10**8 + 50 * 2**20


def test_which_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    assert resolve_checkpoint(None, tmp_path) is None and resolve_checkpoint("auto", tmp_path, True) is None
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint("last", tmp_path)
    save(folder / "last.ckpt", 1)
    save(folder / "last.ckpt", 2)
    assert resolve_checkpoint("auto", tmp_path) == resolve_checkpoint("last", tmp_path) == str(folder / "last.ckpt")
    assert resolve_checkpoint(None, tmp_path, True) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert resolve_checkpoint(None, tmp_path, True) == str(folder / "last.ckpt")
    assert resolve_checkpoint(None, tmp_path, False) is None
    save(folder / "best.ckpt", 7)
    for named in ("best", str(folder / "best.ckpt")):
        assert resolve_checkpoint(named, tmp_path, True) == str(folder / "last.ckpt"), "what was done since the first start counts"
        assert resolve_checkpoint(named, tmp_path, False) == str(folder / "best.ckpt")
    assert resolve_checkpoint(str(folder / "best.ckpt"), tmp_path / "new", True) == str(folder / "best.ckpt"), "restarted before a save"
    (folder / "last.ckpt").write_bytes(b"PK\3\4 cut")
    assert resolve_checkpoint("last", tmp_path) == str(folder / "last-previous.ckpt")
    (folder / "last-previous.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError):
        resolve_checkpoint("last", tmp_path)


def flip_a_bit(path, part):
    """Of the entry of a torch file that holds exactly these bytes."""
    with zipfile.ZipFile(path) as archive:
        wanted = [e for e in archive.infolist() if archive.read(e) == part]
        header = path.read_bytes()[wanted[0].header_offset :][:30]
    start = wanted[0].header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    content = bytearray(path.read_bytes())
    content[start + 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found_and_the_previous_checkpoint_goes_on(whole, tmp_path, capsys):
    from explainer.cli import main as train

    _, argv = whole
    here = [*argv, "--run_dir", f"{tmp_path}/r"]
    assert train([*here, "--trainer.max_epochs", "2"]) == 0
    last = tmp_path / "r/checkpoints/last.ckpt"
    state = torch.load(last, weights_only=True)["optimizer_states"][0]["state"]
    moments = next(s["exp_avg"] for s in state.values() if s["exp_avg"].ndim == 1 and s["exp_avg"].any())
    flip_a_bit(last, moments.numpy().tobytes())
    torch.load(last, weights_only=True)  # torch itself finds nothing wrong
    shutil.copy(last, tmp_path / "copy.ckpt")
    for command, path in (("validate", str(last)), ("fit", f"{tmp_path}/copy.ckpt")):
        assert train([command, *here[1:], "--ckpt_path", path]) == 2
        error = capsys.readouterr().err
        assert f"{path} is damaged" in error and "checksum" in error
        assert ("--ckpt_path previous" in error) == (command == "validate")
    assert train([*here, "--ckpt_path", "previous"]) == 0
    assert_same_weights(whole[0], tmp_path / "r")
    names = {p.name for p in last.parent.glob("*.ckpt")}
    assert names == {"best.ckpt", "last.ckpt", "last-previous.ckpt", "replaced-last.ckpt"}, "the damaged one is set aside"


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_payload_does_not_run(tmp_path, capsys, form):
    import explainer
    from explainer.cli import main as train

    mark, file = tmp_path / "executed", tmp_path / "evil.ckpt"
    content = {"state_dict": {"w": torch.zeros(2)}, "hyper_parameters": {"kind": "explainer"}, "extra": _Payload(str(mark))}
    if form == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"state_dict": {}, "extra": _Payload(str(mark))}))
    message = r"holds more than tensors and plain values.*loading could run foreign code"
    message += r".*posix\.mkdir" if form == "torch" else ""  # in a bare pickle torch stops before it reads the name
    with pytest.raises(CheckpointError, match=message):
        explainer.load(file)
    with pytest.raises(CheckpointError, match=message):
        AtomicCheckpointIO().load_checkpoint(file)
    for option in ("--ckpt_path", "--init_from", "--classifier.checkpoint"):
        assert train([*EXPLAINER, "--run_dir", f"{tmp_path}/r", option, str(file)]) == 2
        assert "foreign code" in capsys.readouterr().err
    assert not mark.exists()
    torch.load(file, weights_only=False) if form == "torch" else pickle.loads(file.read_bytes())
    assert mark.exists(), "the payload was harmless: this test proves nothing"


# ---------------------------------------------------------------------- metrics.csv
def test_metrics_file_appends_and_survives_a_cut_line(tmp_path):
    logger = AppendingCSVLogger(tmp_path, every=2)
    for step in range(5):
        logger.log_metrics({"a": step / 2}, step)
    assert [r["step"] for r in read_rows(logger.file)] == [0, 1, 2, 3]
    logger.log_metrics({"b": 7.0}, 4)
    assert read_rows(logger.file)[-1] == {"step": 4, "b": 7.0} and read_rows(logger.file)[-2] == {"step": 4, "a": 2.0}
    with logger.file.open("a") as stream:
        stream.write("0.7")  # killed in the middle of a row
    again = AppendingCSVLogger(tmp_path)
    again.keep_until(3)
    assert [r["step"] for r in read_rows(logger.file)] == [0, 1, 2]
    again.log_metrics({"a": 1.0, "c": 2.0}, 3)
    again.finalize("success")
    assert [r["step"] for r in read_rows(logger.file)] == [0, 1, 2, 3] and read_rows(logger.file)[3]["c"] == 2.0
    AppendingCSVLogger(tmp_path).keep_until(0)
    assert not logger.file.exists()


def test_batches_of_one_step_share_a_row(tmp_path):
    logger = AppendingCSVLogger(tmp_path)
    for step, number in ((0, 1.0), (0, 2.0), (1, 3.0)):
        logger.log_metrics({"a": number}, step)
    logger.save()
    assert [(r["step"], r["a"]) for r in read_rows(logger.file)] == [(0, 2.0), (1, 3.0)]
