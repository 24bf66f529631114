"""The command: help without torch, messages for what is missing, every configuration builds, several processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import explainer
from explainer.cli import COMMANDS, main
from explainer.commands.assembly import build_runner
from explainer.commands.evaluate import evaluate
from explainer.commands.evaluation import run
from explainer.commands.parsing import Command, parse_evaluate
from explainer.errors import CheckpointError, ConfigError, FingerprintMismatchError
from explainer.evaluation.config import EvaluateConfig, MethodConfig
from explainer.evaluation.results import read_rows
from explainer.inference.loading import CONFIG, WEIGHTS
from explainer.models.explainer import Explainer

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs" / "evaluate").glob("*.yaml"))
SHAPES = ("stripes", "checks", "dots", "rings", "grid", "wedges")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export folder with an untrained Explainer for the six classes of `shapes`."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    options = {"encoder_name": "resnet18", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    net = Explainer("unet", 6, options, class_names=SHAPES, stride=8)
    save_file(net.state_dict(), str(folder / WEIGHTS))
    (folder / CONFIG).write_text(json.dumps({"explainer": net.config}))
    return str(folder)


def anywhere(options: Any) -> Any:
    """Options without layers and classes, which are of the table's own network; also those of methods inside."""
    if isinstance(options, list):
        return [anywhere(one) for one in options]
    if not isinstance(options, dict):
        return options
    return {k: anywhere(v) for k, v in options.items() if k not in ("layer", "layers", "against", "spread")}


def tiny(config: EvaluateConfig, out: Path, checkpoint: str) -> EvaluateConfig:
    """The same evaluation on 2 images of 32 px with an untrained net."""
    config.out, config.limit, config.batch_size, config.progress, config.bootstrap = str(out), 2, 2, False, 20
    config.data.name, config.data.options, config.data.eval_options = "shapes", {"size": 32}, {}
    config.data.train_options, config.data.num_workers = {}, 0
    config.classifier.arch, config.classifier.options, config.classifier.checkpoint = "small_vgg", {"widths": [4, 8]}, None
    config.cache.folder = None
    for m in config.methods.values():
        m.options = anywhere(m.options)
        if m.checkpoint is not None:
            m.checkpoint = checkpoint
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_parses_and_builds(path, tmp_path, trained):
    config, resolved = parse_evaluate(["--config", str(path)])
    assert yaml.safe_load(resolved)["out"] == config.out == f"results/{path.stem}"
    text = path.read_text()
    assert f"--config configs/evaluate/{path.name}" in text.split("\nout:")[0], "the header says how to run it"
    built = build_runner(tiny(config, tmp_path, trained))
    assert [m.label for m in built.methods] == list(config.methods)
    assert built.combinations()


#: Fewer steps, so that methods of thousands of passes take seconds; everything else stays as the table says.
FEWER = {
    "rise": {"n_masks": 8},
    "extremal_perturbation": {"iterations": 3},
    "igos_pp": {"iterations": 2, "size": 8},
    "agf_self_supervised": {"candidates": 4},
    "occlusion": {"window": 16, "stride": 8},
    "meaningful_perturbation": {"iterations": 2, "top": 2},
    "smooth_grad": {"samples": 2},
    "integrated_gradients": {"steps": 4},
}
FEWER_PROTOCOL = {"manipulation": {"max_iterations": 3}, "srd_metrics": {"stability_samples": 2}}
PAPERS = [p for p in CONFIGS if yaml.safe_load(p.read_text()).get("mode") is not None]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", PAPERS, ids=lambda p: p.stem)
def test_every_table_of_a_paper_runs(path, tmp_path, trained):
    """Laid over with shapes as its head says, on 2 small images: every row and protocol gives numbers."""
    fragment = ["--config", str(ROOT / "configs" / "evaluate" / "on" / "shapes.yaml")]
    config = tiny(parse_evaluate(["--config", str(path), *fragment])[0], tmp_path, trained)
    config.device = "cpu"
    for label, m in config.methods.items():
        m.options = {**m.options, **FEWER.get(m.name or label, {})}
    entries = [e if isinstance(e, dict) else {e: {}} for e in config.protocols]
    config.protocols = [
        {
            k: {**{a: b for a, b in (o or {}).items() if a != "classes"}, **FEWER_PROTOCOL.get((o or {}).get("protocol", k), {})}
            for k, o in entry.items()
        }
        for entry in entries
    ]
    assert run(config) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["complete"] and summary["failures"] == {}
    left_out = {(x["method"], x["protocol"]): x["reason"] for x in summary["skipped"]}
    shown = {(x["method"], x["protocol"]) for x in summary["results"] if x["value"] is not None}
    alone = not config.methods
    for label in summary["protocols"]:
        for method in ["classifier"] if alone else config.methods:
            assert (method, label) in shown, f"{method}, {label}: {left_out.get((method, label), 'no number')}"


