"""A model repository for NVIDIA Triton, and for KServe, which starts Triton on the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from explainer.errors import ExportError
from explainer.export.bundle import Bundle
from explainer.files import write_json, write_text
from explainer.inference.formats import ExportModel, ExportOptions, require

NAME = "explainer"
_LARGEST_BATCH = 32
_BATCHING = "dynamic_batching {\n  preferred_batch_size: [ 8 ]\n  max_queue_delay_microseconds: 2000\n}"
#: Element types of ONNX by their names in Triton's configuration; a model has no others.
_TYPES = {1: "TYPE_FP32", 7: "TYPE_INT64"}


class Triton(Bundle):
    """``triton/explainer/1/model.onnx`` and ``triton/explainer/config.pbtxt``: ``triton`` is the model repository.

    Names, types and dimensions are read from the ONNX graph. Requests are batched by the server. Beside the configuration lie
    ``labels.txt`` (class names in the order of the probabilities, which Triton's classification answers with) and ``model.json`` (how a
    picture becomes the input).
    """

    name = "triton"
    folder = "triton"

    def file_name(self, stem: str) -> str:
        """See :class:`ExportFormat`; Triton wants this name in a folder named by the version."""
        return f"{NAME}/1/model.onnx"

    def surround(self, model: ExportModel, path: Path, folder: Path, options: ExportOptions) -> None:
        """See :class:`Bundle`."""
        home, d = folder / NAME, model.description
        graph = require("onnx", "export").load_model(str(path), load_external_data=False).graph
        write_text(home / "config.pbtxt", configuration(graph))
        write_text(home / "labels.txt", "".join(" ".join(name.split()) + "\n" for name in d["classes"]))
        told = {key: d[key] for key in ("classes", "size", "image_size", "geometry", "outputs", "task", "threshold", "top", "weights")}
        write_json(home / "model.json", told)

    def use(self, name: str) -> list[str]:
        """See :class:`ExportFormat`."""
        return [
            f"This folder is a model repository of Triton: `tritonserver --model-repository=FOLDER` serves `{name}` as `{NAME}`. KServe",
            "starts the same server on the folder: `storageUri` in an InferenceService with the runtime `kserve-tritonserver`.",
            "",
            f"The input `image` is RGB in [0,1], float32, channels first; `{NAME}/model.json` says its size and how a picture is fitted to",
            "it. Preprocessing of the classifier is inside.",
        ]


def configuration(graph: Any) -> str:
    """``config.pbtxt`` of an ``onnx.GraphProto`` whose first dimension is the batch; -1 stands for any size."""
    parts = [f'name: "{NAME}"', 'platform: "onnxruntime_onnx"', f"max_batch_size: {_LARGEST_BATCH}"]
    parts += [_entry("input", value) for value in graph.input] + [_entry("output", value) for value in graph.output]
    return "\n".join([*parts, _BATCHING]) + "\n"


def _entry(kind: str, value: Any) -> str:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        raise ExportError(f"{kind} {value.name} has the ONNX element type {tensor.elem_type}, which this format does not know. Use onnx.")
    sides = ", ".join(str(dim.dim_value or -1) for dim in tensor.shape.dim[1:])
    lines = [f'name: "{value.name}"', f"data_type: {_TYPES[tensor.elem_type]}", f"dims: [ {sides} ]"]
    if value.name == "probabilities":
        lines.append('label_filename: "labels.txt"')
    return f"{kind} {{\n" + "".join(f"  {line}\n" for line in lines) + "}"
