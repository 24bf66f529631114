"""Mutated configurations and checkpoints: each works or ends in one of the project's own errors; none executes or hangs.

Annotations, lists, masks and images are mutated in ``tests/unit/data/test_fuzz.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import explainer
from explainer.commands.parsing import parse_evaluate, parse_run
from explainer.errors import ExplainerError
from explainer.models.checkpoints import load_explanandum, read_weights
from explainer.models.explainer import Explainer
from tests.unit.data.test_fuzz import NASTY, mutate

CONFIG: dict[str, Any] = {
    "task": "explain",
    "run_dir": "runs/fuzz",
    "seed": 3,
    "data": {"name": "shapes", "batch_size": 4, "eval_batch_size": 4, "options": {"size": 32, "length": 24}, "on_error": "raise"},
    "classifier": {"arch": "small_vgg", "options": {"widths": [8, 8]}, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
    "explainer": {"network": "vgg_unet", "options": {"widths": [8, 8], "decoder_channels": [8]}, "downscale": 1, "stride": 4},
    "losses": {"classification": {"weight": 1.0}, "area_bound": {"weight": [[0, 1], [1, 0.5]], "min_area": 0.05, "max_area": 0.3}},
    "masking": {"fill": "mean", "binarize": 0.5, "subset": 0.5},
    "optimizer": {"name": "adam", "lr": 0.001, "schedule": "one_cycle", "warmup": 0.2},
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "precision": "32-true", "patience": 2, "extra": {"fast_dev_run": 1}},
    "logging": {"wandb": "off", "images": 0},
}
EVALUATION: dict[str, Any] = {
    "out": "results/fuzz",
    "data": {"name": "shapes", "options": {"size": 32, "length": 8}},
    "split": "test",
    "methods": {"grad_cam": {"options": {}}, "rise": {"options": {"n_masks": 20}}},
    "protocols": ["segmentation", {"half": {"protocol": "insertion_deletion", "steps": 5}}],
    "batch_size": 4,
}
VALUES: list[Any] = [*NASTY, "shapes", "mean", [1, 2], {"weight": "x"}, "!!python/name:os.system", [[0, 1], [0, 2]], 3.5, -0.5]


def paths(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of a nested configuration."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in entries for path in ((*above, key), *paths(value, (*above, key)))]


def mutated_tree(tree: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
    """One value replaced, one key dropped, renamed or added."""
    tree = copy.deepcopy(tree)
    every = paths(tree)
    path = every[int(random.integers(len(every)))]
    parent: Any = tree
    for key in path[:-1]:
        parent = parent[key]
    kind, value = int(random.integers(5)), VALUES[int(random.integers(len(VALUES)))]
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{path[-1]}x"] = parent.pop(path[-1])
    elif kind == 2 and isinstance(parent, dict):
        parent["extra_key"] = value
    else:
        parent[path[-1]] = value
    return tree


def assemble(config: Any) -> None:
    """All of a run but the training."""
    from explainer.commands.building import build_task, data_module
    from explainer.lightning_internals import quiet_lightning
    from explainer.tasks.trainer import build_trainer

    quiet_lightning()
    data = data_module(config)
    data.setup("fit")
    build_task(config, data)
    build_trainer(config)


def fuzz_configs(folder: Path, number: int, seed: int, build: bool) -> dict[str, int]:
    random, outcome = np.random.default_rng(seed), {"works": 0, "refused": 0}
    file = folder / "config.yaml"
    for i in range(number):
        base = CONFIG if i % 4 else EVALUATION
        if i % 3 == 2:
            file.write_bytes(mutate(yaml.safe_dump(base).encode(), random))
        else:
            file.write_text(yaml.safe_dump(mutated_tree(base, random)))
        try:
            if base is EVALUATION:
                parse_evaluate(["--config", str(file)])
            else:
                _, config, _ = parse_run(["fit", "--config", str(file), "--run_dir", str(folder / "run"), "--logging.wandb", "off"])
                if build:
                    assemble(config)
            outcome["works"] += 1
        except ExplainerError as error:
            assert 10 < len(str(error)) < 6000
            outcome["refused"] += 1
        except BaseException as error:
            pytest.fail(f"{type(error).__name__} ({error}) of mutation {i}:\n{file.read_bytes()!r}")
    return outcome


def checkpoint_files(folder: Path) -> list[Path]:
    """A training checkpoint, a plain state_dict and an export folder's file."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = Explainer("vgg_unet", 3, {"widths": [4, 4], "decoder_channels": [4]}, stride=4)
    state = {f"explainer.{k}": v for k, v in net.state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"kind": "explainer", "explainer": net.config, "fingerprint": "0" * 16}, "epoch": 1}
    torch.save(content, folder / "run.ckpt")
    torch.save({k: v.clone() for k, v in net.state_dict().items()}, folder / "plain.pt", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(__import__("json").dumps({"explainer": net.config}))
    return [folder / "run.ckpt", folder / "plain.pt", folder / "model.safetensors", folder / "config.json"]


def fuzz_checkpoints(folder: Path, number: int, seed: int) -> dict[str, int]:
    random, outcome = np.random.default_rng(seed), {"works": 0, "refused": 0}
    files = checkpoint_files(folder)
    originals = {path: path.read_bytes() for path in files}
    for i in range(number):
        path = files[i % len(files)]
        path.write_bytes(mutate(originals[path], random))
        calls: list[Any] = [lambda: explainer.load(folder / "model.safetensors")]
        if path.suffix != ".json":
            calls = [lambda p=path: read_weights(p), lambda p=path: explainer.load(p)]
            calls.append(lambda p=path: load_explanandum(p, "small_vgg", {"widths": [4, 4]}, 3))
        for call in calls:
            try:
                call()
                outcome["works"] += 1
            except ExplainerError as error:
                assert 10 < len(str(error)) < 3000
                outcome["refused"] += 1
            except BaseException as error:
                pytest.fail(f"{type(error).__name__} ({error}) of mutation {i} of {path.name}")
        path.write_bytes(originals[path])
    return outcome


def fuzz_contents(folder: Path, number: int, seed: int) -> dict[str, int]:
    """Checkpoints that unpickle well and hold nonsense."""
    random, outcome = np.random.default_rng(seed), {"works": 0, "refused": 0}
    checkpoint_files(folder)
    content = torch.load(folder / "run.ckpt", weights_only=True)
    plain = {**content, "state_dict": dict.fromkeys(content["state_dict"], 0)}
    for i in range(number):
        tree = mutated_tree(plain, random)
        if isinstance(tree.get("state_dict"), dict):
            tree["state_dict"] = {k: content["state_dict"].get(k, v) if v == 0 else v for k, v in tree["state_dict"].items()}
        torch.save(tree, folder / "odd.ckpt")
        for call in (lambda: explainer.load(folder / "odd.ckpt"), lambda: load_explanandum(folder / "odd.ckpt", "small_vgg", {}, 3)):
            try:
                call()
                outcome["works"] += 1
            except ExplainerError as error:
                assert 10 < len(str(error)) < 3000
                outcome["refused"] += 1
            except BaseException as error:
                pytest.fail(f"{type(error).__name__} ({error}) of mutation {i}: {tree.get('hyper_parameters')}")
    return outcome


def test_mutated_configurations(tmp_path: Path) -> None:
    outcome = fuzz_configs(tmp_path, 45, 0, build=True)
    assert outcome["works"] > 4 and outcome["refused"] > 15, outcome


def test_mutated_checkpoints(tmp_path: Path) -> None:
    outcome = fuzz_checkpoints(tmp_path, 60, 0)
    assert outcome["works"] >= 1 and outcome["refused"] > 50, outcome


def test_checkpoints_with_nonsense_inside(tmp_path: Path) -> None:
    outcome = fuzz_contents(tmp_path, 60, 0)
    assert outcome["works"] > 5 and outcome["refused"] > 30, outcome


def test_yaml_tags_do_not_run(tmp_path: Path) -> None:
    file, mark = tmp_path / "evil.yaml", tmp_path / "executed"
    for tag in ("!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"):
        file.write_text(f"run_dir: {tag} ['{mark}']\n")
        for parse in (lambda: parse_run(["fit", "--config", str(file)]), lambda: parse_evaluate(["--config", str(file)])):
            with pytest.raises(ExplainerError):
                parse()
    assert not mark.exists()
    yaml.unsafe_load(file.read_text().replace("object/new", "object/apply"))
    assert mark.exists(), "the payload was harmless: this test proves nothing"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_mutations(tmp_path: Path) -> None:
    parts = [
        fuzz_configs(tmp_path, 700, 1, build=True),
        fuzz_checkpoints(tmp_path, 500, 1),
        fuzz_contents(tmp_path, 300, 1),
    ]
    assert sum(sum(part.values()) for part in parts) >= 1500
