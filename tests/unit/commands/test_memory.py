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
from explainer.commands.memory import DECIDED, keep_memory

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
