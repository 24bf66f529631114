"""A .pt2 file runs nothing of its own: each way by which torch would be made to is tried, and leaves no mark."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from explainer.errors import CheckpointError
from explainer.export.exporting import export
from explainer.export.program_check import _EXPRESSION
from explainer.inference.runtime import open_model
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum

Records = dict[str, bytes]
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="module")
def program(net: Explainer, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The records of an honest program."""
    path, _ = export(net, "torch_export", tmp_path_factory.mktemp("program"), dynamic_size=True)
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def written(records: Records, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"model/{name}", content)
    return path


def edited(content: bytes, change: Callable[[Any], None]) -> bytes:
    values = json.loads(content)
    change(values)
    return json.dumps(values).encode()


def pickled_weight(records: Records, mark: Path) -> None:
    def change(values: Any) -> None:
        next(iter(values["config"].values()))["use_pickle"] = True

    records[WEIGHTS] = edited(records[WEIGHTS], change)
    records["data/weights/weight_0"] = saved(mark)


def pickled_constant(records: Records, mark: Path) -> None:
    def change(values: Any) -> None:
        next(iter(values["config"].values()))["use_pickle"] = True

    records[CONSTANTS] = edited(records[CONSTANTS], change)
    records["data/constants/tensor_0"] = saved(mark)


def opaque_object(records: Records, mark: Path) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    records[CONSTANTS] = edited(records[CONSTANTS], lambda values: values["config"].update({"x": entry}))
    records["data/constants/opaque_obj_0"] = pickle.dumps(Payload(mark))


def opaque_object_under_another_name(records: Records, mark: Path) -> None:
    entry = {"path_name": "../constants/tensor_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    records[CONSTANTS] = edited(records[CONSTANTS], lambda values: values["config"].update({"x": entry}))
    records["data/constants/tensor_0"] = pickle.dumps(Payload(mark))


def legacy_weights(records: Records, mark: Path) -> None:
    records["data/weights/model.pt"] = saved(mark)


def legacy_constants(records: Records, mark: Path) -> None:
    records["data/constants/model.pt"] = saved(mark)


def example_inputs(records: Records, mark: Path) -> None:
    records["data/sample_inputs/model.pt"] = saved(mark)


def shared_library(records: Records, mark: Path) -> None:
    records["data/aotinductor/model/model.so"] = b"\x7fELF"


def size_expression(records: Records, mark: Path) -> None:
    def change(value: Any) -> None:
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            change(item)
        if isinstance(value, dict) and "expr_str" in value:
            value["expr_str"] = f"__import__('pathlib').Path({str(mark)!r}).touch() or 2"

    records["models/model.json"] = edited(records["models/model.json"], change)


def called(name: str) -> Callable[[Records, Path], None]:
    def attack(records: Records, mark: Path) -> None:
        def change(values: Any) -> None:
            values["graph_module"]["graph"]["nodes"][0]["target"] = name

        records["models/model.json"] = edited(records["models/model.json"], change)

    return attack


def saved(mark: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save((Payload(mark),), buffer)
    return buffer.getvalue()


ATTACKS = {
    attack.__name__: attack
    for attack in (
        pickled_weight,
        pickled_constant,
        opaque_object,
        opaque_object_under_another_name,
        legacy_weights,
        legacy_constants,
        example_inputs,
        shared_library,
        size_expression,
    )
} | {
    name: called(name)
    for name in (
        "torch.hub.load",
        "torch.load",
        "torch.ops.load_library",
        "_operator.attrgetter",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.add.__class__",
        "torch.ops.higher_order.cond",
        "#other.operator",
    )
}


@pytest.mark.parametrize("attack", list(ATTACKS.values()), ids=list(ATTACKS))
def test_a_hostile_program_is_refused_and_does_nothing(program: Records, tmp_path: Path, attack: Callable[[Records, Path], None]) -> None:
    records, mark = dict(program), tmp_path / "mark"
    attack(records, mark)
    path = written(records, tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match=r"was not opened, because opening it could run foreign code.*Export the model again"):
        open_model(path).run(np.zeros((1, 3, 32, 32), np.float32))
    assert not mark.exists()


def test_the_payload_would_run_otherwise(program: Records, tmp_path: Path) -> None:
    records, mark = dict(program), tmp_path / "mark"
    pickled_weight(records, mark)
    with contextlib.suppress(Exception):  # what the payload leaves is no tensor
        torch.export.load(written(records, tmp_path / "model.pt2"))
    assert mark.exists()


def test_the_older_archive_of_torch_is_refused(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_constants.pt", saved(mark))
    with pytest.raises(CheckpointError):
        open_model(path)
    assert not mark.exists()


def test_records_that_two_readers_might_understand_differently_are_refused(program: Records, tmp_path: Path) -> None:
    path = written(program, tmp_path / "model.pt2")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/weights/weight_0", b"x")
    with pytest.raises(CheckpointError, match="listed twice"):
        open_model(path)


def test_honest_programs_still_open(program: Records, net: Explainer, classifier: Explanandum, images: np.ndarray, tmp_path: Path) -> None:
    runtime = open_model(written(program, tmp_path / "model.pt2"))
    with torch.no_grad():
        assert np.abs(runtime.run(images)["masks"] - net(torch.from_numpy(images)).numpy()).max() < 1e-5
    path, report = export(net, "torch_export", tmp_path / "fused", fused=True, explanandum=classifier)
    assert report.max_difference < 1e-5 and open_model(path).run(images)["probabilities"].shape == (12, 3)


@pytest.mark.parametrize(
    "description", ["[]", "{}", '{"classes": 3, "outputs": ["masks"]}', '{"classes": ["a"], "outputs": ["masks"], "size": [0, 4]}']
)
def test_a_description_of_another_kind_is_refused(program: Records, tmp_path: Path, description: str) -> None:
    path = written({**program, "extra/explainer.json": description.encode()}, tmp_path / "model.pt2")
    with pytest.raises(CheckpointError, match="no usable description"):
        open_model(path)


@pytest.mark.parametrize(
    ("expression", "known"),
    [
        ("Symbol('s54', positive=True, integer=True)", True),
        ("Add(Mul(Integer(8), FloorDiv(Symbol('s1', integer=True), Integer(-8))), Float('1.5', precision=53))", True),
        ("2*s77 + Max(1, u0)", True),
        ("().__class__", False),
        ("exec(1)", False),
        ("Symbol('os.system')", False),
        ("lambda: 1", False),
    ],
)
def test_size_expressions(expression: str, known: bool) -> None:
    assert bool(_EXPRESSION.fullmatch(expression)) is known
