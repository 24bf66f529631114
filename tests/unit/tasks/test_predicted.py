"""Targets without labels: the classifier's own decisions, kept for the next run, and a run from a folder of photographs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

import explainer
from explainer.cli import main
from explainer.data.datamodule import DataModule
from explainer.data.imagenet import imagenet_names
from explainer.errors import ConfigError
from explainer.models.classifiers import build_classifier
from explainer.models.explanandum import Explanandum
from explainer.tasks.predicted import decide, predict_targets, use_predicted_targets
from tests.factories import make_image_folder


class Brightest(torch.nn.Module):
    """Logit k is 10 times (the mean of colour k - 0.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(10.0))
        self.asked = 0

    def forward(self, images):
        self.asked += len(images)
        return self.gain * (images.mean((2, 3)) - 0.5)


def setting(tmp_path: Path, task: str = "multiclass") -> tuple[Explanandum, DataModule]:
    make_image_folder(tmp_path / "data")
    e = Explanandum(Brightest(), 3, task, mean=0.0, std=1.0)
    options = {"root": str(tmp_path / "data"), "size": 16, "class_names": ["red", "green", "blue"], "task": task}
    return e, DataModule("images", 2, options=options, train_options={"augment": "standard"})


def test_decisions_by_hand():
    logits = torch.tensor([[0.1, 3.0, -1.0], [-2.0, -3.0, -4.0]])
    assert decide(logits, "multiclass") == [(1,), (0,)] and decide(logits, "multiclass", top=2) == [(1, 0), (0, 1)]
    assert decide(logits, "multilabel") == [(1, 0), ()] and decide(logits, "multilabel", threshold=0.9) == [(1,), ()]


def test_images_carry_what_the_classifier_sees_in_them_unaugmented(tmp_path, caplog):
    e, data = setting(tmp_path)
    with caplog.at_level(logging.WARNING):
        use_predicted_targets(e, data, ["train"], folder=tmp_path / "run")
    assert "classifier's decisions" in caplog.text and "%" in caplog.text
    plain = data.unaugmented()
    for batch, shown in zip(data.batches("train", [[0, 1], [2, 3]]), plain.batches("train", [[0, 1], [2, 3]]), strict=True):
        expected = shown.images.mean((2, 3)).argmax(1)
        assert torch.equal(batch.targets, torch.nn.functional.one_hot(expected, 3).float())
    asked = e.classifier.asked
    predict_targets(e, data, "train", folder=tmp_path / "run")
    assert e.classifier.asked == asked, "read from the run's folder"
    (tmp_path / "run" / "predicted_train.json").write_text("{")
    predict_targets(e, data, "train", folder=tmp_path / "run")
    assert e.classifier.asked > asked, "a file that was cut short is asked again"
    e.classifier.gain.data.neg_()
    before = data.batches("train", [[0]])
    use_predicted_targets(e, data, ["train"], folder=tmp_path / "run")
    assert not torch.equal(next(iter(before)).targets, next(iter(data.batches("train", [[0]]))).targets), "another classifier's answers"


def test_wrong_options_are_refused(tmp_path):
    e, data = setting(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.top must lie in 1\.\.3"):
        predict_targets(e, data, "val", top=4)
    with pytest.raises(ConfigError, match="targets for 1 images"):
        data.set_targets("train", [(0,)])


def test_imagenet_names():
    names = imagenet_names()
    assert (
        len(names) == len(set(names)) == 1000
        and names[0] == "tench"
        and names[134] == "crane (n02012849)"
        and names[999] == "toilet tissue"
    )


def test_an_explainer_from_photographs_alone(tmp_path):
    """The real command line: a stock classifier, no labels, 150 classes, a shared encoder."""
    make_image_folder(tmp_path / "photos")
    arguments = ["fit", "--config", "configs/explainer/imagenet_lite0.yaml", "--run_dir", str(tmp_path / "run")]
    arguments += ["--data.options.root", str(tmp_path / "photos"), "--data.options.size", "64", "--data.options.class_names", "150"]
    arguments += ["--classifier.arch", "timm:resnet10t", "--classifier.options", "{}", "--data.batch_size", "2"]
    arguments += ["--trainer.max_epochs", "1", "--trainer.progress_bar", "false", "--data.options.fractions", "[0.6,0.2,0.2]"]
    torch.manual_seed(0)
    torch.save(build_classifier("timm:resnet10t", 150).state_dict(), tmp_path / "resnet.pt")
    arguments += ["--classifier.checkpoint", str(tmp_path / "resnet.pt"), "--overwrite", "true"]
    assert main(arguments) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["val/kept"] <= 1
    net = explainer.load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    masks = net(torch.rand(1, 3, 64, 64), [4, 149])
    assert masks.shape == (1, 2, 64, 64) and net.explanandum is not None
    size = (tmp_path / "run" / "checkpoints" / "best.ckpt").stat().st_size
    assert size < (tmp_path / "resnet.pt").stat().st_size, "the decoder alone"


def test_an_unreadable_image_is_left_out_as_on_error_says(tmp_path):
    e, data = setting(tmp_path)
    data.on_error = "skip"
    dataset = data.dataset("train")
    whole = predict_targets(e, data, "train").classes
    dataset.records[1].image.write_bytes(b"no image")
    found = predict_targets(e, data, "train", folder=tmp_path / "run").classes
    assert found == [whole[0], (), *whole[2:]]
    assert not (tmp_path / "run" / "predicted_train.json").exists(), "asked again: the file may be whole the next time"
    use_predicted_targets(e, data, ["train"])


def test_a_sample_of_the_training_split_gets_its_own_images_decisions(tmp_path):
    e, data = setting(tmp_path)
    whole = predict_targets(e, data, "train").classes
    assert len(set(whole)) > 1, "else nothing is tested"
    order = list(range(len(whole)))[::-1][:-1]
    data.dataset("train").keep(order)
    assert predict_targets(e, data, "train").classes == [whole[i] for i in order]
