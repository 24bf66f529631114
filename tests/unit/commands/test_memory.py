"""Freed memory stays with the process of a command, and only there."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import explainer.cli
from explainer.cli import main
from explainer.commands.memory import DECIDED, Trimmer, keep_memory

ROOT = Path(__file__).parents[3]

#: Resident MiB after 256 MiB were filled and freed twice.
FREED = """
import os, sys
from explainer.commands.memory import keep_memory
print(keep_memory() if sys.argv[1] == "keep" else None)
for _ in range(2):
    block = b"1" * 2**28
    del block
print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
"""


def resident(how: str, **variables: str) -> tuple[str, float]:
    environment = {k: v for k, v in os.environ.items() if k not in DECIDED} | variables
    done = subprocess.run([sys.executable, "-c", FREED, how], env=environment, capture_output=True, text=True, check=True)
    said, number = done.stdout.split()
    return said, float(number)


@pytest.mark.skipif(not sys.platform.startswith("linux") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc's malloc")
def test_freed_memory_is_kept_and_a_users_own_setting_counts() -> None:
    assert resident("leave")[1] < 150
    said, kept = resident("keep")
    assert said == "True" and kept > 256
    said, kept = resident("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert said == "False" and kept < 150


def test_growth_is_given_back_and_steady_memory_is_left_alone() -> None:
    #  first look, steady, +19 %, +21 %: trimmed; what is in use is back, +15 %, +21 % of that: trimmed; more is in use now, steady
    resident = iter([100, 100, 119, 121, 110, 126, 133, 200, 200, 239])
    trimmed: list[int] = []
    trimmer = Trimmer(lambda: next(resident), lambda: trimmed.append(1))
    assert [trimmer.look() for _ in range(10)] == [False, False, False, True, False, False, True, False, False, False]
    assert len(trimmed) == 2


#: Resident MiB when 240 of 256 MiB are free in pieces, before and after a look of the trimmer.
FRAGMENTS = """
import ctypes
from explainer.commands.memory import Trimmer, _resident, keep_memory
assert keep_memory()
trimmer = Trimmer(_resident, lambda: ctypes.CDLL(None).malloc_trim(0))
trimmer.look()
blocks = [b"1" * 2**20 for _ in range(256)]
blocks = blocks[::16]
print(_resident() / 2**20)
assert trimmer.look()
print(_resident() / 2**20, len(blocks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc's malloc")
def test_pieces_between_blocks_in_use_are_given_back() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in DECIDED}
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], env=environment, capture_output=True, text=True, check=True)
    before, after, _ = map(float, done.stdout.split())
    assert before > 256 and after < before - 200


def test_only_a_command_of_its_own_process_keeps_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: list[Any] = []
    monkeypatch.setattr(explainer.cli, "keep_memory", lambda: called.append(1))
    main(["methods", "--list-nothing"])
    assert called == []  # within somebody's program
    monkeypatch.setattr(sys, "argv", ["explainer", "methods", "--list-nothing"])
    main()
    assert called == [1]
    main(["methods", "--list-nothing"], own_process=True)
    assert called == [1, 1]
    capsys.readouterr()


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_both_scripts_keep_it(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: list[Any] = []
    monkeypatch.setattr(explainer.cli, "keep_memory", lambda: called.append(1))
    monkeypatch.setattr(sys, "argv", [script, "--no-such-option"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert called == [1]
    capsys.readouterr()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_memory() is False
