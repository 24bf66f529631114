"""Recall, precision and confusion of every class."""

from __future__ import annotations

import csv
from pathlib import Path

import torch

from explainer.config import ClassifierConfig
from explainer.tasks.class_report import ClassReport
from explainer.tasks.classify import ClassifyTask
from explainer.tensors import Batch


def test_by_hand(tmp_path: Path) -> None:
    # True a: 3 right, 1 as b. True b: 2 as a. c: never there, once predicted for a b.
    report = ClassReport.single_label(("a", "b", "c"), torch.tensor([[3, 1, 0], [2, 0, 1], [0, 0, 0]]))
    assert report.support == (4, 3, 0) and report.predicted == (5, 1, 1)
    assert report.recall[:2] == (0.75, 0.0) and report.recall[2] != report.recall[2]
    assert report.precision == (0.6, 0.0, 0.0)
    assert [row[-1] for row in report.table()[1:]] == ["b (1)", "a (2)", ""]
    files = report.save(tmp_path, "test")
    assert [f.name for f in files] == ["classes_test.csv", "confusion_test.csv"]
    with files[1].open() as file:
        assert list(csv.reader(file))[2] == ["b", "2", "0", "1"]


def run(task: str, outputs: torch.Tensor, targets: torch.Tensor) -> ClassReport:
    """The report of a task whose classifier answers ``outputs``."""
    mine = ClassifyTask(ClassifierConfig(options={"widths": [4]}), 3, task, ("a", "b", "c")).eval()  # type: ignore[arg-type]
    mine.classifier = torch.nn.Module()
    mine.classifier.forward = lambda images: outputs  # type: ignore[method-assign]
    mine.log = mine.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    mine.validation_step(Batch(torch.rand(len(outputs), 3, 8, 8), targets, ids=("x",) * len(outputs)), 0)
    mine.on_validation_epoch_end()
    assert mine.report is not None
    return mine.report


def test_single_label_task_reports_it() -> None:
    targets = torch.eye(3)[[0, 0, 1, 2]]
    report = run("multiclass", torch.eye(3)[[0, 1, 1, 1]] * 5, targets)
    assert report.confusion == ((1, 1, 0), (0, 1, 0), (0, 1, 0)) and report.recall == (0.5, 1.0, 0.0)


def test_multi_label_task_reports_it() -> None:
    targets = torch.tensor([[1.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    report = run("multilabel", torch.tensor([[2.0, -2, -2], [-2, 2, -2], [-2, -2, 2]]), targets)
    assert report.support == (2, 1, 1) and report.predicted == (1, 1, 1) and report.right == (1, 0, 1)
    assert report.recall == (0.5, 0.0, 1.0) and report.precision == (1.0, 0.0, 1.0) and report.confusion is None
