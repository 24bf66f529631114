"""The four published configurations load, build with random weights and take one training step at 224 px; the rest of configs/ parses,
and every command in it starts what it says."""

import itertools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from explainer.commands.parsing import parse_evaluate, parse_run
from explainer.config import ClassifierConfig
from explainer.data.datamodule import DataModule
from explainer.data.samplers import ResumableBatchSampler
from explainer.losses.base import total_loss
from explainer.models.checkpoints import load_explanandum
from explainer.models.explainer import Explainer
from explainer.tasks.explain import ExplainTask
from tests.factories import dataset_options

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("data", "classifier"),
    [
        ("voc2007", "resnet50"),
        pytest.param("voc2007", "vgg16", marks=pytest.mark.slow),
        pytest.param("coco2014", "resnet50", marks=pytest.mark.slow),
        pytest.param("coco2014", "vgg16", marks=pytest.mark.slow),
    ],
)
def test_published_configuration_takes_a_step(data, classifier, tmp_path):
    path = CONFIGS / "explainer" / f"{data}_{classifier}.yaml"
    _, config, _ = parse_run(["fit", "--config", str(path)])
    _, trained, _ = parse_run(["fit", "--config", str(CONFIGS / "classifier" / f"{data}_{classifier}.yaml")])
    assert config.explainer.network == "deeplabv3" and config.explainer.options["encoder_name"] == "resnet50"
    assert config.data.options["size"] == 224 and config.data.batch_size == 16

    K = {"voc2007": 20, "coco2014": 80}[data]
    tiny = DataModule(config.data.name, 2, options={**dataset_options(config.data.name, tmp_path), "size": 96})
    batch = next(iter(tiny.eval_dataloader("train")))
    targets = torch.zeros(len(batch), K)
    targets[:, : batch.targets.shape[1]] = batch.targets[:, :K]
    batch = type(batch)(batch.images, targets, None, None, batch.ids)

    options = {**trained.classifier.options, "weights": None}
    explanandum = load_explanandum(None, config.classifier.arch, options, K)
    assert trained.classifier.mean == ClassifierConfig().mean
    net = Explainer(config.explainer.network, K, {**config.explainer.options, "encoder_weights": None})
    task = ExplainTask(net, explanandum, config.losses, config.masking, optimizer=config.optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(net.parameters(), lr=config.optimizer.lr)
    task.train()
    loss, values = total_loss(task.terms, task._explanation(batch, "train"))
    loss.backward()
    optimizer.step()
    assert set(values) == {"classification", "entropy", "total_variation", "area_bound", "target_area", "non_target_area"}
    assert torch.isfinite(loss) and any(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


PUBLISHED = {
    "voc2007_vgg16": (1e-5, 1, 1, 1, 0.1, 0.3),
    "voc2007_resnet50": (1e-4, 3, 1, 0.8, 0.01, 0.3),
    "coco2014_vgg16": (1e-5, 1, 0.3, 0.3, 0.03, 0.1),
    "coco2014_resnet50": (1e-5, 3, 0.05, 0.1, 0.01, 0.03),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    _, c, _ = parse_run(["fit", "--config", str(CONFIGS / "explainer" / f"{name}.yaml")])
    weights = [c.losses[term]["weight"] for term in ("entropy", "total_variation", "area_bound", "target_area", "non_target_area")]
    assert (c.optimizer.lr, *weights) == PUBLISHED[name]
    assert (c.losses["area_bound"]["min_area"], c.losses["area_bound"]["max_area"]) == (0.05, 0.3)
    assert c.losses["area_bound"]["reduction"] == "sum" and c.losses["total_variation"]["padding"] == "reflect"
    assert c.masking.binarize == 0 and c.masking.subset == 0 and c.masking.fill == "mean"


RUNS = sorted(p for folder in ("classifier", "explainer") for p in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_run_configuration_parses_and_says_how_it_is_run(path):
    command, config, _ = parse_run(["fit", "--config", str(path)])
    assert command == "fit" and config.task == ("classify" if path.parent.name == "classifier" else "explain")
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--config configs/{path.parent.name}/{path.name}" in line for line in header), "the header shows the command"
    if config.evaluate_with:
        parse_evaluate(["--config", str(CONFIGS.parent / config.evaluate_with)])
    if config.classifier.train_with:
        assert yaml.safe_load((CONFIGS.parent / config.classifier.train_with).read_text())["task"] == "classify"


# ---------------------------------------------------------------------- the commands in the headers
def launch_lines():
    """(file, command) of every line that starts training, in the configurations and in slurm.sbatch."""
    found = []
    for path in (*RUNS, *sorted(CONFIGS.glob("explainer/compact/*.yaml")), CONFIGS / "slurm.sbatch"):
        for line in path.read_text().splitlines():
            hit = re.match(r"#.*?((?:python|torchrun .*) train\.py fit [^()]*|sbatch .*configs/slurm.sbatch .*)", line)
            if hit:
                found.append((path, hit.group(1).strip()))
    return found


LINES = launch_lines()


def through_sbatch(command, folder, **more):
    """Run the script with a stand-in for srun, which says what it was asked to start: (arguments, processes)."""
    script = (CONFIGS / "slurm.sbatch").read_text()
    given = {**dict(re.findall(r"#SBATCH --([\w-]+)=(\d+)$", script, re.MULTILINE)), **dict(re.findall(r"--([\w-]+)=(\d+)", command))}
    stub = folder / "srun"
    stub.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    stub.chmod(0o755)
    env = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_NTASKS_PER_NODE": given["ntasks-per-node"],
        "SLURM_NNODES": given["nodes"],
        **more,
    }
    rest = [word for word in shlex.split(command)[1:] if not re.match(r"--[\w-]+=\d+$", word)]
    done = subprocess.run(["bash", *rest], capture_output=True, text=True, check=True, cwd=CONFIGS.parent, env=env)
    words = done.stdout.splitlines()
    assert given["gpus-per-node"] == given["ntasks-per-node"]
    return words[words.index("fit") :], int(given["nodes"]) * int(given["ntasks-per-node"])


def arguments_and_processes(command, folder):
    if command.startswith("sbatch"):
        return through_sbatch(command, folder)
    words = shlex.split(command)
    world = 1
    if words[0] == "torchrun":
        options = dict(itertools.pairwise(words))
        world = int(options["--nproc-per-node"]) * int(options.get("--nnodes", 1))
    return words[words.index("fit") :], world


@pytest.mark.parametrize(("path", "command"), LINES, ids=lambda v: v.stem if isinstance(v, Path) else v.split()[0])
def test_every_launch_line_starts_the_training_it_stands_for(path, command, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert "..." not in command
    arguments, world = arguments_and_processes(command, tmp_path)
    _, config, _ = parse_run(arguments)
    _, alone, _ = parse_run([w for i, w in enumerate(arguments) if i == 0 or "--config" in (w, arguments[i - 1])])
    per_process = DataModule(config.data.name, config.data.batch_size, global_batch=config.data.global_batch)._per_device(world)
    ResumableBatchSampler(10_000, per_process, world=world)  # it refuses a batch that is too small
    if "--data.batch_size" not in arguments:
        assert per_process * world == alone.data.batch_size, "as many images per step as the configuration says"
    if world > 1 and per_process < 8:
        assert config.trainer.sync_batchnorm
    if command.startswith("python"):
        assert config.trainer.devices in (1, "auto") and config.trainer.num_nodes == 1
        assert config.trainer.devices == 1 or path.stem.startswith(
            ("shapes", "street", "outfits", "photographs", "imagenet_lite0", "tiles")
        ), "GPU runs name one device: auto takes all"


def test_explainer_configurations_say_how_to_use_more_devices():
    for path in sorted((*CONFIGS.glob("explainer/*.yaml"), *CONFIGS.glob("explainer/compact/*.yaml"))):
        found = [c for p, c in LINES if p == path and f"{path.parent.name}/{path.name}" in c]
        starts = [re.sub(r" (train\.py|configs/slurm).*", "", c) for c in found]
        assert starts[:3] == ["python", "torchrun --nproc-per-node 2", "torchrun --nproc-per-node 8"], path
        assert "--nnodes 2" in starts[3] and starts[4] == "sbatch", path


def test_sbatch_resumes_from_what_it_is_told(tmp_path):
    command = "sbatch configs/slurm.sbatch configs/explainer/voc2007_vgg16.yaml --optimizer.lr 0.5"
    assert "--ckpt_path" not in through_sbatch(command, tmp_path)[0]
    words, world = through_sbatch(command, tmp_path, CKPT="last")
    assert words[-4:] == ["--ckpt_path", "last", "--optimizer.lr", "0.5"] and world == 8
