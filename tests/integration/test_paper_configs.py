"""The four published configurations load, build with random weights and take one training step at 224 px; the rest of configs/ parses."""

from pathlib import Path

import pytest
import torch
import yaml

from explainer.cli import parse_evaluate, parse_run
from explainer.config import ClassifierConfig
from explainer.data.base import DataModule
from explainer.losses.base import total_loss
from explainer.models.checkpoints import load_explanandum
from explainer.models.explainer import Explainer
from explainer.tasks.explain import ExplainTask
from tests.factories import dataset_options

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("classifier", ["vgg16", "resnet50"])
@pytest.mark.parametrize("data", ["voc2007", "coco2014"])
def test_published_configuration_takes_a_step(data, classifier, tmp_path):
    path = CONFIGS / "explainer" / f"{data}_{classifier}.yaml"
    _, config, _ = parse_run(["fit", "--config", str(path)])
    _, trained, _ = parse_run(["fit", "--config", str(CONFIGS / "classifier" / f"{data}_{classifier}.yaml")])
    assert config.explainer.network == "deeplabv3" and config.explainer.options["encoder_name"] == "resnet50"
    assert config.data.options["size"] == 224 and config.data.batch_size == 16

    K = {"voc2007": 20, "coco2014": 80}[data]
    tiny = DataModule(config.data.name, 2, options={**dataset_options(config.data.name, tmp_path), "size": 224})
    batch = next(iter(tiny.eval_dataloader("train")))
    targets = torch.zeros(len(batch), K)
    targets[:, : batch.targets.shape[1]] = batch.targets[:, :K]
    batch = type(batch)(batch.images, targets, None, None, batch.ids)

    options = {**trained.classifier.options, "weights": None}
    explanandum = load_explanandum(None, config.classifier.arch, options, K)
    assert trained.classifier.mean == ClassifierConfig().mean
    net = Explainer(config.explainer.network, K, {**config.explainer.options, "encoder_weights": None})
    task = ExplainTask(net, explanandum, config.losses, config.masking, config.optimizer)
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
