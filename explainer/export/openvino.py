"""OpenVINO (.xml and .bin): fp32, fp16 weights, int8 through NNCF. Converted from the ONNX graph, which is already checked."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from explainer.errors import CheckpointError, ExportError
from explainer.export.edge_layers import edge_layers
from explainer.export.onnx import convert
from explainer.files import parse_json
from explainer.inference.classifier import Given
from explainer.inference.formats import Array, ExportFormat, ExportModel, ExportOptions, Runtime, check_batch, require
from explainer.inference.predictor import answered, check_description

_LAYERS = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")


class OpenVinoRuntime(Runtime):
    """A compiled model on the CPU. Arithmetic is float32 (the plug-in's own default is bfloat16 on some machines: 4e-3 off)."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        openvino = require("openvino", "openvino")
        core = openvino.Core()
        try:
            model = core.read_model(str(path))
            settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
            if threads is not None:
                settings["INFERENCE_NUM_THREADS"] = threads
            self._model = core.compile_model(model, "CPU", settings)
            self.description: dict[str, Any] = check_description(parse_json(model.get_rt_info(["explainer"]).astype(str)), path)
        except CheckpointError:
            raise
        except Exception as error:  # openvino raises RuntimeError and its own types
            raise CheckpointError(
                f"{path} is not a model written by `explainer export --format openvino`, or its .bin is missing ({str(error)[:200]})."
            ) from error
        self._path = path

    def run(self, images: Array) -> dict[str, Array]:
        """See :class:`Runtime`."""
        check_batch(images, self.size)

        def compute() -> dict[str, Array]:
            values = self._model(np.ascontiguousarray(images))
            return {name: np.array(values[name]) for name in self.description["outputs"]}

        return answered(compute, self.description, images, self._path)


class OpenVino(ExportFormat):
    """``model.xml`` with ``model.bin``."""

    name = "openvino"
    suffix = ".xml"
    extra = "openvino"
    precisions = ("fp32", "fp16", "int8")

    def write(self, model: ExportModel, path: Path, options: ExportOptions) -> None:
        """See :class:`ExportFormat`."""
        self.check(options)
        openvino = require("openvino", "openvino")
        onnx = require("onnx", "export")
        with tempfile.TemporaryDirectory() as folder:
            source = str(Path(folder) / "model.onnx")
            onnx.save_model(convert(model, options), source)
            try:
                converted = openvino.convert_model(source)
            except Exception as error:  # a conversion rule may be missing
                raise ExportError(f"OpenVINO could not convert the model ({str(error)[:300]}). Use --format onnx.") from error
            if options.precision == "int8":
                converted = _quantized(converted, options)
            converted.set_rt_info(json.dumps(model.description), ["explainer"])
            openvino.save_model(converted, str(path), compress_to_fp16=options.precision == "fp16")

    def open(self, path: Path, threads: int | None = None, given: Given | None = None) -> OpenVinoRuntime:
        """See :class:`ExportFormat`."""
        return OpenVinoRuntime(path, threads)


def _quantized(model: Any, options: ExportOptions) -> Any:
    """Post-training quantisation; NNCF reads activations' ranges from the calibration images. First and last layers stay float."""
    nncf = require("nncf", "openvino")
    images = options.calibration
    assert images is not None
    nodes = model.get_ordered_ops()
    parents = {n.get_friendly_name(): [v.get_node().get_friendly_name() for v in n.input_values()] for n in nodes}
    edges = edge_layers(parents, {n.get_friendly_name() for n in nodes if n.get_type_name() in _LAYERS})
    with contextlib.redirect_stdout(io.StringIO()):
        return nncf.quantize(
            model, nncf.Dataset([image[None] for image in images]), subset_size=len(images), ignored_scope=nncf.IgnoredScope(names=edges)
        )
