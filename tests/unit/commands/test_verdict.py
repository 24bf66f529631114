"""What ``fit`` says about a classifier, from planted counts."""

from __future__ import annotations

from explainer.commands.verdict import of_classifier
from explainer.tasks.class_report import ClassReport

NAMES = ("scratch", "dent", "free")


def test_a_classifier_that_always_answers_the_majority_class_is_told() -> None:
    confusion = ((0, 0, 3), (0, 0, 2), (0, 0, 15))
    weak, silent = of_classifier(ClassReport(NAMES, (3, 2, 15), (0, 0, 20), (0, 0, 15), confusion))
    assert weak.startswith("WARNING: the classifier is right for 75 % of the val images, always answering free for 75 %. It is no basis")
    assert silent == "WARNING: never predicted on the val images: scratch, dent."
    good = ((2, 0, 1), (0, 2, 0), (0, 0, 15))
    assert of_classifier(ClassReport(NAMES, (3, 2, 15), (2, 2, 16), (2, 2, 15), good)) == [] == of_classifier(None)


def test_multi_label_answers_are_weighed_against_no_answer() -> None:
    (weak,) = of_classifier(ClassReport(NAMES, (5, 5, 5), (4, 4, 4), (2, 2, 2), None))
    assert weak.startswith("WARNING: of 12 labels that the classifier gives the val images, 6 are right: answering that no class is there")
    assert of_classifier(ClassReport(NAMES, (5, 5, 5), (4, 4, 4), (3, 2, 2), None)) == []
