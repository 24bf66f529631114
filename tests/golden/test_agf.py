"""AGF equals the published code: heat maps and the quantities of every layer."""

from __future__ import annotations

import pytest
import torch

from explainer.baselines.agf import AGF
from explainer.models.explanandum import Explanandum
from tests.golden.cases import load

CASES = ["agf_vgg_0", "agf_vgg_1_top", "agf_resnet_2", "agf_vgg_3_noA_noFx", "agf_vgg_4_gradcam", "agf_vgg_5_noReg_noM_noFdx"]
ABLATED = {"no_a": "A", "no_fx": "F_x", "no_fdx": "F_dx", "no_m": "M"}


@pytest.mark.filterwarnings("ignore:agf. the logit")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_heat_map_and_intermediates(name: str, dtype: torch.dtype) -> None:
    entry, arrays, net = load(name)
    explanandum = Explanandum(net.to(dtype), 5, mean=0.0, std=1.0)
    images = torch.from_numpy(arrays["in/x"]).to(dtype)
    method = AGF(explanandum, **entry["args"]["kwargs"])
    tolerance = entry["tolerance"]["suggest_" + str(dtype).removeprefix("torch.")]["atol_rel_to_max"]
    checked = 0
    for key, target in entry["args"]["targets"].items():
        target = explanandum(images).argmax(1) if target is None else torch.tensor(target)
        assert _error(method(images, target), arrays[f"out/heatmap_{key}"][:, 0]) <= tolerance
        record = method.intermediates(images, target)
        for path, expected in arrays.items():
            part = path.split("/")
            if len(part) != 4 or part[1] != key or part[3] in ("cam_in", "grad_out", "gradcam", "target_class"):
                continue
            if any(entry["args"]["kwargs"].get(option) and part[3] == term for option, term in ABLATED.items()):
                continue  # the reference also computes the terms that it leaves out
            assert _error(record[part[2]]["C" if part[3] == "flat" else part[3]], expected) <= max(tolerance, 1e-8), path
            checked += 1
    assert checked > 0 or name in ("agf_vgg_4_gradcam", "agf_vgg_5_noReg_noM_noFdx")


def _error(actual: torch.Tensor, expected) -> float:
    expected = torch.from_numpy(expected)
    return float((actual.double() - expected).abs().max() / expected.abs().max())
