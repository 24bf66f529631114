"""Weights, ONNX files and selectors, whole and mutated."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import explainer
from explainer.models.checkpoints import load_explanandum, read_weights
from explainer.models.explainer import Explainer
from explainer.models.explanandum import Explanandum
from tests.integration.fuzz_mutations import NASTY, Case, alternately, bytewise, each, mutated_tree, replaced, valuewise

VALUES: list[Any] = [*NASTY, "shapes", "mean", [1, 2], {"weight": "x"}, "!!python/name:os.system", [[0, 1], [0, 2]], 3.5, -0.5]


# ---------------------------------------------------------------------- weights
def small_network() -> Explainer:
    torch.manual_seed(0)
    names = ("red", "green", "blue")
    return Explainer("vgg_unet", 3, {"widths": [4, 4], "decoder_channels": [4]}, names, image_size=16, stride=4)


def small_classifier() -> Explanandum:
    from explainer.models.classifiers import SmallVGG

    torch.manual_seed(1)
    return Explanandum(SmallVGG(3, (4, 4)), 3, class_names=("red", "green", "blue"), input_size=16)


def _model_files(folder: Path) -> list[Path]:
    """A training checkpoint, a plain state_dict and an export folder's two files."""
    from safetensors.torch import save_file

    net = small_network()
    state = {f"explainer.{k}": v for k, v in net.state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"kind": "explainer", "explainer": net.config, "fingerprint": "0" * 16}, "epoch": 1}
    torch.save(content, folder / "run.ckpt")
    torch.save({k: v.clone() for k, v in net.state_dict().items()}, folder / "plain.pt", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"explainer": net.config, "fingerprint": "0" * 16, "task": "multilabel"}))
    return [folder / name for name in ("run.ckpt", "plain.pt", "model.safetensors", "config.json")]


