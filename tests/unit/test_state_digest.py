"""The digest that identifies weights: known values stay, and everything that matters changes it."""

import hashlib

import torch

from explainer.inference.formats import fingerprint
from explainer.tensors import state_digest


def test_by_hand():
    state = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[3]], dtype=torch.int64), "c": torch.zeros(0)}
    text = b"start" + b"a torch.int64 (1, 1)" + (3).to_bytes(8, "little")
    text += b"b torch.float32 (2,)" + bytes.fromhex("0000803f000000c0") + b"c torch.float32 (0,)"
    assert state_digest(state, "start") == hashlib.sha256(text).hexdigest()[:16]


def test_layout_and_order_do_not_count_and_all_else_does():
    weight = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    first = state_digest({"a": weight, "b": weight})
    assert first == state_digest({"b": weight, "a": weight.to(memory_format=torch.channels_last)})
    others = ({"a": weight}, {"a": weight, "c": weight}, {"a": weight, "b": weight.double()}, {"a": weight, "b": weight.flatten()})
    assert first not in {state_digest(other) for other in others}
    changed = weight.clone()
    changed[1, 2, 3, 4] += 1e-6
    assert first != state_digest({"a": weight, "b": changed}) and first != state_digest({"a": weight, "b": weight}, "x")
    module = torch.nn.Linear(2, 2)
    assert fingerprint(module) == state_digest(module.state_dict())
