"""ONNX (.onnx): dynamo exporter, opset 20, free batch size; fp16 weights; int8 by onnxruntime's static quantisation (QDQ)."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from explainer.errors import ExportError
from explainer.export.edge_layers import edge_layers
from explainer.export.torch_export import trace
from explainer.inference.classifier import Given
from explainer.inference.formats import Array, ExportFormat, ExportModel, ExportOptions, Runtime, check_batch, require
from explainer.inference.predictor import Predictor

OPSET = 20
INPUT = "image"
_LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_QUANTIZED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Add", "Concat", "MaxPool", "GlobalAveragePool", "AveragePool")
_MIN_HALF = 64  # smaller constants (sizes, scales, normalisation) stay in float32: no space is saved and shapes stay exact


class OnnxRuntime(Runtime):
    """A session of onnxruntime, through the torch-free :class:`Predictor`."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        require("onnxruntime", "export")
        self._predictor = Predictor(path, threads=threads)
        self.description = self._predictor.description

    def run(self, images: Array) -> dict[str, Array]:
        """See :class:`Runtime`."""
        check_batch(images, self.size)
        return self._predictor.run(images)


class Onnx(ExportFormat):
    """``model.onnx``."""

    name = "onnx"
    suffix = ".onnx"
    extra = "export"
    precisions = ("fp32", "fp16", "int8")

    def write(self, model: ExportModel, path: Path, options: ExportOptions) -> None:
        """See :class:`ExportFormat`."""
        self.check(options)
        onnx = require("onnx", "export")
        proto = convert(model, options)
        if options.precision == "fp16":
            half_weights(proto)
        elif options.precision == "int8":
            assert options.calibration is not None
            proto = quantize(proto, options.calibration)
        del proto.metadata_props[:]
        values = {"explainer": json.dumps(model.description), "classes": json.dumps(model.description.get("classes", []))}
        onnx.helper.set_model_props(proto, values)
        onnx.save_model(proto, str(path))

    def open(self, path: Path, threads: int | None = None, given: Given | None = None) -> OnnxRuntime:
        """See :class:`ExportFormat`."""
        return OnnxRuntime(path, threads)


def convert(model: ExportModel, options: ExportOptions) -> Any:
    """The float32 model as an ``onnx.ModelProto``."""
    require("onnx", "export")
    require("onnxscript", "export")
    program = trace(model, options)
    try:
        with _quiet():
            onnx_program = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, verbose=False, input_names=[INPUT], output_names=list(model.outputs)
            )
        assert onnx_program is not None
        return with_whole_factors(onnx_program.model_proto)
    except Exception as error:  # the exporter wraps whatever its passes raise
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ExportError(
            f"the ONNX exporter failed: {' '.join(lines[-3:])[:400]} Use --format torch_export, or a fixed size (without --dynamic_size)."
        ) from error


def with_whole_factors(proto: Any) -> Any:
    """Bilinear enlargement by a whole factor says the factor instead of the size: onnxruntime then keeps its fast layout of channels,
    which is three times as fast and spares two changes of layout.
    """
    import onnx
    from onnx import numpy_helper

    values = [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]
    sides = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][2:] for v in values}
    for node in proto.graph.node:
        if node.op_type != "Resize" or len(node.input) != 4:
            continue
        before, after = sides.get(node.input[0], []), sides.get(node.output[0], [])
        if len(before) != 2 or len(after) != 2 or 0 in (*before, *after) or any(b % a for a, b in zip(before, after, strict=True)):
            continue
        factors = np.array([1, 1, *(b // a for a, b in zip(before, after, strict=True))], dtype=np.float32)
        scales = numpy_helper.from_array(factors, f"{node.output[0]}_scales")
        proto.graph.initializer.append(scales)
        node.input[:] = [node.input[0], "", scales.name]
    _drop_unused(proto.graph)
    onnx.checker.check_model(proto)
    return proto


def _drop_unused(graph: Any) -> None:
    """Leave out nodes and constants that nobody reads (the sizes that factors have replaced): onnxruntime would compute them."""
    while True:
        read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
        kept = [node for node in graph.node if read.intersection(node.output)]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    constants = [constant for constant in graph.initializer if constant.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)


def half_weights(proto: Any) -> None:
    """Store float32 weights as float16 and cast them when the model is loaded: half the file, float32 arithmetic on every device."""
    import onnx
    from onnx import numpy_helper

    casts = []
    for tensor in proto.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims, initial=1) < _MIN_HALF:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        limit = float(np.finfo(np.float16).max)
        tensor.CopyFrom(numpy_helper.from_array(np.clip(values, -limit, limit).astype(np.float16), name + "_half"))
        casts.append(onnx.helper.make_node("Cast", [name + "_half"], [name], name=name + "_cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def quantize(proto: Any, images: Array) -> Any:
    """Static int8 quantisation with scales per channel, activations' ranges from ``images``; sigmoid, normalisation, first and last layers
    (:func:`~explainer.export.edge_layers.edge_layers`) stay float.
    """
    import onnx

    require("onnxruntime", "export")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = [{INPUT: image[None]} for image in images]

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._rest = iter(batches)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._rest, None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, ready, done = (str(Path(folder) / name) for name in ("plain.onnx", "ready.onnx", "done.onnx"))
        onnx.save_model(proto, plain)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        nodes = list(onnx.load_model(ready).graph.node)
        makers = {tensor: node.name for node in nodes for tensor in node.output}
        parents = {node.name: [makers[t] for t in node.input if t in makers] for node in nodes}
        quantization.quantize_static(
            ready,
            done,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTIZED),
            nodes_to_exclude=edge_layers(parents, {node.name for node in nodes if node.op_type in _LAYERS}),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load_model(done)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' progress notes."""
    root = logging.getLogger()
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    before, levels = root.level, [logging.getLogger(n).level for n in names]
    try:
        root.setLevel(max(before, logging.ERROR))
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before)
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
