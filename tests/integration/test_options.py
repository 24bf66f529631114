"""Options of the trainer that change how, and not what, is trained; and what the command line says at the end of a bad run."""

import json
import shutil
import signal

import pytest
import torch
from PIL import Image

from explainer.cli import main as train
from explainer.tasks.csv_log import read_rows
from tests.integration.launch import CLASSIFIER, EXPLAINER, QUIET, Job

SGD = ["--optimizer.name", "sgd", "--optimizer.lr", "0.02", "--trainer.max_epochs", "1"]


def losses(folder, name="train/loss"):
    return [r[name] for r in read_rows(folder / "metrics.csv") if name in r]


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """Arguments of a short Explainer run, and the folder of one run with them."""
    folder = tmp_path_factory.mktemp("options")
    assert train([*CLASSIFIER, "--trainer.max_epochs", "1", "--run_dir", f"{folder}/c"]) == 0
    arguments = [*EXPLAINER, *SGD, "--classifier.checkpoint", f"{folder}/c/checkpoints/best.ckpt"]
    assert train([*arguments, "--run_dir", f"{folder}/plain"]) == 0
    return arguments, folder / "plain"


def test_bf16_keeps_losses_in_float32(argv, tmp_path, monkeypatch):
    from explainer.tasks import explain

    seen, inside = set(), []
    original = explain.total_loss

    def watched(terms, e):
        seen.update(t.dtype for t in (e.class_masks, e.target_mask, e.logits_masked, e.logits_inverse))
        inside.append((e.class_masks @ e.class_masks.transpose(-1, -2)).dtype)  # would be bfloat16 under autocast
        total, values = original(terms, e)
        seen.update(v.dtype for v in values.values())
        return total, values

    monkeypatch.setattr(explain, "total_loss", watched)
    arguments, plain = argv
    assert train([*arguments, "--run_dir", f"{tmp_path}/r", "--trainer.precision", "bf16-mixed"]) == 0
    assert seen == {torch.float32} and set(inside) == {torch.float32}
    a, b = losses(plain), losses(tmp_path / "r")
    assert b == pytest.approx(a, abs=0.05) and a != b, "bfloat16 was used, and changes little"
    state = torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(v.dtype != torch.bfloat16 for v in state.values())


@pytest.mark.parametrize(
    ("capabilities", "precision"), [({"avx512_bf16": True}, "bf16-mixed"), ({"avx2": True}, "32-true"), ({}, "32-true")]
)
def test_precision_auto_follows_the_hardware(argv, tmp_path, monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert train([*argv[0], "--run_dir", f"{tmp_path}/r", "--trainer.precision", "auto", "--trainer.max_steps", "1"]) == 0
    # The clock decides among what the hardware has; float32 is always among it.
    assert json.loads((tmp_path / "r/provenance.json").read_text())["precision"] in {precision, "32-true"}


def test_channels_last_changes_nothing_but_the_layout(argv, tmp_path):
    arguments, plain = argv
    assert train([*arguments, "--run_dir", f"{tmp_path}/r", "--trainer.channels_last", "false"]) == 0
    assert losses(tmp_path / "r") == pytest.approx(losses(plain), abs=1e-4)


@pytest.mark.slow
def test_accumulated_gradients_equal_the_large_batch(argv, tmp_path):
    """2 batches of 4 against one of 8, in a network without BatchNorm: the same weights."""
    options = "{encoder_name: vgg11, encoder_depth: 3, decoder_channels: [16, 8, 8], decoder_use_norm: false}"
    arguments = [*argv[0], "--explainer.network", "unet", "--explainer.options", options]
    assert train([*arguments, "--run_dir", f"{tmp_path}/a", "--trainer.accumulate_grad_batches", "2"]) == 0
    assert train([*arguments, "--run_dir", f"{tmp_path}/b", "--data.batch_size", "8"]) == 0
    a, b = (torch.load(tmp_path / p / "checkpoints/last.ckpt", weights_only=True) for p in "ab")
    assert a["global_step"] == b["global_step"] == 3
    for key, value in a["state_dict"].items():
        torch.testing.assert_close(value, b["state_dict"][key], atol=1e-5, rtol=1e-4)


def test_sync_batchnorm_is_ignored_on_the_cpu(argv, tmp_path):
    arguments, plain = argv
    assert train([*arguments, "--run_dir", f"{tmp_path}/r", "--trainer.sync_batchnorm", "true"]) == 0
    assert losses(tmp_path / "r") == losses(plain)


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({}, set()),
        ({"compile": True}, {"explainer", "classifier"}),
        ({"compile_explainer": True}, {"explainer"}),
        ({"compile_classifier": True}, {"classifier"}),
        ({"compile": True, "compile_classifier": False}, {"explainer"}),
    ],
)
def test_what_is_compiled_is_chosen_for_each_network(argv, tmp_path, monkeypatch, options, compiled):
    from explainer.models.networks import VGGUNet

    seen = set()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda net, *_, **__: seen.add("explainer" if isinstance(net, VGGUNet) else "classifier")
    )
    more = [word for key, value in options.items() for word in (f"--trainer.{key}", str(value).lower())]
    assert train([*argv[0], "--run_dir", f"{tmp_path}/r", "--trainer.max_steps", "1", *more]) == 0
    assert seen == compiled


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_networks_train_the_same(argv, tmp_path):
    import explainer

    arguments, plain = argv
    assert train([*arguments, "--run_dir", f"{tmp_path}/r", "--trainer.compile", "true"]) == 0
    assert losses(tmp_path / "r") == pytest.approx(losses(plain), abs=1e-3)
    masks = explainer.load(tmp_path / "r/checkpoints/last.ckpt")(torch.rand(1, 3, 32, 32))
    assert masks.shape == (1, 6, 32, 32)


