"""The RTIS objective against the published code: every part, the sum, the gradient, and its blurred alternative image."""

import pytest
import torch

from explainer.fills import alternative_fill, blend
from explainer.losses.base import Explanation
from explainer.losses.rtis import RTIS, destroyer_loss, preserver_loss
from explainer.losses.total_variation import total_variation
from explainer.models.masking import aggregate
from tests.golden.cases import load
from tests.golden.test_losses import DTYPES, close


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("name", ["rtis_0", "rtis_1"])
def test_objective(name, dtype, tolerance):
    entry, arrays, net = load(name)
    net, w = net.to(dtype), entry["args"]["weights"]
    image, other = (torch.as_tensor(arrays[f"in/{k}"]).to(dtype) for k in ("image", "alternative_image"))
    targets = torch.as_tensor(arrays["out/targets"]).to(dtype)
    logits = torch.as_tensor(arrays["in/segmentations"]).to(dtype).requires_grad_()
    masks = logits.sigmoid()
    target, rest = aggregate(masks, targets)
    through, inverse = net(torch.cat([blend(image, target, other), blend(image, 1 - target, other)])).chunk(2)
    close(through, arrays["out/logits_mask"], tolerance)
    close(inverse, arrays["out/logits_inverse"], tolerance)
    close(total_variation(target, "reflect", power=2), arrays["out/tv"], tolerance)
    close(preserver_loss(through, targets), arrays["out/preserver"], tolerance)
    close(destroyer_loss(inverse, targets, power=1.0), arrays["out/destroyer"], tolerance)
    e = Explanation(image, targets, masks, target, rest, through, inverse, targets, "multilabel", None, [])
    term = RTIS(tv=w["tv"], area=w["area"], preserver=w["preserver"], destroyer=w["destroyer"], power=w["destroyer_power"])
    close(term.value(e), arrays["out/loss"], tolerance)
    close(torch.autograd.grad(term.value(e), logits)[0], arrays["out/grad_segmentations"], tolerance)


def test_blurred_alternative():
    _, arrays, _ = load("rtis_0")
    # The case's image is already normalised: mean 0, std 1.
    made = alternative_fill(torch.as_tensor(arrays["in/image"]).double(), torch.zeros(3), torch.ones(3), kind="blur")
    close(made, arrays["in/alternative_image"], 1e-5)  # the reference made it in float32
