"""The loss of classifiers, against hand-worked numbers and slow sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from explainer.errors import ConfigError
from explainer.losses.training import balanced_weights, classifier_loss


def test_without_options_it_is_torchs() -> None:
    torch.manual_seed(0)
    logits, hard = torch.randn(5, 4), F.one_hot(torch.tensor([0, 1, 3, 3, 2]), 4).float()
    assert torch.equal(classifier_loss(logits, hard, "multiclass"), F.cross_entropy(logits, hard))
    many = (torch.rand(5, 4) > 0.5).float()
    assert torch.equal(classifier_loss(logits, many, "multilabel"), F.binary_cross_entropy_with_logits(logits, many))
    torch.testing.assert_close(
        classifier_loss(logits, hard, "multiclass", label_smoothing=0.2), F.cross_entropy(logits, hard.argmax(1), label_smoothing=0.2)
    )
    w = torch.tensor([1.0, 2.0, 0.5, 4.0])
    torch.testing.assert_close(
        classifier_loss(logits, hard, "multiclass", class_weights=w), F.cross_entropy(logits, hard.argmax(1), weight=w)
    )


def test_focal_loss_by_hand() -> None:
    # Two classes, p = (0.8, 0.2) for an image of class 0 and (0.6, 0.4) for one of class 1; gamma 2:
    # 0.2^2 (-ln 0.8) = 0.0089257, 0.6^2 (-ln 0.4) = 0.3298647; weights 1 and 3: (0.0089257 + 3 * 0.3298647) / 4 = 0.2496299
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.6, 0.4]]))
    loss = classifier_loss(logits, torch.eye(2), "multiclass", class_weights=torch.tensor([1.0, 3.0]), gamma=2)
    assert float(loss) == pytest.approx((0.04 * -math.log(0.8) + 3 * 0.36 * -math.log(0.4)) / 4, rel=1e-5)
    assert float(loss) == pytest.approx(0.2496299, rel=1e-5)


def test_focal_loss_of_several_labels_is_the_slow_sum() -> None:
    torch.manual_seed(1)
    logits, targets, w = torch.randn(3, 4), (torch.rand(3, 4) > 0.5).float(), [1.0, 2.0, 0.5, 4.0]
    total = 0.0
    for b in range(3):
        for k in range(4):
            p, t = 1 / (1 + math.exp(-float(logits[b, k]))), 0.9 * float(targets[b, k]) + 0.05
            total += w[k] * t * (1 - p) ** 1.5 * -math.log(p) + (1 - t) * p**1.5 * -math.log(1 - p)
    loss = classifier_loss(logits, targets, "multilabel", class_weights=torch.tensor(w), gamma=1.5, label_smoothing=0.1)
    assert float(loss) == pytest.approx(total / 12, rel=1e-5)


def test_balanced_weights_by_hand() -> None:
    # 8 images, 6 of class 0 and 2 of class 1: 8 / (2 * 6) and 8 / (2 * 2), whose mean over the images is 1.
    assert balanced_weights(torch.tensor([6, 2]), 8, "multiclass").tolist() == pytest.approx([2 / 3, 2.0])
    assert balanced_weights(torch.tensor([20, 1, 1000]), 1001, "multilabel").tolist() == pytest.approx([981 / 20, 100.0, 0.01])
    assert balanced_weights(torch.tensor([6, 2]), 8, "multilabel").tolist() == pytest.approx([2 / 6, 6 / 2])
    with pytest.raises(ConfigError, match="none of class number 1"):
        balanced_weights(torch.tensor([6, 0]), 6, "multiclass")