#: Options that choose between a paper and its code (or a library), with the values that a table of mode `paper` or `code` may give.
VARIANTS = {
    "agf": ("mode", {"paper", "code"}),
    "agf_self_supervised": ("mode", {"paper", "code"}),
    "extremal_perturbation": ("schedule", {"paper", "code"}),
    "full_grad": ("convention", {"paper", "code"}),
    "srd": ("start", {"paper", "constant"}),
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_tables_of_papers_say_which_variant_of_a_method_they_mean(path):
    content = yaml.safe_load(path.read_text())
    if content.get("mode") is None:
        return
    chosen = {}
    for label, entry in content["methods"].items():
        name = entry.get("name", label)
        if name in VARIANTS:
            option, values = VARIANTS[name]
            value = entry.get("options", {}).get(option)
            assert value in values, f"{label}: {option}"
            chosen.setdefault(name, set()).add(value)
    for name, found in chosen.items():
        # SRD has one mode; extremal perturbation is compared as its authors' script runs it.
        assert content["mode"] in found or name in ("srd", "extremal_perturbation"), f"{name} has no row in the table's own mode"


@pytest.mark.parametrize("where", ["shapes", "street"])
def test_fragments_put_a_table_on_other_data(where):
    table, fragment = (str(ROOT / "configs" / "evaluate" / name) for name in ("explainer_table2.yaml", f"on/{where}.yaml"))
    config, _ = parse_evaluate(["--config", table, "--config", fragment, "--methods.explainer.checkpoint", "x.ckpt"])
    assert config.data.eval_options == {} and config.data.options["size"] in (64, 96) and "year" not in config.data.options
    assert config.methods["explainer"].checkpoint == "x.ckpt" and "rise" in config.methods and config.classifier.arch == "small_vgg"


def test_quickstart_runs_and_writes_its_files(tmp_path, trained, capsys):
    config = tiny(parse_evaluate(["--config", str(ROOT / "configs" / "evaluate" / "quickstart.yaml")])[0], tmp_path, trained)
    assert run(config) == 0
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["complete"] and content["images"] == 2 and content["provenance"]["config"]["seed"] == 0
    value = {(e["method"], e["scale"], e["protocol"], e["column"]): e["value"] for e in content["results"]}
    assert value["ground_truth", "raw", "segmentation", "iou"] == 1 and value["zero", "raw", "segmentation", "area"] == 0
    assert value["half", "raw", "segmentation", "mae"] == pytest.approx(0.5)
    assert value["explainer", "raw", "time", "seconds"] > 0 and ("random", "raw", "time", "seconds") not in value
    assert ("grad_cam", "minmax", "segmentation", "iou") in value and ("explainer", "minmax", "segmentation", "iou") not in value
    matrix = next(v for v in content["vectors"] if v["vector"] == "masking" and v["method"] == "explainer")
    assert all(len(line) == 7 for line in matrix["per_class"].values())
    assert content["provenance"]["fingerprints"]["methods"]["explainer"]["weights"]
    table = (tmp_path / "table.md").read_text()
    assert "| ground_truth | 100.00 [100.00, 100.00]" in table and "class \\ mask of" in table
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == len(content["results"]) + 1
    assert {r.method for r in read_rows(tmp_path)} == set(config.methods)
    assert "segmentation" in capsys.readouterr().out


def test_help_and_parsing_need_no_torch():
    code = (
        "import sys; from explainer.cli import main; from explainer.commands.parsing import parse_evaluate\n"
        "for call in (lambda: main(['--help']), lambda: main(['evaluate', '--help'])):\n"
        "    try: call()\n"
        "    except SystemExit: pass\n"
        f"parse_evaluate(['--config', {str(CONFIGS[0])!r}])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "evaluate" in done.stdout and "--methods" in done.stdout and "--cache.dtype" in done.stdout


def test_main_dispatches_and_names_the_commands(capsys, monkeypatch):
    assert main(["evalute"]) == 2
    assert "Did you mean evaluate?" in capsys.readouterr().err
    monkeypatch.setitem(COMMANDS, "evaluate", Command("text", lambda p: p.add_argument("--a", type=int), lambda _, options: options.a))
    assert main(["evaluate", "--a", "7"]) == 7
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip().endswith(explainer.__version__)


def config_with(**changes: object) -> EvaluateConfig:
    config = EvaluateConfig(methods={"a": MethodConfig("constant")}, protocols=["segmentation"])
    config.data.options = {"size": 32}
    config.classifier.options = {"widths": [4]}
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def test_missing_files_are_answered_with_where_they_go(tmp_path, capsys):
    config = config_with()
    config.classifier.checkpoint, config.classifier.train_with = str(tmp_path / "no.ckpt"), "configs/classifier/shapes.yaml"
    with pytest.raises(CheckpointError, match=r"does not exist. Train it \(python train.py fit --config configs/classifier/shapes.yaml\)"):
        build_runner(config)
    method = MethodConfig("explainer", checkpoint=str(tmp_path / "e.ckpt"), train_with="configs/explainer/x.yaml")
    with pytest.raises(CheckpointError, match=r"methods.a: .* does not exist. Train it .*configs/explainer/x.yaml.*--methods.a.checkpoint"):
        build_runner(config_with(methods={"a": method}))
    with pytest.raises(ConfigError, match=r"methods.a: name the trained Explainer with --methods.a.checkpoint"):
        build_runner(config_with(methods={"a": MethodConfig("explainer")}))
    code = main(
        ["evaluate", "--config", str(ROOT / "configs/evaluate/explainer_table2.yaml"), "--data.options.root", str(tmp_path / "voc")]
    )
    message = capsys.readouterr().err
    assert code == 2 and message.startswith("error:") and "VOCdevkit" in message and "Traceback" not in message


def test_the_missing_checkpoint_of_maps_is_answered_with_its_own_option(tmp_path, capsys):
    arguments = ["--classifier.options", '{"widths": [4]}', "--data.options", '{"size": 32}', "--cache.folder", str(tmp_path)]
    assert main(["maps", "--method.name", "explainer", *arguments]) == 2
    assert "--method.checkpoint runs/" in capsys.readouterr().err
    assert main(["maps", "--method.name", "explainer", "--method.checkpoint", str(tmp_path / "no.ckpt"), *arguments]) == 2
    message = capsys.readouterr().err
    assert "give another with --method.checkpoint." in message and "methods" not in message


def test_the_commands_of_a_table_on_other_data_say_how_the_explainer_is_trained():
    """The table's own `train_with` trains an Explainer for other data."""
    for path in CONFIGS:
        lines = path.read_text().splitlines()
        for line, following in itertools.pairwise(lines):
            if line.startswith("#   --methods.explainer.checkpoint"):
                which = "street_small" if "street" in line else "shapes_quickstart"
                assert following == f"#   --methods.explainer.train_with configs/explainer/{which}.yaml", path.name
                assert (ROOT / "configs" / "explainer" / f"{which}.yaml").is_file()


def test_wrong_names_and_options(tmp_path):
    with pytest.raises(ConfigError, match=r"methods.a: .*Did you mean 'grad_cam'"):
        build_runner(config_with(methods={"a": MethodConfig("grad_can")}))
    with pytest.raises(ConfigError, match=r"methods.a: constant has no option 'valu'. Did you mean 'value'"):
        build_runner(config_with(methods={"a": MethodConfig("constant", {"valu": 1})}))
    with pytest.raises(ConfigError, match=r"protocols has no plug-in called 'segmentatoin'. Did you mean 'segmentation'"):
        build_runner(config_with(protocols=["segmentatoin"]))
    with pytest.raises(ConfigError, match="segmentation has no option 'thresold'"):
        build_runner(config_with(protocols=[{"segmentation": {"thresold": 0.5}}]))
    with pytest.raises(ConfigError, match="protocols is empty"):
        build_runner(config_with(protocols=[]))
    with pytest.raises(ConfigError, match="methods is empty"):
        build_runner(config_with(methods={}))
    with pytest.raises(ConfigError, match="only a trained Explainer has a checkpoint"):
        build_runner(config_with(methods={"a": MethodConfig("constant", checkpoint="x")}))
    with pytest.raises(ConfigError, match="does not exist"):
        evaluate(["--config", str(tmp_path / "no.yaml")])


def test_an_explainer_of_another_classifier_or_other_classes(trained, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).write_bytes((Path(trained) / name).read_bytes())
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, "fingerprint": "0" * 16}))
    method = MethodConfig("explainer", checkpoint=str(folder))
    with pytest.raises(FingerprintMismatchError, match=r"methods.a: .* was made for the classifier with fingerprint 0000"):
        build_runner(config_with(methods={"a": method}))
    method.allow_mismatch = True
    assert build_runner(config_with(methods={"a": method})).methods[0].label == "a"
    config = config_with(methods={"a": MethodConfig("explainer", checkpoint=trained)})
    config.data.options = {"size": 32, "class_names": ["dots", "rings"]}
    with pytest.raises(ConfigError, match="explains the classes stripes"):
        build_runner(config)


