"""Rebuild the timm network of a transformer golden case and load its arrays.

    entry, arrays, net = load("cam_GradCAM_vit")

Keys of a case: in/<x> inputs, out/<x> what the reference returned, mid/<x> intermediate quantities, net/<x> weights. Token maps are
[grid_h, grid_w], row by row. Needs numpy, torch, timm.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

ROOT = Path(os.environ.get("GOLDEN_TRANSFORMERS_ROOT", Path(__file__).parent / "data" / "transformers"))
_CLASSES = {c.__name__: c for c in (VisionTransformer, VisionTransformerDistilled, SwinTransformer)}


def build_net(spec: dict[str, Any], state: dict[str, Any], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network of a manifest entry in eval mode. The weights are float16 values: the cast is exact."""
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in spec["args"].items()}
    net = _CLASSES[spec["class"]](**args).to(dtype).eval()
    own = net.state_dict()
    net.load_state_dict({k: torch.as_tensor(np.asarray(state[k])).to(v.dtype) if k in state else v for k, v in own.items()})
    return net


def manifest() -> dict[str, Any]:
    return json.loads((ROOT / "manifest.json").read_text())


def load(name: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], dict[str, Any], nn.Module]:
    """-> (manifest entry, arrays, network in eval mode)."""
    everything = manifest()
    entry = next(case for case in everything["cases"] if case["name"] == name)
    with np.load(ROOT / entry["file"]) as z:
        arrays = {key: z[key] for key in z.files}
    state = {key[4:]: value for key, value in arrays.items() if key.startswith("net/")}
    return entry, arrays, build_net(everything["networks"][entry["network"]], state, dtype)
