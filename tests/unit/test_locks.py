"""A folder belongs to one running process at a time."""

import os
import subprocess
import sys
import threading
import time

import pytest

from explainer import locks
from explainer.errors import ConfigError
from explainer.files import Owner
from explainer.locks import IN_USE, claimed, first_process


def write_holder(folder, owner, what="fit"):
    folder.mkdir(exist_ok=True)
    (folder / IN_USE).write_text(f"{owner}\n{what}\n")


def test_a_claim_names_its_process_and_ends(tmp_path):
    with claimed(tmp_path, "fit"):
        assert (tmp_path / IN_USE).read_text() == f"{Owner.this()}\nfit\n"
        with claimed(tmp_path, "evaluate"):
            pass
        assert (tmp_path / IN_USE).is_file(), "claimed again inside"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "new", "export"):
        _ = 1 / 0
    assert not (tmp_path / "new").exists(), "nothing came of it"


def test_a_running_process_is_respected_and_a_dead_one_is_not(tmp_path):
    code = (
        "import sys, time; from explainer.locks import claimed\nwith claimed(sys.argv[1], 'fit'):\n print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "in\n"
            with (
                pytest.raises(ConfigError, match=rf"in use: fit of process {other.pid} on .*Wait for it, stop it"),
                claimed(tmp_path, "fit"),
            ):
                pass
        finally:
            other.kill()
        other.wait()
        with claimed(tmp_path, "fit"):
            assert (tmp_path / IN_USE).read_text().startswith(str(Owner.this()))


def test_a_number_that_is_used_again_is_another_process(tmp_path):
    me = Owner.this()
    write_holder(tmp_path, Owner(me.host, os.getppid(), 1))
    with claimed(tmp_path, "fit"):
        pass


def test_a_process_of_another_machine_is_believed_while_it_gives_signs(tmp_path):
    write_holder(tmp_path, Owner("elsewhere", 1, 5))
    with pytest.raises(ConfigError, match="on elsewhere"), claimed(tmp_path, "fit"):
        pass
    with claimed(tmp_path, "fit", restarted=True):
        pass
    write_holder(tmp_path, Owner("elsewhere", 1, 5))
    long_ago = time.time() - 700
    os.utime(tmp_path / IN_USE, (long_ago, long_ago))
    with claimed(tmp_path, "fit"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_SECONDS_BETWEEN_SIGNS", 0.01)
    with claimed(tmp_path, "fit"):
        os.utime(tmp_path / IN_USE, (1, 1))
        end = time.monotonic() + 10
        while (tmp_path / IN_USE).stat().st_mtime < 2:
            assert time.monotonic() < end
            time.sleep(0.005)
    assert "signs of life" not in [t.name for t in threading.enumerate()]


@pytest.mark.parametrize("content", ["", "no owner\n", "a~b~c\nfit\n"])
def test_a_file_that_names_nobody_holds_nothing(tmp_path, content):
    (tmp_path / IN_USE).write_text(content)
    with claimed(tmp_path, "fit"):
        pass


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "1", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
        ({"RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, True),
        ({"SLURM_PROCID": "3", "SLURM_JOB_ID": "7"}, False),
    ],
)
def test_which_process_speaks_for_its_job(monkeypatch, environment, first):
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert first_process() is first
