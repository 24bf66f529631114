"""``torch.export`` programs (.pt2): run with torch alone, without this package's code."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch

from explainer.errors import CheckpointError, ExportError
from explainer.export.program_check import require_data_alone
from explainer.files import parse_json
from explainer.inference.classifier import Given
from explainer.inference.formats import Array, ExportFormat, ExportModel, ExportOptions, Runtime, check_batch, named
from explainer.inference.predictor import answered, check_description

_EXTRA = "explainer.json"


def trace(model: ExportModel, options: ExportOptions) -> torch.export.ExportedProgram:
    """The module as a graph with a free batch size and, if asked, free height and width."""
    axis = torch.export.Dim.DYNAMIC
    shape = {0: axis, 2: axis, 3: axis} if options.dynamic_size else {0: axis}
    # Traced at a size that is no multiple of the stride, so that the padding and cropping are in the graph; both do nothing elsewhere.
    height, width = (_indivisible(options.size[0], model.stride), _indivisible(options.size[1], model.stride) + 2 * model.stride)
    example = torch.rand(2, 3, *((height, width) if options.dynamic_size else options.size), generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model.module.eval(), (example,), dynamic_shapes=(shape,), strict=False)
    except Exception as error:  # torch.export raises many types
        hint = "Export with a fixed size (no --dynamic_size)" if options.dynamic_size else "Use --format safetensors: it needs no graph"
        raise ExportError(f"torch.export could not trace the model: {' '.join(str(error).split())[:400]} {hint}.") from error


def _indivisible(size: int, stride: int) -> int:
    """A size near ``size`` of which neither it nor its half is a multiple of the stride (stride 1: just odd)."""
    size = max(size, 2 * stride) // stride * stride
    return size + max(1, stride // 2) + 1


class TorchProgram(Runtime):
    """A loaded program. Its shape guards are off: they describe the example size; the graph itself is right for every size.

    Raises:
        CheckpointError: missing, damaged, foreign, or holding more than data (:mod:`explainer.export.program_check`).
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        extra: dict[str, Any] = {_EXTRA: ""}
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}). Export again with --format torch_export.") from error
        require_data_alone(content, path)
        try:
            program = torch.export.load(io.BytesIO(content), extra_files=extra)  # the very bytes that were checked
            self._module = program.module(check_guards=False)
            self.description = check_description(parse_json(extra[_EXTRA]), path)
        except CheckpointError:
            raise
        except Exception as error:  # torch.export.load raises many types for damaged files
            raise CheckpointError(
                f"{path} is not a program written by `explainer export --format torch_export` ({str(error)[:200]})."
            ) from error
        if threads is not None:
            torch.set_num_threads(threads)
        self._path = path

    def run(self, images: Array) -> dict[str, Array]:
        """See :class:`Runtime`."""
        check_batch(images, self.size)
        with torch.inference_mode():
            outputs = self.description["outputs"]
            return answered(lambda: named(outputs, self._module(torch.from_numpy(images))), self.description, images, self._path)


class TorchExport(ExportFormat):
    """``model.pt2``."""

    name = "torch_export"
    suffix = ".pt2"

    def write(self, model: ExportModel, path: Path, options: ExportOptions) -> None:
        """See :class:`ExportFormat`."""
        self.check(options)
        # Through memory: torch's own writer ends the process when the disk is full.
        content = io.BytesIO()
        torch.export.save(trace(model, options), content, extra_files={_EXTRA: json.dumps(model.description)})
        path.write_bytes(content.getbuffer())

    def open(self, path: Path, threads: int | None = None, given: Given | None = None) -> TorchProgram:
        """See :class:`ExportFormat`."""
        return TorchProgram(path, threads)
