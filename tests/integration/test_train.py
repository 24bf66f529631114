"""The real command line on tiny data: train, resume, test, predict, load; and the errors a user meets first."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml

import explainer
from explainer.cli import main as train
from explainer.data.datamodule import DataModule

ROOT = Path(__file__).parents[2]
TINY = [
    "--data.options",
    "{size: 32, length: 24}",
    "--data.batch_size",
    "4",
    "--data.eval_batch_size",
    "12",
    "--trainer.max_epochs",
    "1",
    "--trainer.progress_bar",
    "false",
    "--trainer.accelerator",
    "cpu",
    "--logging.wandb",
    "off",
    "--trainer.log_every_n_steps",
    "1",
]
SMALL_NET = [
    "--explainer.network",
    "unet",
    "--explainer.options",
    "{encoder_name: resnet18, encoder_depth: 3, decoder_channels: [16, 8, 8]}",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One trained classifier and one trained Explainer, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("runs")
    assert train(["fit", "--task", "classify", "--run_dir", f"{folder}/c", "--classifier.options", "{widths: [8, 8]}", *TINY]) == 0
    fit = ["fit", "--run_dir", f"{folder}/e", "--classifier.checkpoint", f"{folder}/c/checkpoints/best.ckpt", *TINY, *SMALL_NET]
    assert train(fit) == 0
    return folder, fit


def test_run_folder_is_complete(runs):
    folder, _ = runs
    for name in ("config.yaml", "metrics.csv", "provenance.json", "summary.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"):
        assert (folder / "e" / name).is_file(), name
    assert list((folder / "e" / "images").glob("*.png"))
    config = yaml.safe_load((folder / "e/config.yaml").read_text())
    assert config["data"]["options"] == {"size": 32, "length": 24} and config["losses"]["entropy"]["weight"] == 1.0
    provenance = json.loads((folder / "e/provenance.json").read_text())
    assert len(provenance["explanandum"]) == 16
    assert {"explainer", "torch", "lightning", "python", "segmentation-models-pytorch"} <= set(provenance["versions"])
    assert provenance["hardware"]["device"] == "cpu" and provenance["hardware"]["processes"] == 1
    verdict = json.loads((folder / "e/summary.json").read_text())["verdict"]
    assert verdict["sentences"][0].startswith(f"The classifier on {verdict['images']} val pictures") and verdict["images"] >= 8
    assert {"own", "a constant", "the masks of other pictures", "Grad-CAM", "the untrained network"} == set(verdict["scores"])
    with (folder / "e/metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert any(row["train/loss/area_bound"] for row in rows) and any(row["val/iou"] for row in rows)


def test_the_verdict_on_a_shared_encoder_compares_with_what_masks_began_as(runs):
    folder, fit = runs
    shared = ["--explainer.encoder", "shared", "--explainer.network", "fpn", "--explainer.options", "{layers: [features.5, features]}"]
    assert train([*fit[: -len(SMALL_NET)], *shared, "--run_dir", f"{folder}/shared"]) == 0
    verdict = json.loads((folder / "shared/summary.json").read_text())["verdict"]
    assert {"own", "a constant", "the masks of other pictures", "Grad-CAM", "the masks that training began with"} == set(verdict["scores"])


def test_saved_config_runs_again_to_the_same_loss(runs, tmp_path):
    folder, _ = runs
    assert train(["fit", "--config", f"{folder}/e/config.yaml", "--run_dir", str(tmp_path / "again")]) == 0
    one, two = (json.loads((p / "summary.json").read_text()) for p in (folder / "e", tmp_path / "again"))
    assert one["val/loss"] == two["val/loss"]


def test_checkpoint_is_safe_small_and_loads(runs):
    folder, _ = runs
    content = torch.load(folder / "e/checkpoints/best.ckpt", weights_only=True)
    assert not [k for k in content["state_dict"] if k.startswith("explanandum.")]
    net = explainer.load(folder / "e/checkpoints/best.ckpt")
    assert not net.training and net.class_names[0] == "stripes"
    masks = net(torch.rand(2, 3, 37, 50))
    assert masks.shape == (2, 6, 37, 50) and masks.min() >= 0 and masks.max() <= 1


def test_explanandum_is_the_same_after_fit(runs):
    from explainer.models.checkpoints import load_explanandum

    folder, _ = runs
    recorded = json.loads((folder / "e/provenance.json").read_text())["explanandum"]
    assert load_explanandum(folder / "c/checkpoints/best.ckpt").fingerprint() == recorded


def test_command_line_beats_the_checkpoint_and_a_second_run_in_one_folder_works(runs, tmp_path, capsys):
    _folder, fit = runs
    here = [*fit, "--run_dir", str(tmp_path / "r")]
    assert train(here) == 0
    before = (tmp_path / "r/metrics.csv").read_text().count("\n")
    assert train([*here, "--trainer.max_epochs", "2", "--losses.entropy.weight", "0.25", "--ckpt_path", "last"]) == 0
    assert yaml.safe_load((tmp_path / "r/config.yaml").read_text())["losses"]["entropy"]["weight"] == 0.25
    rows = list(csv.DictReader((tmp_path / "r/metrics.csv").open()))
    assert len(rows) > before - 1
    row = [r for r in rows if r["train/loss"]][-1]
    weights = {"classification": 1, "entropy": 0.25, "target_area": 0.1, "non_target_area": 0.3, "area_bound": 1, "total_variation": 1}
    total = sum(w * float(row[f"train/loss/{name}"]) for name, w in weights.items())
    assert float(row["train/loss"]) == pytest.approx(total, rel=1e-4)
    steps = [float(r["step"]) for r in rows if r["train/loss"]]
    assert steps == sorted(set(steps)), "no step is lost or written twice"


def test_test_and_predict(runs):
    folder, fit = runs
    rest = [*fit[1:], "--run_dir", f"{folder}/e"]
    assert train(["test", *rest]) == 0
    assert 0 <= json.loads((folder / "e/test.json").read_text())["test/iou"] <= 1
    assert train(["predict", *rest]) == 0
    files = list((folder / "e/predictions").glob("*.npz"))
    assert len(files) == 24
    net, data = explainer.load(folder / "e/checkpoints/best.ckpt"), DataModule("shapes", 24, options={"size": 32, "length": 24})
    batch = next(iter(data.eval_dataloader("test")))
    with torch.no_grad():
        masks = dict(zip(batch.ids, net(batch.images), strict=True))
    for path in files:
        with np.load(path) as content:
            torch.testing.assert_close(torch.from_numpy(content["masks"]).float(), masks[str(content["id"])], atol=2e-3, rtol=0)


def test_predict_keeps_nothing_in_memory(runs, monkeypatch):
    folder, fit = runs
    returned, original = [], pl.Trainer.predict

    def watched(*args, **kwargs):
        returned.append(original(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(pl.Trainer, "predict", watched)
    assert train(["predict", *fit[1:], "--run_dir", f"{folder}/e"]) == 0
    assert returned == [None]


def test_help_is_instant_and_does_not_import_torch():
    code = "import sys; from explainer.cli import main as train; train(['fit', '--print_config', '--seed', '3'])"
    probe = f"""
