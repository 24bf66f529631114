"""The guided filter against its definition window by window, and the method around another one."""

from __future__ import annotations

import pytest
import torch

from explainer import Explanandum
from explainer.attribution.map_cache import method_key, shares_work
from explainer.baselines import build
from explainer.baselines.kernels.maps import guided_filter, smooth_map
from explainer.errors import ConfigError, UnknownNameError, UnsupportedLayerError
from explainer.models.families import FAMILIES
from tests.contracts.networks import tiny


def looped(image: torch.Tensor, target: torch.Tensor, radius: int, eps: float) -> torch.Tensor:
    """Every window's ridge regression of the map on the image (its slopes shrunk by eps, its offset not), averaged where they overlap."""
    C, height, width = image.shape
    total, count = torch.zeros(height, width, dtype=image.dtype), torch.zeros(height, width, dtype=image.dtype)
    windows = {}
    for y in range(height):
        for x in range(width):
            box = (slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1))
            guide, values = image[:, *box].flatten(1).T, target[box].flatten()
            n = len(guide)
            design = torch.cat([guide, torch.ones(n, 1, dtype=image.dtype)], 1)
            ridge = n * eps * torch.eye(C + 1, dtype=image.dtype)
            ridge[C, C] = 0.0
            windows[y, x] = torch.linalg.solve(design.T @ design + ridge, design.T @ values)
    for (y, x), line in windows.items():
        for v in range(max(0, y - radius), min(height, y + radius + 1)):
            for u in range(max(0, x - radius), min(width, x + radius + 1)):
                total[v, u] += line[:C] @ image[:, v, u] + line[C]
                count[v, u] += 1
    return total / count


def test_every_window_is_a_ridge_regression() -> None:
    g = torch.Generator().manual_seed(0)
    images, maps = torch.rand(2, 3, 7, 6, generator=g, dtype=torch.float64), torch.rand(2, 7, 6, generator=g, dtype=torch.float64)
    expected = torch.stack([looped(i, m, 2, 0.01) for i, m in zip(images, maps, strict=True)])
    torch.testing.assert_close(guided_filter(maps, images, 2 / 7, 0.01), expected)
    torch.testing.assert_close(guided_filter(maps, images, 1e-6, 0.01)[0], looped(images[0], maps[0], 1, 0.01))


def test_a_map_that_is_a_colour_stays_and_a_flat_image_only_blurs() -> None:
    g = torch.Generator().manual_seed(1)
    images = torch.rand(1, 3, 12, 12, generator=g, dtype=torch.float64)
    torch.testing.assert_close(guided_filter(images[:, 1], images, 0.25, 1e-12), images[:, 1], atol=1e-6, rtol=0)
    maps = torch.zeros(1, 12, 12, dtype=torch.float64)
    maps[0, 5, 6] = 1.0
    blurred = guided_filter(maps, torch.full_like(images, 0.3), 1 / 12, 1e-3)
    expected = torch.tensor([1.0, 2, 3, 2, 1], dtype=torch.float64)  # two box means of width 3
    torch.testing.assert_close(blurred[0, 3:8, 4:9], expected.outer(expected) / 81)


def test_relevance_stays_in_the_object_that_it_lies_in() -> None:
    """A bright square on a dark ground, a relevant pixel beside its border: a Gaussian crosses the border, the filter turns back there and
    spreads inside instead."""
    images = torch.full((1, 3, 32, 32), 0.1)
    images[..., 8:20, 8:20] = 0.9
    maps = torch.zeros(1, 32, 32)
    maps[0, 12, 9] = 1.0
    blurred = smooth_map(maps, 0.06)
    found = guided_filter(blurred, images, 0.125, 1e-3)[0]
    blurred = blurred[0]
    assert blurred[12, 7] > 0.5 * blurred[12, 9], "what the filter is for"
    assert found[12, 7] < 0.35 * found[12, 9] and found[7, 9] < found[8, 9] * 0.5
    assert found[16, 16] > 0.1 * found[12, 9] and blurred[16, 16] < 0.001 * blurred[12, 9], "it spreads where the colour does"


def test_it_is_the_other_method_filtered() -> None:
    explanandum = tiny("vgg")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inner = build("grad_cam", explanandum, interpolation="nearest")(images, [1, 2]).clamp_min(0)
    by_hand = guided_filter(smooth_map(inner, 0.1), images, 0.2, 0.01).clamp_min(0)
    options = {"method": "grad_cam", "options": {"interpolation": "nearest"}, "smooth": 0.1, "radius": 0.2, "eps": 0.01}
    torch.testing.assert_close(build("guided_filter", explanandum, **options)(images, [1, 2]), by_hand)
    plain = build("guided_filter", explanandum, **(options | {"smooth": 0.0, "radius": 0.0}))
    torch.testing.assert_close(plain(images, [1, 2]), inner)
    assert not build("guided_filter", explanandum, method="occlusion").needs_gradients and plain.needs_gradients
    rise = build("guided_filter", explanandum, method="rise", options={"n_masks": 5})
    assert not rise.deterministic and plain.deterministic and shares_work(rise)
    assert not shares_work(build("guided_filter", explanandum, method="gradient"))
    torch.testing.assert_close(rise.all_classes(images, [2, 0])[:, 0], rise(images, 2))


def test_stored_maps_belong_to_the_method_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    from explainer.baselines.guided_filter import GuidedFilter
    from explainer.baselines.srd import SRD

    plain = method_key("guided_filter", GuidedFilter, {})
    assert method_key("guided_filter", GuidedFilter, {"method": "srd", "options": {}}) == plain
    typed = {"method": "srd", "options": {"start": "paper"}, "radius": 0.125}
    assert method_key("guided_filter", GuidedFilter, typed) == plain, "typing defaults out is no other method"
    assert method_key("guided_filter", GuidedFilter, {"method": "grad_cam"})["inner"]["name"] == "grad_cam"
    monkeypatch.setattr(SRD, "revision", SRD.revision + 1)
    assert method_key("guided_filter", GuidedFilter, {}) != plain


def test_several_maps_of_an_image_are_filtered_as_each_alone() -> None:
    several, images = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    each = torch.stack([guided_filter(several[:, k], images, 0.2, 0.01) for k in range(3)], dim=1)
    torch.testing.assert_close(guided_filter(several, images, 0.2, 0.01), each)


def test_errors() -> None:
    explanandum = tiny("vgg")
    for wrong in ({"smooth": -1}, {"radius": -0.1}, {"eps": 0}):
        with pytest.raises(ConfigError, match="guided_filter: smooth and radius are shares"):
            build("guided_filter", explanandum, **wrong)
    with pytest.raises(ConfigError, match="another method"):
        build("guided_filter", explanandum, method="guided_filter")
    with pytest.raises(UnknownNameError, match="no_such"):
        build("guided_filter", explanandum, method="no_such")
    with pytest.raises(ConfigError, match="eps must be positive"):
        guided_filter(torch.rand(1, 4, 4), torch.rand(1, 3, 4, 4), 0.2, 0.0)


def test_a_refusal_of_the_method_inside_says_how_to_take_another() -> None:
    """SRD has no rule for attention over windows."""
    model = Explanandum(FAMILIES["Swin (timm)"].build(3), 3)
    with pytest.raises(UnsupportedLayerError, match=r"^srd cannot share .* guided_filter takes any of them: method: grad_cam\.$"):
        build("guided_filter", model)(torch.rand(1, 3, 64, 64), 0)
    assert build("guided_filter", model, method="grad_cam")(torch.rand(1, 3, 64, 64), 0).shape == (1, 64, 64)
