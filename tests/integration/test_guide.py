"""The README and the guide: every command parses, every link leads somewhere, code runs, and the site builds without a warning."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import explainer
from explainer import plugins
from explainer.baselines.overview import overview
from explainer.cli import COMMANDS, main
from explainer.commands.parsing import parse
from explainer.config import RunConfig
from explainer.metrics.base import PerImageMetric
from explainer.models.explainer import Explainer

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md"))
SHOWN = [README, *PAGES]
#: Written when the guide is built; see docs/mkdocs/reference.py.
GENERATED = {ROOT / "docs/reference" / f"{name}.md" for name in ("methods", "commands", "configuration", "plugins", "api")}


def blocks(page: Path, *languages: str) -> list[str]:
    """The code blocks of a page in any of these languages ("" for a fence that names none)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [code for language, code in found if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The calls of this project's command line in a page's shell blocks, as arguments behind ``explainer``."""
    found, variables = [], {}
    for block in blocks(page, "", "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
                continue
            words = shlex.split(re.sub(r"\$(\w+)", lambda m: variables[m[1]], line), comments=True)
            start = next((i for i, word in enumerate(words) if word in ("train.py", "evaluate.py", "explainer")), len(words))
            program, arguments = words[start : start + 1], words[start + 1 :]
            if program:
                found.append(["evaluate", *arguments] if program == ["evaluate.py"] else arguments)
    return found


def relative(page: Path) -> str:
    """A page's name in messages."""
    return str(page.relative_to(ROOT))


def test_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert text.count("|---|") and len(table) - 2 <= 8, "one table of at most eight rows"


@pytest.mark.parametrize("page", [p for p in SHOWN if commands(p)], ids=relative)
def test_commands_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "my.yaml").write_text(next(b for b in blocks(README, "yaml") if b.startswith("# my.yaml")))
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page):
        for written in (Path(a) for a in arguments if a.startswith("runs/") and a.endswith("/config.yaml")):
            written.parent.mkdir(parents=True, exist_ok=True)  # a run that an earlier command of the page has trained
            written.write_text("seed: 0\n")
        try:
            parse(COMMANDS, arguments)
        except SystemExit as end:  # --print_config
            assert end.code == 0 and "--print_config" in arguments


@pytest.mark.parametrize("page", SHOWN, ids=relative)
def test_relative_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http:", "https:", "#")):
            file = (page.parent / target.partition("#")[0]).resolve()
            assert file.exists() or file in GENERATED, f"{relative(page)} links to {target}, which is not there"
            if page == README:
                assert file not in GENERATED, f"README.md links to {target}, which is there only when the guide is built"


def test_extras_that_are_named_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"])
    files = [*SHOWN, *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "explainer").rglob("*.py")]
    named = [(f, e) for f in files for e in re.findall(r"explainer-net\[([\w,-]+)\]", f.read_text(encoding="utf-8"))]
    assert len(named) > 5
    assert [(str(f), e) for f, e in named if not set(e.split(",")) <= extras] == []


def test_readme_anchors_exist() -> None:
    for target, anchor in re.findall(r"\]\((docs/[^)#\s]+)#([^)\s]+)\)", README.read_text(encoding="utf-8")):
        headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(encoding="utf-8"), flags=re.M)
        assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], f"{target}#{anchor}"


def test_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use, wrap = blocks(README, "python")
    assert len([line for line in use.splitlines() if line.strip()]) <= 10
    torch.manual_seed(0)
    options = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    net = Explainer("unet", 2, options, class_names=("cat", "dog"), image_size=32, stride=8).eval()
    explainer.save_pretrained(net, tmp_path / "folder")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(use.replace("runs/shapes_quickstart/checkpoints/best.ckpt", "folder"), "README.md", "exec"), names)
    assert names["masks"].shape == (1, 2, 48, 64)
    with torch.no_grad():
        areas = net(names["image"][None]).mean(dim=(2, 3))[0].tolist()
    assert capsys.readouterr().out.strip() == str(dict(zip(["cat", "dog"], areas, strict=True)))
    names = {"my_model": torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))}
    exec(compile(wrap, "README.md", "exec"), names)
    # A mid-grey image is 0 behind mean 0.5, so the logits are the last layer's bias.
    logits = names["explanandum"](torch.full((1, 3, 8, 8), 0.5))
    torch.testing.assert_close(logits[0], names["my_model"][-1].bias)


def test_loss_of_the_guide_runs() -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks(ROOT / "docs/howto/extend.md", "python")[0], "extend.md", "exec"), names)
    value = names["Sparsity"].value(None, SimpleNamespace(class_masks=torch.tensor([0.0, 0.25, 1.0]).view(1, 1, 1, 3)))
    assert float(value) == pytest.approx((0.0 + 0.5 + 1.0) / 3, abs=1e-3)


def test_metric_of_the_guide_runs() -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks(ROOT / "docs/howto/extend.md", "python")[1], "extend.md", "exec"), names)
    metric = PerImageMetric(names["edge_share"], width=2)
    metric.update(torch.ones(1, 8, 8))
    assert metric.name == "edge_share" and float(metric.compute()) == pytest.approx(1 - 16 / 64)


def test_site_builds_without_warnings_and_is_complete(tmp_path: Path) -> None:
    site = tmp_path / "site"
    line = re.search(r"^\t\$\(BIN\)/python (-m mkdocs .*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert line, "make docs calls mkdocs"
    command = [sys.executable, *shlex.split(line[1]), "-d", str(site)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "--strict" in command and "Documentation built" in done.stderr, "mkdocs counts the warnings that it may print, and no others"
    start = (site / "index.html").read_text(encoding="utf-8")
    for page in {*PAGES, *GENERATED} - {ROOT / "docs/index.md"}:
        path = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / path / "index.html").exists(), path
        assert f'href="{path}/"' in start, f"{path} is not in the navigation"

    def text(name: str) -> str:
        return unescape(re.sub(r"<[^>]+>", "", (site / "reference" / name / "index.html").read_text(encoding="utf-8")))

    methods, keys, listed = text("methods"), text("configuration"), text("commands")
    assert all(cell in methods for row in overview() for cell in row)
    assert all(f"\n{f.name}\n" in keys for f in dataclasses.fields(RunConfig))
    assert all(name in text("plugins") for package in ("losses", "metrics", "data") for name in plugins.discover(f"explainer.{package}"))
    assert "0.001" in keys and all(f"explainer {name}" in listed for name in COMMANDS)


#: What makes the quickstart's commands short; none of it is something that a user would have to know.
SHORT_FIT = "--data.options.length 48 --data.options.size 32 --data.batch_size 16 --trainer.max_epochs 1 --trainer.progress_bar false"
SHORT = {
    "fit": f"{SHORT_FIT} --evaluate_with null --logging.images 0",
    "evaluate": "--data.options.size 32 --limit 4 --protocols [segmentation] --bootstrap 0 --gallery 0 --progress false",
}


def test_commands_and_code_of_the_quickstart_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = ROOT / "docs/tutorials/quickstart.md"
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    called = commands(page)
    assert [c[0] for c in called] == ["fit", "fit", "evaluate"]
    for arguments in called:
        assert main([*arguments, *SHORT[arguments[0]].split()]) == 0
    assert (tmp_path / "results/quickstart/table.md").read_text().count("\n") > 9  # a row for each method
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    (code,) = blocks(page, "python")
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(compile(code, str(page), "exec"), names)
    assert names["masks"].shape == (1, 6, 48, 64) and eval(capsys.readouterr().out).keys() == set(names["net"].class_names)
