"""Whether a .pt2 archive is data alone, asked before torch opens it: ``torch.export.load`` would run what a hostile one brings along.

torch unpickles every payload an archive marks so, loads the shared libraries in it, evaluates its size expressions as Python, and calls
whatever function of torch its graph names (``torch.hub.load`` among them). Here the archive must consist of the records that
``explainer export --format torch_export`` writes: raw tensors, a graph of aten operators and size arithmetic, and example inputs that
torch's restricted unpickler reads.
"""

from __future__ import annotations

import io
import re
import zipfile
from typing import Any

import torch

from explainer.errors import CheckpointError
from explainer.files import parse_json

GRAPH, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
CONFIGS = {"data/weights/model_weights_config.json": r"weight_\d+", "data/constants/model_constants_config.json": r"tensor_\d+"}
_RECORD = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)|extra/explainer\.json"
)
_ATEN = re.compile(r"torch\.ops\.aten\.([a-zA-Z]\w*|_[a-zA-Z]\w*)\.([a-zA-Z]\w*)")
_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)|"
    r"torch\.sym_(max|min|int|float|not|ite|sum)|math\.(ceil|floor|trunc|sqrt)"
)
_FILES = ("from_file",)  # the only aten operators that touch files
# What torch writes for a size: sympy constructors, whole numbers and symbols. torch evaluates it as Python, so nothing else may be in it.
_WORDS = (
    "Integer|Symbol|Add|Mul|Pow|Max|Min|Abs|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|IntTrueDiv|FloatTrueDiv|TruncToInt|"
    "TruncToFloat|RoundToInt|CeilToInt|FloorToInt|ToFloat|PowByNatural|Where|Identity|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Equality|Unequality|"
    "StrictLessThan|StrictGreaterThan|LessThan|GreaterThan|Piecewise|Rational|Float|floor|ceiling|true|false|True|False|oo|int_oo|"
    "positive|negative|nonnegative|integer|real|zero|finite|precision|[a-z]{1,2}\\d+"
)
_EXPRESSION = re.compile(rf"(?:(?<!\w)(?:{_WORDS})(?!\w)|'[a-z]{{1,2}}\d+'|'-?\d[\d.e+-]*'|(?<!\w)\d+(?:\.\d+)?(?!\w)|[-+*/%(),=<>!&|~ ])*")


def require_data_alone(content: bytes, path: Any) -> None:
    """Raise :class:`CheckpointError` unless the archive ``content``, read from ``path``, holds nothing that torch would execute."""
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))
        records = set(reader.get_all_records())
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            listed = [name.partition("/") for name in archive.namelist()]
        if len({root for root, _, _ in listed}) != 1 or len(set(listed)) != len(listed):
            raise _RefusedError("its records are listed twice or below more than one folder")
        if odd := sorted(name for name in {name for _, _, name in listed} | records if not _RECORD.fullmatch(name)):
            raise _RefusedError(f"it has the record {odd[0]!r} (a pickle, a library or an older format)")
        for config, names in CONFIGS.items():
            _payloads(parse_json(reader.get_record(config)), names)
        _graph(parse_json(reader.get_record(GRAPH)))
        inputs = reader.get_record(INPUTS)
    except _RefusedError as error:
        raise CheckpointError(_message(path, str(error))) from None
    except (RuntimeError, ValueError, OSError, zipfile.BadZipFile, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a program written by `explainer export --format torch_export` ({str(error).strip()[:200]})."
        ) from error
    try:
        if inputs:
            torch.load(io.BytesIO(inputs), weights_only=True)
    except Exception as error:  # the restricted unpickler raises many types; torch would now fall back to the unrestricted one
        raise CheckpointError(_message(path, "its example inputs are more than tensors and plain values")) from error


class _RefusedError(Exception):
    """Why an archive is not data alone."""


def _message(path: Any, reason: str) -> str:
    return (
        f"{path} was not opened, because opening it could run foreign code: {reason[:300]}. Export the model again with `explainer export "
        "--format torch_export`, or take its .onnx or .safetensors file."
    )


def _payloads(config: Any, names: str) -> None:
    entries = config.get("config") if isinstance(config, dict) else None
    if not isinstance(entries, dict):
        raise _RefusedError("its list of tensors is of an unknown kind")
    for key, entry in entries.items():
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise _RefusedError(f"the tensor {key!r} is stored as a pickle")
        if not re.fullmatch(names, str(entry.get("path_name"))):
            raise _RefusedError(f"the entry {key!r} is no plain tensor ({entry.get('path_name')!r})")


def _graph(value: Any) -> None:
    """Every operator, size expression and object anywhere in the serialised program."""
    if isinstance(value, list):
        for item in value:
            _graph(item)
    elif isinstance(value, dict):
        if "target" in value and not _is_operator(value["target"]):
            raise _RefusedError(f"its graph calls {value['target']!r}, which is no operator of torch.ops.aten")
        if "expr_str" in value and not (isinstance(value["expr_str"], str) and _EXPRESSION.fullmatch(value["expr_str"])):
            raise _RefusedError(f"its graph has the size expression {value['expr_str']!r}")
        for key, item in value.items():
            if key in ("as_operator", "as_custom_obj", "as_opaque_obj") and item is not None:
                raise _RefusedError(f"its graph holds an object ({key})")
            _graph(item)


def _is_operator(target: Any) -> bool:
    if not isinstance(target, str):
        return False
    if _ARITHMETIC.fullmatch(target):
        return True
    found = _ATEN.fullmatch(target)
    if found is None or found.group(1) in _FILES:
        return False
    return isinstance(getattr(getattr(torch.ops.aten, found.group(1), None), found.group(2), None), torch._ops.OpOverload)