def test_two_processes_under_torchrun_equal_one(tmp_path, capsys):
    """Same bytes in results.jsonl, whichever process computed a row."""
    config = config_with(out=str(tmp_path / "one"), limit=7, batch_size=2, threads=1, progress=False, bootstrap=50)
    config.methods = {"random": MethodConfig(), "grad_cam": MethodConfig(), "rise": MethodConfig(options={"n_masks": 8})}
    config.protocols = ["segmentation", {"insertion_deletion": {"steps": 2}}]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(asdict(config)))
    torch.manual_seed(0)
    from explainer.models.classifiers import build_classifier

    weights = tmp_path / "weights.pt"
    torch.save(build_classifier("small_vgg", 6, widths=[4]).state_dict(), weights)
    arguments = ["--config", str(file), "--classifier.checkpoint", str(weights)]
    threads = torch.get_num_threads()
    assert evaluate(arguments) == 0
    torch.set_num_threads(threads)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "evaluate.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "two" / "rows").glob("*.jsonl"))) == 2
    assert (tmp_path / "two" / "results.jsonl").read_bytes() == (tmp_path / "one" / "results.jsonl").read_bytes()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert one["results"] == two["results"] and two["provenance"]["hardware"]["processes"] == 2


def test_a_sample_comes_from_the_whole_split_and_is_the_same_every_time(tmp_path):
    """`sample` draws; the rows name what was drawn."""
    from explainer.commands.assembly import data_module
    from tests.factories import make_coco

    make_coco(tmp_path, val=40)
    config = EvaluateConfig(sample=10)
    config.data.name, config.data.options = "coco", {"root": str(tmp_path), "size": 16}
    drawn = [data_module(config).dataset("test") for _ in range(2)]
    ids = [[d.sample_id(i) for i in range(len(d))] for d in drawn]
    config.sample = None
    everything = data_module(config).dataset("test")
    known = [everything.sample_id(i) for i in range(len(everything))]
    assert ids[0] == ids[1] and len(ids[0]) == 10 and ids[0] == [i for i in known if i in ids[0]] and ids[0] != known[:10]
    assert torch.equal(drawn[0][3].image, everything[known.index(ids[0][3])].image)
    assert drawn[0].fingerprint() != everything.fingerprint()
    config.sample = 0
    with pytest.raises(ConfigError, match="sample must be at least 1, received 0"):
        data_module(config)


def test_a_limit_is_spread_over_the_classes_of_sorted_folders_and_grows(tmp_path):
    from explainer.commands.assembly import data_module
    from tests.factories import make_image_folder

    make_image_folder(tmp_path, ("a", "b", "c"), per_class=9)
    config = EvaluateConfig(limit=4)
    config.data.name, config.data.options = "image_folder", {"root": str(tmp_path), "size": 16}

    def names(number: int) -> list[str]:
        config.limit = number
        dataset = data_module(config).dataset("test")
        return [dataset.sample_id(i) for i in range(number)]

    few, more = names(4), names(7)
    assert {name.split("/")[-2] for name in few[:3]} == {"a", "b", "c"} and more[:4] == few and len(set(more)) == 7
    everything = data_module(replace(config, limit=None)).dataset("test")
    assert data_module(config).dataset("test").fingerprint() != everything.fingerprint(), "rows of one order are not taken for the other's"
    assert [everything.sample_id(i).split("/")[-2] for i in range(4)] == ["a"] * 4
