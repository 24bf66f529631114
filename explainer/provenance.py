"""What a result depends on: versions, configuration, fingerprints, hardware."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch

import explainer

PACKAGES = ("torch", "torchvision", "torchmetrics", "segmentation-models-pytorch", "captum", "numpy")


def versions() -> dict[str, str]:
    """Versions of everything that decides numbers."""
    found = {"explainer": explainer.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def hardware(device: str) -> dict[str, Any]:
    """The machine, without its name."""
    cuda = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": cuda,
    }


def provenance(config: Mapping[str, Any], fingerprints: Mapping[str, Any], device: str, world: int, seconds: float) -> dict[str, Any]:
    """All of it as JSON values.

    Args:
        config: the resolved configuration.
        fingerprints: fingerprints of classifier, data and methods.
        device: where it ran.
        world: number of processes.
        seconds: wall time of this run (a resumed run counts its last part).
    """
    return {
        "versions": versions(),
        "config": dict(config),
        "fingerprints": dict(fingerprints),
        "hardware": {**hardware(device), "processes": world},
        "seconds": round(seconds, 1),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