def checkpoints(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """Files of weights in their bytes; what a checkpoint and an export folder say in their values."""
    files = _model_files(folder)
    classifier = functools.partial(load_explanandum, arch="small_vgg", options={"widths": [4, 4]}, num_classes=3)

    def read(path: Path) -> None:
        each(lambda: read_weights(path), lambda: explainer.load(path), lambda: classifier(path))

    exported = functools.partial(explainer.load, folder / "model.safetensors")
    return alternately(
        *(bytewise([path], functools.partial(read, path), random) for path in files[:3]),
        bytewise([files[3]], exported, random),
        valuewise(files[3], exported, random),
        _nonsense(folder, classifier, random),
    )


def _nonsense(folder: Path, classifier: Callable[[Path], object], random: np.random.Generator) -> Iterator[Case]:
    """Checkpoints that unpickle well and hold nonsense."""
    path = folder / "odd.ckpt"
    content = torch.load(folder / "run.ckpt", weights_only=True)
    plain = {**content, "state_dict": dict.fromkeys(content["state_dict"], 0)}

    def use(tree: dict[str, Any]) -> None:
        torch.save(tree, path)
        each(lambda: explainer.load(path), lambda: classifier(path))

    yield "nothing", functools.partial(use, content)
    while True:
        tree = mutated_tree(plain, random, VALUES)
        if isinstance(tree.get("state_dict"), dict):
            tree["state_dict"] = {k: content["state_dict"].get(k, v) if v == 0 else v for k, v in tree["state_dict"].items()}
        yield f"{tree.get('hyper_parameters')}"[:1500], functools.partial(use, tree)


# ---------------------------------------------------------------------- ONNX
def _onnx_model() -> Any:
    """One convolution that gives masks, with the description that an export has."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["image", "w"], ["logits"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[1, 1]),
            helper.make_node("Sigmoid", ["logits"], ["masks"]),
        ],
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["B", 3, 16, 16])],
        [helper.make_tensor_value_info("masks", TensorProto.FLOAT, ["B", 3, 16, 16])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    from explainer.inference.formats import DESCRIPTION

    values = {"format": DESCRIPTION, "classes": ["red", "green", "blue"], "outputs": ["masks"], "size": [16, 16], "image_size": 16}
    helper.set_model_props(model, {"explainer": json.dumps({**values, "precision": "fp32", "threshold": 0.5, "geometry": "squash"})})
    return model


def _other_graph(random: np.random.Generator) -> tuple[str, bytes]:
    """One value of the graph is another."""
    from onnx import helper

    model = _onnx_model()
    conv, numbers = model.graph.node[0], (-1, 0, 2, 1000, 2**31, 2**62)
    number = numbers[int(random.integers(len(numbers)))]
    kind = int(random.integers(8))
    if kind == 0:
        attribute = conv.attribute[int(random.integers(len(conv.attribute)))]
        attribute.ints[int(random.integers(len(attribute.ints)))] = number
    elif kind == 1:
        model.graph.initializer[0].dims[int(random.integers(4))] = number
    elif kind == 2:
        conv.op_type = ("Loop", "Nothing", "Resize", "ConstantOfShape", "If")[int(random.integers(5))]
    elif kind == 3:
        model.opset_import[0].version = number
    elif kind == 4:
        entry = model.graph.initializer[0].external_data.add()
        entry.key, entry.value = "location", "../../../../etc/passwd"
        model.graph.initializer[0].data_location = 1
        model.graph.initializer[0].ClearField("raw_data")
    elif kind == 5:
        (model.graph.input, model.graph.output)[int(random.integers(2))][0].type.tensor_type.shape.dim[2].dim_value = number
    elif kind == 6:
        model.graph.node.append(helper.make_node("Identity", ["masks"], ["image" if random.random() < 0.5 else "masks"]))
    else:
        model.graph.output[0].name = ("logits", "image", "none", "w")[int(random.integers(4))]
    return f"graph, {kind}: {number}", model.SerializeToString()


def onnx_files(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """An exported model as ``explain`` and the Predictor read it, and as a classifier that gives scores."""
    from explainer.inference.predictor import Predictor
    from explainer.inference.runtime import open_model

    path, pixels = folder / "model.onnx", np.random.default_rng(1).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    images = np.full((1, 3, 16, 16), 0.5, np.float32)
    model = _onnx_model()
    path.write_bytes(model.SerializeToString())

    def masks() -> None:
        each(lambda: Predictor(path, threads=1)(pixels), lambda: open_model(path, 1).run(images))

    def scores() -> None:
        options = {"arguments": {"threads": 1}, "cache_size": 0}
        load_explanandum(None, f"onnx:{path}", options, 3, class_names=("a", "b", "c"))(torch.from_numpy(images))

    def graphs() -> Iterator[Case]:
        yield "nothing", masks
        while True:
            what, content = _other_graph(random)
            yield what, replaced(path, content, lambda: each(masks, scores))

    def descriptions() -> Iterator[Case]:
        yield "nothing", masks
        description = json.loads(model.metadata_props[0].value)
        while True:
            changed = _onnx_model()
            changed.metadata_props[0].value = json.dumps(mutated_tree(description, random, NASTY))
            yield changed.metadata_props[0].value[:1500], replaced(path, changed.SerializeToString(), masks)

    return alternately(bytewise([path], lambda: each(masks, scores), random), graphs(), descriptions())


# ---------------------------------------------------------------------- small files
def selectors(folder: Path, random: np.random.Generator) -> Iterator[Case]:
    """A calibrated selector, as ``explain`` uses it."""
    from explainer.inference.selection import Selector

    path, judged = folder / "selector.json", small_classifier()
    Selector(0.5, 0.1, "marginal", None, 20, classifier=judged.fingerprint(), refinement={"iterations": 3}).save(path)

    def use() -> None:
        selector = Selector.load(path)
        selector.require_same_pipeline({"weights": "x", "precision": "fp32"}, judged, 0.5, str(path))
        assert selector.accepts(torch.tensor([0.2, 0.9])).shape == (2,)

    return alternately(bytewise([path], use, random), valuewise(path, use, random))
