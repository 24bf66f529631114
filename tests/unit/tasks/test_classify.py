"""Classifiers that cannot be trained, or are broken, are answered in words."""

from __future__ import annotations

import pytest
import torch

from explainer.config import ClassifierConfig
from explainer.data.datamodule import DataModule
from explainer.errors import CheckpointError, ConfigError, NumericalError
from explainer.tasks.classify import ClassifyTask


def test_one_class_with_one_label_an_image_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the data has one class \(crack\) and one label an image"):
        ClassifyTask(ClassifierConfig(options={"widths": [4]}), 1, "multiclass", ("crack",))


@pytest.mark.parametrize("stage", ["fit", "val"])
def test_broken_weights_are_not_chosen_as_the_best(stage: str) -> None:
    """The last step of a training can break them: no later step says so."""
    data = DataModule("shapes", 2, options={"size": 32, "length": 2})
    task = ClassifyTask(ClassifierConfig(options={"widths": [4]}), data.num_classes, data.task, data.class_names)
    torch.nn.utils.vector_to_parameters(torch.full((sum(p.numel() for p in task.parameters()),), torch.nan), task.parameters())
    with pytest.raises(NumericalError, match=rf"the classification loss is nan in {stage}\. .*optimizer\.lr is 0\.0001"):
        task._shared_step(next(iter(data.val_dataloader())), stage)


def test_a_checkpoint_that_does_not_fit_is_answered_in_a_sentence() -> None:
    small = ClassifyTask(ClassifierConfig(options={"widths": [4]}), 2, "multiclass", ("a", "b"))
    wide = ClassifyTask(ClassifierConfig(options={"widths": [8]}), 2, "multiclass", ("a", "b"))
    with pytest.raises(ConfigError, match=r"do not fit this classifier \(\d+ keys differ.*Use the classifier section it was trained with"):
        small.on_load_checkpoint({"state_dict": wide.state_dict()})
    with pytest.raises(CheckpointError, match="a checkpoint of an Explainer, expected one of a classifier"):
        small.on_load_checkpoint({"state_dict": {}, "hyper_parameters": {"kind": "explainer"}})
    with pytest.raises(ConfigError, match="received tuple"):
        small._shared_step((torch.rand(2, 3, 8, 8), torch.zeros(2)), "fit")  # type: ignore[arg-type]