def test_not_a_number_stops_the_run_in_words(argv, tmp_path, capsys):
    arguments, _ = argv
    assert train([*arguments, "--run_dir", f"{tmp_path}/r", "--optimizer.lr", "1e30"]) == 2
    error = capsys.readouterr().err
    assert "the loss is nan" in error or "the loss is inf" in error
    assert "term(s)" in error and "train/0000" in error and "Lower the learning rate" in error
    assert not (tmp_path / "r/checkpoints/last.ckpt").exists(), "broken weights are not saved"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_step(argv, tmp_path, capsys, monkeypatch, accumulate):
    """The loss stays finite: a root whose argument is 0 has an infinite slope."""
    from explainer.tasks import explain

    original, calls, ids = explain.total_loss, [], []

    def rooted(terms, e):
        total, values = original(terms, e)
        calls.append(e.ids)
        if len(calls) == 4:
            ids.extend(calls[-2:] if accumulate == 2 else calls[-1:])
            total = total + torch.sqrt((e.class_masks * 0).sum())
        assert torch.isfinite(total)
        return total, values

    monkeypatch.setattr(explain, "total_loss", rooted)
    more = ["--trainer.accumulate_grad_batches", str(accumulate), "--trainer.save_every_n_steps", "1"]
    assert train([*argv[0], "--run_dir", f"{tmp_path}/r", *more]) == 2
    error = capsys.readouterr().err
    assert f"the gradient's norm is nan in step {4 // accumulate - 1}" in error and "--ckpt_path last" in error
    assert f"Images of the batch: {', '.join(name for part in ids for name in part)}." in error
    saved = torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 4 // accumulate - 1 and all(bool(torch.isfinite(v).all()) for v in saved["state_dict"].values())


