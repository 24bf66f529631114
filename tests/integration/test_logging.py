"""wandb never stands in the way: offline without an account, its folder inside the run folder, CSV beside it."""

from explainer.cli import main as train


def test_wandb_is_offline_without_an_account(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [
        "fit", "--task", "classify", "--run_dir", f"{tmp_path}/run", "--classifier.options", "{widths: [8, 8]}",
        "--data.options", "{size: 32, length: 8}", "--data.batch_size", "4", "--trainer.max_epochs", "1",
        "--trainer.progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1",
    ]  # fmt: skip
    assert train(arguments) == 0
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert "train/loss" in (tmp_path / "run/metrics.csv").read_text()
