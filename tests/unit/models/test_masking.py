import pytest
import torch

from explainer.errors import ShapeError
from explainer.models.masking import aggregate


def test_maximum_over_present_and_absent_classes():
    masks = torch.rand(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    m, n = aggregate(masks, targets)
    torch.testing.assert_close(m[0], torch.maximum(masks[0, 0], masks[0, 2]))
    torch.testing.assert_close(n[0], torch.maximum(masks[0, 1], masks[0, 3]))
    torch.testing.assert_close(m[1], masks[1, 3])
    torch.testing.assert_close(n[1], masks[1, :3].amax(dim=0))


def test_no_label_and_all_labels():
    masks = torch.rand(2, 3, 4, 4)
    m, n = aggregate(masks, torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    assert m[0].abs().max() == 0 and n[1].abs().max() == 0
    torch.testing.assert_close(n[0], masks[0].amax(dim=0))


def test_shapes_are_named():
    with pytest.raises(ShapeError, match=r"\[B,K,H,W\].*\(2, 3, 4, 4\) and \(2, 5\)"):
        aggregate(torch.rand(2, 3, 4, 4), torch.zeros(2, 5))