def test_unreadable_images_are_counted_at_the_end(tmp_path, caplog, capsys):
    for split in ("train", "val"):
        for name, color in (("red", (250, 10, 10)), ("blue", (10, 10, 250))):
            for i in range(6):
                path = tmp_path / f"images/{split}/{name}/{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), color).save(path)
    (tmp_path / "images/train/red/3.png").write_bytes(b"no image")
    (tmp_path / "images/val/blue/1.png").write_bytes(b"")
    arguments = ["fit", "--task", "classify", "--classifier.options", "{widths: [8, 8]}", "--data.name", "image_folder", "--data.options"]
    arguments += [f"{{root: {tmp_path}/images, size: 32}}", "--data.batch_size", "4", *QUIET, "--trainer.max_epochs", "2"]
    assert train([*arguments, "--run_dir", f"{tmp_path}/raise"]) == 2
    assert "3.png" in capsys.readouterr().err
    assert train([*arguments, "--run_dir", f"{tmp_path}/skip", "--data.on_error", "skip"]) == 0
    summary = [r.getMessage() for r in caplog.records if r.getMessage().startswith("skipped unreadable samples")]
    assert summary and "1 in train (" in summary[-1] and "1 in val (" in summary[-1]
    shutil.copytree(tmp_path / "images/val", tmp_path / "images/test")
    here = ["predict", *arguments[1:], "--run_dir", f"{tmp_path}/skip", "--data.on_error", "skip"]
    assert train(here) == 0
    assert len(list((tmp_path / "skip/predictions").glob("*.npz"))) == 11


@pytest.mark.slow
def test_resume_with_workers_is_exact(argv, tmp_path):
    """Two loader processes that augment: their random numbers depend on the sample and the epoch, not on the worker."""
    arguments = [*argv[0], "--data.options", "{size: 32, length: 24, augment: symmetry}", "--trainer.save_every_n_steps", "4"]
    whole = [*arguments, "--run_dir", f"{tmp_path}/whole", "--trainer.max_epochs", "2"]
    assert train(whole) == 0
    cut = [*arguments, "--run_dir", f"{tmp_path}/cut", "--data.num_workers", "2", "--trainer.max_epochs", "2"]
    assert Job(cut, tmp_path, strike=("step", 5)).wait() == -signal.SIGKILL  # after the checkpoint of step 4 of 6, inside the first epoch
    assert train([*cut, "--ckpt_path", "last"]) == 0
    a, b = (torch.load(tmp_path / p / "checkpoints/last.ckpt", weights_only=True) for p in ("whole", "cut"))
    assert a["global_step"] == b["global_step"] == 12
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    assert json.loads((tmp_path / "cut/summary.json").read_text())["val/loss"] > 0


def test_what_a_run_starts_finds_its_data_and_its_checkpoints(tmp_path):
    """The classifier trained first and the evaluation afterwards take the data folder and the checkpoints from the run, not from files."""
    for split, label, n in ((s, c, n) for s in ("train", "val", "test") for c in "ab" for n in range(2)):
        file = tmp_path / "images" / split / label / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200 * (label == "a"), 60 * n, 80)).save(file)
    data = "data: {name: image_folder, batch_size: 2, options: {root: elsewhere, size: 32}}\n"
    trainer = "trainer: {max_epochs: 1, progress_bar: false, accelerator: cpu}\nlogging: {wandb: 'off', images: 0}\n"
    (tmp_path / "c.yaml").write_text(f"task: classify\nrun_dir: {tmp_path}/c\n{data}{trainer}classifier: {{options: {{widths: [8, 8]}}}}\n")
    (tmp_path / "e.yaml").write_text(
        f"out: {tmp_path}/results\n{data}classifier: {{checkpoint: not-this.ckpt}}\nmethods: {{explainer: {{checkpoint: nor-this.ckpt}}}}\n"
        "protocols: [classification_kept]\nprogress: false\nbootstrap: 20\ndevice: cpu\n"
    )
    argv = [*EXPLAINER[:7], *QUIET, "--data.name", "image_folder", "--data.batch_size", "2", "--trainer.max_epochs", "1"]
    argv += ["--data.options", f"{{root: {tmp_path}/images, size: 32}}", "--run_dir", f"{tmp_path}/r"]
    argv += ["--classifier.checkpoint", f"{tmp_path}/c/checkpoints/best.ckpt", "--classifier.train_with", f"{tmp_path}/c.yaml"]
    assert train([*argv, "--evaluate_with", f"{tmp_path}/e.yaml"]) == 0
    row = json.loads((tmp_path / "results/results.jsonl").read_text().splitlines()[0])
    assert row["method"] == "explainer"