import sys
try:
    exec({code!r})
except SystemExit:
    pass
assert not {{'torch', 'pytorch_lightning', 'matplotlib'}} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "seed: 3" in done.stdout
    helped = subprocess.run([sys.executable, "train.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert helped.returncode == 0 and "predict" in helped.stdout
    module = subprocess.run([sys.executable, "-m", "explainer", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert module.returncode == 0 and "calibrate" in module.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--optimizer.lrr", "1"], "Did you mean --optimizer.lr?"),
        (["fit", "--optimizer.lr", "abc"], "optimizer.lr"),
        (["fit", "--task", "segment"], "task"),
        (["train"], "must be one of the commands"),
        (["fit", "--config", "configs/explainer/missing.yaml"], "does not exist. In configs/explainer:"),
        (["fit", "--data.name", "shape", *TINY[4:]], "Did you mean 'shapes'?"),
        (["fit", "--data.options", "{size: 32, lenght: 5}"], "Did you mean 'length'?"),
        (["fit", "--data.options", "{size: 32, class_names: [stripes, plaid]}"], "unknown class 'plaid'"),
        (["fit", "--losses", "{entropi: {weight: 1}}", *TINY], "Did you mean 'entropy'?"),
        (["fit", "--explainer.network", "unett", *TINY], "unknown Explainer network 'unett'"),
        (["fit", "--classifier.arch", "vgg99", *TINY], "unknown classifier 'vgg99'"),
        (["fit", "--classifier.checkpoint", "nowhere.ckpt", *TINY], "nowhere.ckpt does not exist"),
        (["fit", "--ckpt_path", "last", *TINY], "last.ckpt does not exist"),
        (["fit", "--data.batch_size", "1", *TINY[:2], *TINY[4:], *SMALL_NET], "batch_size must be at least 2"),
        (["fit", "--trainer.extra", "{fast_dev: 1}", *TINY, *SMALL_NET], "trainer.extra.fast_dev is not an argument"),
        (["fit", "--trainer.extra", "{min_epochs: two}", *TINY, *SMALL_NET], "trainer.min_epochs must be a whole number"),
        (["fit", "--trainer.extra", "{max_epochs: 2}", *TINY, *SMALL_NET], "Write trainer.max_epochs"),
        (["fit", "--trainer.extra", "{logger: false}", *TINY, *SMALL_NET], "the logging section has it"),
    ],
)
def test_errors_are_one_paragraph(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    extra = [] if arguments == ["train"] else ["--run_dir", str(tmp_path / "r")]
    assert train([*arguments, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and len(error) < 2000


def test_another_classifiers_checkpoint_is_refused(runs, tmp_path, capsys):
    folder, fit = runs
    other = [
        "fit",
        "--task",
        "classify",
        "--run_dir",
        str(tmp_path / "c2"),
        "--seed",
        "5",
        "--classifier.options",
        "{widths: [8, 8]}",
        *TINY,
    ]
    assert train(other) == 0
    again = [*fit, "--run_dir", str(tmp_path / "e2"), "--classifier.checkpoint", str(tmp_path / "c2/checkpoints/best.ckpt")]
    assert train([*again, "--ckpt_path", f"{folder}/e/checkpoints/best.ckpt"]) == 2
    assert "was made for the classifier with fingerprint" in capsys.readouterr().err


def test_classes_of_classifier_and_data_must_agree(runs, tmp_path, capsys):
    _folder, fit = runs
    changed = [*fit, "--run_dir", str(tmp_path / "e3"), "--data.options", "{size: 32, length: 24, class_names: [dots, rings]}"]
    assert train(changed) == 2
    assert "was trained for the classes stripes" in capsys.readouterr().err
