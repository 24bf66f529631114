"""The verdict after ``explain``, on a classifier whose evidence is one bright quarter of the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from explainer import Explanandum
from explainer.inference.formats import Array
from explainer.inference.judging import CHECKED, Judge

NAMES = ["bright", "dark"]


class Brightest(nn.Module):
    """Logit 8 (m - 0.5) of the brightest quarter's mean m for class 0, its opposite for class 1."""

    def forward(self, x: Tensor) -> Tensor:
        m = nn.functional.avg_pool2d(x.mean(1, keepdim=True), 8).flatten(1).amax(1)
        return torch.stack([8 * (m - 0.5), 8 * (0.5 - m)], dim=1)


def explanandum() -> Explanandum:
    return Explanandum(Brightest(), 2, "multilabel", mean=[0.0] * 3, std=[1.0] * 3, class_names=NAMES)


def pictures(number: int) -> list[tuple[Array, Array]]:
    """Black images with one white quarter, each time the next one, and the mask of it."""
    found = []
    for i in range(number):
        mask = np.zeros((16, 16), dtype=np.float32)
        y, x = divmod(i % 4, 2)
        mask[8 * y : 8 * y + 8, 8 * x : 8 * x + 8] = 1
        found.append((np.repeat(mask[None], 3, axis=0), mask))
    return found


def judged(number: int, masks: list[Array] | None = None, asked: bool = True) -> list[str]:
    judge = Judge(explanandum() if asked else None, NAMES, "black")
    for i, (image, mask) in enumerate(pictures(number)):
        judge.add(image, np.stack([1 - mask, mask if masks is None else masks[i]]), [1], ["dark", "bright"])
    return judge.sentences()


def test_exact_masks_keep_and_remove_their_class() -> None:
    # sigmoid(4) = 0.98 with the quarter, sigmoid(-4) = 0.02 without it; another picture's mask shows a black quarter and leaves the white.
    assert judged(8) == [
        "The classifier on 8 pictures, mean probability of the class shown: whole picture 0.98; only what the mask shows 0.98 (another "
        "picture's mask: 0.02); without it 0.02 (another's: 0.98)."
    ]
    assert judged(CHECKED + 8)[0].startswith(f"The classifier on {CHECKED} pictures")
    assert judged(8, asked=False) == [] == judged(3), "nobody to ask; too few to judge"


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((16, 16), dtype=np.float32), "WARNING: the masks are full: they cover 100.0 % of a picture on average (8 pictures)."),
        (np.zeros((16, 16), dtype=np.float32), "WARNING: the masks are empty: they cover 0.0 % of a picture on average (8 pictures)."),
        (np.full((16, 16), 0.5, dtype=np.float32), "WARNING: the masks are grey: 100 % of their values lie between 0.1 and 0.9."),
        (np.tri(16, dtype=np.float32), "WARNING: the masks of different pictures are alike (correlation 1.00)"),
    ],
)
def test_masks_that_are_the_same_everywhere_are_named(mask: Array, words: str) -> None:
    said = judged(8, [mask] * 8)
    assert any(s.startswith(words) for s in said)
    assert said[1].startswith("WARNING: the masks keep and remove their class no better than masks of other pictures do.")


def test_only_pictures_with_a_chosen_class_count_and_scores_are_not_paid_for() -> None:
    class Paid(Explanandum):
        differentiable = False  # type: ignore[assignment]

    paid = Paid(Brightest(), 2, "multilabel", mean=[0.0] * 3, std=[1.0] * 3, class_names=NAMES)
    for judge in (Judge(explanandum(), NAMES), Judge(paid, NAMES)):
        for image, mask in pictures(4):
            judge.add(image, mask[None], [] if judge.explanandum else [0], ["bright"])
        assert judge.sentences() == []


@pytest.mark.parametrize("batch_size", [1, 4])
def test_judging_passes_no_more_pictures_at_a_time_than_explaining(batch_size: int) -> None:
    asked = explanandum()
    seen: list[int] = []
    asked.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    judge = Judge(asked, NAMES, "black", batch_size)
    for image, mask in pictures(9):
        judge.add(image, mask[None], [0], ["bright"])
    assert len(judge.sentences()) == 1
    assert max(seen) <= max(batch_size, 2), "a picture is seen behind its mask and behind the inverse of it"
