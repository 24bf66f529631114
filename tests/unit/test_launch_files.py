"""The launch files start commands that this project has, with options that it knows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from explainer.cli import COMMANDS
from explainer.commands.parsing import parse

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "configs" / "launch"
VALUES = {
    "CONFIG": "configs/explainer/imagenet_lite0.yaml",
    "HOME": "/home/user",
    "SHARDS": "s3://bucket/shards",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "JOB_COMPLETION_INDEX": "1",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "16",
}


def scripts(path: Path) -> list[str]:
    """The shell scripts in a launch file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".sbatch":
        return [text]
    found = []
    for document in yaml.safe_load_all(text):
        if "run" in document:
            found.append(document["run"])
        if document.get("kind") == "Job":
            found += [c["args"][0] for c in document["spec"]["template"]["spec"]["containers"]]
    return found


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda p: p.name)
def test_its_commands_parse(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    called = 0
    for script in scripts(path):
        for line in script.replace("\\\n", " ").splitlines():
            filled = re.sub(r"\$\(.*?\)", "host", line)
            filled = re.sub(r"\$(\w+)", lambda m: VALUES[m[1]], filled).replace("$@", "")
            words = shlex.split(filled, comments=True)
            start = next((i for i, word in enumerate(words) if word in ("train.py", "explainer")), None)
            if start is None:
                continue
            _, _, options = parse(COMMANDS, [w for w in words[start + 1 :] if w])
            called += 1
            if words[start] == "train.py":
                assert set(options.data.options) <= {"root", "shard_cache", "size", "masks", "class_names"}
                assert options.data.name == "shards" and options.trainer.num_nodes == 2
            else:
                assert (options.share, options.shares) == (3, 16)
    assert called == 1
