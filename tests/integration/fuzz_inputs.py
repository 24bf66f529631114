"""Every kind of input that is mutated, by name."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.integration.fuzz_data import TARGETS, configurations, data_set, pictures
from tests.integration.fuzz_models import checkpoints, onnx_files, selectors
from tests.integration.fuzz_mutations import Case, Kind
from tests.integration.fuzz_requests import requests
from tests.integration.fuzz_stores import databases, results, run_files


def _misbehaving(behave: Callable[[], object], folder: Path, random: np.random.Generator) -> Iterator[Case]:
    yield "nothing", bool
    while True:
        yield "nothing else", behave


#: What a use must not do, to try the bounds themselves.
FAULTS: dict[str, Kind] = {
    "sleeping": functools.partial(_misbehaving, functools.partial(time.sleep, 60)),
    "greedy": functools.partial(_misbehaving, functools.partial(bytes, 2**31)),
    "dying": functools.partial(_misbehaving, functools.partial(os._exit, 3)),
    "raw": functools.partial(_misbehaving, functools.partial({}.__getitem__, "key")),
}
KINDS: dict[str, Kind] = {
    "pictures": pictures,
    **{name: functools.partial(data_set, name) for name in TARGETS},
    "configurations": configurations,
    "checkpoints": checkpoints,
    "onnx_files": onnx_files,
    "selectors": selectors,
    "results": results,
    "run_files": run_files,
    "databases": databases,
    "requests": requests,
}
