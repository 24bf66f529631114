"""The quickstart as the README runs it, against its promises (slow: it trains; about 12 minutes on two cores)."""

import math
from pathlib import Path

import pytest
import torch

import explainer
from explainer.cli import main as train
from explainer.commands.evaluate import evaluate
from explainer.data.datamodule import DataModule
from explainer.fills import blend, make_fill
from explainer.losses.classification import classification_loss
from explainer.models.checkpoints import load_explanandum
from explainer.models.masking import aggregate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A trained classifier, a trained Explainer and the evaluation, in a folder of their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("quickstart")
    quiet = ["--trainer.progress_bar", "false"]
    classifier = ["--run_dir", f"{folder}/c"]
    assert train(["fit", "--config", f"{ROOT}/configs/classifier/shapes.yaml", *classifier, *quiet]) == 0
    fit = ["fit", "--config", f"{ROOT}/configs/explainer/shapes_quickstart.yaml", "--run_dir", f"{folder}/e", *quiet]
    checkpoint = f"{folder}/c/checkpoints/best.ckpt"
    assert train([*fit, "--classifier.checkpoint", checkpoint, "--evaluate_with", "null"]) == 0
    assert (
        evaluate(
            [
                "--config",
                f"{ROOT}/configs/evaluate/quickstart.yaml",
                "--out",
                f"{folder}/results",
                "--classifier.checkpoint",
                checkpoint,
                "--methods.explainer.checkpoint",
                f"{folder}/e/checkpoints/best.ckpt",
                "--progress",
                "false",
            ]
        )
        == 0
    )
    torch.set_num_threads(threads)
    return folder


def test_evidence_is_where_it_was_planted(quickstart):
    """Through the exact mask the classification loss stays as on the whole image; through its inverse nothing is left."""
    explanandum = load_explanandum(quickstart / "c/checkpoints/best.ckpt")
    whole = kept = detected = labels = 0.0
    entropies = []
    data = DataModule("shapes", 50, options={"size": 64, "length": 300})
    for batch in data.eval_dataloader("test"):
        mask = aggregate(batch.masks, batch.targets)[0]
        fill = make_fill(batch.images, "mean", mean=explanandum.mean)
        with torch.no_grad():
            logits, masked = explanandum(batch.images), explanandum(blend(batch.images, mask, fill))
            inverse = explanandum(blend(batch.images, 1 - mask, fill))
        whole += classification_loss(logits, batch.targets).item() / 6
        kept += classification_loss(masked, batch.targets).item() / 6
        detected += ((inverse > 0) * batch.targets).sum().item()
        labels += batch.targets.sum().item()
        q = inverse.softmax(dim=1)
        entropies.append(-(q * q.log()).sum(dim=1) / math.log(6))
    assert kept < whole + 0.25 and detected / labels <= 0.01 and torch.cat(entropies).mean() > 0.85


def test_floors(quickstart):
    table = (quickstart / "results/table.md").read_text()
    values = read_table(table)
    explained, grad_cam = values["segmentation"]["explainer"], values["segmentation"]["grad_cam (min-max)"]
    assert explained["IoU % ↑"] >= 86 and explained["IoU@t % ↑"] >= 92 and explained["MAE % ↓"] <= 3.5
    assert explained["IoU % ↑"] > grad_cam["IoU % ↑"] and explained["MAE % ↓"] < grad_cam["MAE % ↓"]
    assert values["segmentation_per_class"]["explainer"]["IoU@t % ↑"] >= 90
    assert values["inverse_mask"]["explainer"]["left % ↓"] <= 1
    matrix = values["masking_matrix"]["explainer"]
    assert matrix["own mask % ↑"] >= 0.9 * matrix["whole image %"] and matrix["other masks % ↓"] <= 20
    assert values["classification_kept"]["explainer"]["f1, original %"] >= 97
    assert list((quickstart / "e/images").glob("*.png"))


def read_table(text):
    """``table.md`` -> {protocol: {method: {column: point estimate}}}."""
    tables, section, header = {}, None, None
    for line in text.splitlines():
        if line.startswith("#"):
            section, header = line.lstrip("# "), None
        elif line.startswith("| ") and header is None:
            header = [cell.strip() for cell in line.strip("| ").split(" | ")]
        elif line.startswith("| ") and not line.startswith("| ---"):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            tables.setdefault(section, {})[cells[0]] = {
                name: float(cell.split()[0]) for name, cell in zip(header[1:], cells[1:], strict=True) if cell and cell[0] in "-0123456789"
            }
    return tables


def test_checkpoint_loads_as_the_readme_shows(quickstart):
    net = explainer.load(quickstart / "e/checkpoints/best.ckpt")
    masks = net(torch.rand(1, 3, 80, 64))
    assert (
        masks.shape == (1, 6, 80, 64)
        and net.metadata["fingerprint"] == load_explanandum(quickstart / "c/checkpoints/best.ckpt").fingerprint()
    )
