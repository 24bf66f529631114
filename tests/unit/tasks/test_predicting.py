"""Masks of a split as files."""

import gc
import weakref

import numpy as np
import pytest
import torch

from explainer.losses.base import build_terms
from explainer.tasks.predicting import PredictionWriter, file_names
from explainer.tensors import Batch


def test_no_two_images_share_a_file():
    ids = ["a/b", "a_b", "A/b", "c/d", "e"]
    names = file_names(ids)
    assert names["c/d"] == "c_d" and names["e"] == "e"
    assert len({n.casefold() for n in names.values()}) == 5 and names["a/b"].startswith("a_b-")
    assert names == file_names(ids[::-1]), "the order does not matter"


def batch_of(*ids):
    return Batch(torch.zeros(len(ids), 3, 4, 4), torch.zeros(len(ids), 2), None, None, ids)


def test_batches_are_written_and_forgotten(tmp_path):
    writer = PredictionWriter(tmp_path / "out", file_names(["x/1", "x_1", "y"]))
    masks = torch.rand(2, 2, 4, 4)
    last = weakref.ref(masks)
    expected = masks.half().numpy()
    writer.on_predict_batch_end(None, None, masks, batch_of("x/1", "y"), 0)
    del masks
    gc.collect()
    assert last() is None, "nothing is kept"
    writer.on_predict_batch_end(None, None, torch.tensor([[1.0, -2.0]]).bfloat16(), batch_of("x_1"), 1)
    assert writer.written == 3
    found = {}
    for path in (tmp_path / "out").iterdir():
        with np.load(path) as content:
            found[str(content["id"])] = {k: content[k] for k in content.files if k != "id"}
    assert set(found) == {"x/1", "x_1", "y"}
    assert found["x/1"]["masks"].dtype == np.float16 and (found["x/1"]["masks"] == expected[0]).all()
    assert (found["y"]["masks"] == expected[1]).all() and found["x_1"]["logits"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("name", ["ranking", "order"])
def test_a_trained_order_is_kept(tmp_path, name):
    """1 - 2e-5 and 1 - 3e-5 are the same number in float16."""
    task = type("Task", (), {"terms": build_terms({"distillation": {}, name: {}})})()
    writer = PredictionWriter(tmp_path, file_names(["a"]))
    masks = torch.tensor([[[[1 - 2e-5, 1 - 3e-5]]]])
    writer.on_predict_batch_end(None, task, masks, batch_of("a"), 0)
    with np.load(tmp_path / "a.npz") as content:
        found = content["masks"]
    assert found.dtype == np.float32 and found[0, 0, 0] > found[0, 0, 1]
