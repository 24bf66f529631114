"""What every per-image method promises; a new file in explainer/baselines is tested the day it appears."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import explainer
from explainer import plugins
from explainer.baselines import build
from explainer.errors import ConfigError, ShapeError, UnsupportedLayerError
from tests.contracts.networks import CLASSES, color_detector, tiny

METHODS = plugins.discover("explainer.baselines")
FAST_IGOS = {"size": 4, "iterations": 2, "points": 2, "step": 5.0}
# Cheap options for 16x16 images; a method that is not listed runs with its defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "extremal_perturbation": {"areas": (0.1, 0.3), "max_iterations": 8},
    "gradient_shap": {"samples": 4},
    "igos": FAST_IGOS,
    "igos_pp": FAST_IGOS,
    "integrated_gradients": {"steps": 6},
    "meaningful_perturbation": {"iterations": 4},
    "occlusion": {"window": 4, "stride": 4},
    "rise": {"n_masks": 16, "grid": 3},
    "smooth_grad": {"samples": 4},
}
INSIDE = {"guided_filter": "srd"}  # the method that a filter's default options put inside speaks for itself
# Methods that have no rule for a product of two activations and must say so.
NO_RULE_FOR_PRODUCTS = {
    "agf",
    "clrp",
    "contrastive_excitation_backprop",
    "deeplift_shap",
    "excitation_backprop",
    "guided_filter",
    "lrp",
    "lrp_alpha_beta",
    "lrp_zplus",
    "rap",
    "sglrp",
    "srd",
}
ALL = pytest.mark.parametrize("name", sorted(METHODS))
WITH_ATTENTION = pytest.mark.parametrize("name", sorted(n for n, c in METHODS.items() if c.needs_attention))
WITHOUT_ATTENTION = pytest.mark.parametrize("name", sorted(n for n, c in METHODS.items() if not c.needs_attention))
# Methods for attention find planted evidence in a trained transformer: test_planted.py.
SPECIFIC = pytest.mark.parametrize(
    "name", sorted(n for n, c in METHODS.items() if c.class_specific and not c.needs_masks and not c.needs_attention)
)


def homes(name: str) -> tuple[str, str]:
    """The networks that a method is tried on."""
    return ("vit", "torchvision_vit") if METHODS[name].needs_attention else ("vgg", "resnet")


ON_NETWORKS = pytest.mark.parametrize(("name", "architecture"), [(name, home) for name in sorted(METHODS) for home in homes(name)])


@functools.cache
def images(dtype: torch.dtype = torch.float64, count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


@functools.cache
def object_masks(dtype: torch.dtype = torch.float64, count: int = 2) -> Tensor:
    return (torch.rand(count, CLASSES, 16, 16, generator=torch.Generator().manual_seed(8)) > 0.5).to(dtype)


def method(name: str, classifier: explainer.Explanandum) -> Any:
    return build(name, classifier, **OPTIONS.get(name, {}))


def explain(attributor: Any, x: Tensor, class_index: Any, **options: Any) -> Tensor:
    """Call a method, with ground truth where it asks for it."""
    masks = object_masks(x.dtype, 2)[: len(x)] if attributor.needs_masks else None
    return attributor(x, class_index, masks=masks, **options)


@functools.cache
def reference(name: str, architecture: str | None = None, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Maps of classes 1 and 2 for the two images."""
    return explain(method(name, tiny(architecture or homes(name)[0], dtype, seed)), images(dtype), [1, 2])


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


# ------------------------------------------------------------------------------------------------ results


@ON_NETWORKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shape_dtype_and_finite(name: str, architecture: str, dtype: torch.dtype) -> None:
    maps = reference(name, architecture, dtype)
    assert maps.shape == (2, 16, 16)
    assert maps.dtype == dtype
    assert not maps.requires_grad
    assert maps.isfinite().all()


@ON_NETWORKS
def test_batch_of_two_equals_two_singles(name: str, architecture: str) -> None:
    together = reference(name, architecture)
    attributor = method(name, tiny(architecture))
    masks = object_masks() if attributor.needs_masks else None
    for i, k in enumerate((1, 2)):
        alone = attributor(images()[i : i + 1], k, masks=None if masks is None else masks[i : i + 1])
        assert_same(alone[0], together[i])


@ALL
def test_all_classes_equals_one_class_at_a_time(name: str) -> None:
    attributor = method(name, tiny(homes(name)[0]))
    masks = object_masks() if attributor.needs_masks else None
    maps = attributor.all_classes(images(), masks=masks)
    assert maps.shape == (2, CLASSES, 16, 16)
    for k in range(CLASSES):
        assert_same(maps[:, k], attributor(images(), k, masks=masks))
    assert_same(attributor.all_classes(images(), [2, 0], masks=masks), maps[:, [2, 0]])


@ALL
def test_same_generator_same_map(name: str) -> None:
    attributor = method(name, tiny(homes(name)[0]))
    first, second, other = (explain(attributor, images(), [1, 2], generator=torch.Generator().manual_seed(s)) for s in (5, 5, 6))
    assert torch.equal(first, second)
    torch.rand(3)  # the global generator has no say
    assert_same(explain(attributor, images(), [1, 2]), reference(name))
    assert torch.equal(first, other) == METHODS[name].deterministic, f"{name}.deterministic is {METHODS[name].deterministic}"


@ALL
def test_works_inside_no_grad(name: str) -> None:
    with torch.no_grad():
        assert_same(explain(method(name, tiny(homes(name)[0])), images(), [1, 2]), reference(name))


# ------------------------------------------------------------------------------------------------ facts


@ALL
def test_signed(name: str) -> None:
    maps = torch.cat([reference(name, architecture, torch.float64, seed) for architecture in homes(name) for seed in range(3)])
    if METHODS[name].signed:
        assert maps.min() < 0, f"{name} says that its maps are signed, but six networks gave no negative value"
    else:
        assert maps.min() >= 0, f"{name} says that its maps are not signed"


@ALL
def test_class_specific(name: str) -> None:
    maps = [explain(method(name, tiny(homes(name)[0])), images(), k) for k in range(CLASSES)]
    same = torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
    assert same != METHODS[name].class_specific


class Detached(nn.Module):
    """A classifier through which nothing can be differentiated."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inner(x)


@ALL
def test_needs_gradients(name: str) -> None:
    classifier = tiny(homes(name)[0])
    classifier.classifier = Detached(classifier.classifier)
    if not METHODS[name].needs_gradients:
        assert_same(explain(method(name, classifier), images(), [1, 2]), reference(name))
        return
    with contextlib.suppress(Exception):  # which error is torch's business; the same map would contradict the fact
        assert not torch.allclose(explain(method(name, classifier), images(), [1, 2]), reference(name)), f"{name} needs no gradients"


# What 32x32 pixels and a real search need.
PLANTED: dict[str, dict[str, Any]] = {
    "extremal_perturbation": {"areas": (0.1,), "iterations": 100, "perturbation": "fade", "step": 2, "sigma": 4},
    "igos": {"size": 8, "iterations": 10, "points": 5, "fill": "black", "l2": 1.0, "noise": 0.02},
    "igos_pp": {"size": 8, "iterations": 8, "points": 5, "fill": "black", "l2": 1.0, "noise": 0.02, "step": 100.0},
    "meaningful_perturbation": {"iterations": 60},
    "rise": {"n_masks": 500, "grid": 7, "p": 0.3},
}
# Deconvnet ignores which ReLUs were on, so it also draws what the forward pass did not use (Mahendran & Vedaldi 2016).
BLIND = {"deconvnet"}


def ranking(values: Tensor, area: Tensor) -> float:
    """Probability that a pixel inside the area ranks above one outside, ties counting half; maps are smoothed over 5x5 pixels."""
    smooth = F.avg_pool2d(values[None], 5, stride=1, padding=2, count_include_pad=False)[0]
    inside, outside = smooth[area][:, None], smooth[~area]
    return ((inside > outside).double() + (inside == outside).double() / 2).mean().item()


@SPECIFIC
def test_finds_the_planted_evidence(name: str) -> None:
    """A red and a green patch on grey: the class's patch ranks above the rest of the image, the other class's patch included."""
    x = torch.full((1, 3, 32, 32), 0.3, dtype=torch.float64)
    x[:, 0, 4:12, 4:12] = 1.0
    x[:, 1, 20:28, 18:26] = 1.0
    areas = torch.zeros(2, 32, 32, dtype=torch.bool)
    areas[0, 4:12, 4:12] = True
    areas[1, 20:28, 18:26] = True
    classifier = color_detector()
    maps = build(name, classifier, **{**OPTIONS.get(name, {}), **PLANTED.get(name, {})})(x.expand(2, -1, -1, -1), [0, 1])
    found = [ranking(maps[k], areas[k]) for k in range(2)]
    for rival in ("centre", "random"):
        by_chance = [ranking(build(rival, classifier)(x, 0)[0], area) for area in areas]
        assert all(f > c + 0.15 for f, c in zip(found, by_chance, strict=True)) or name in BLIND, f"{name} {found}, {rival} {by_chance}"


# ------------------------------------------------------------------------------------------------ the model is left as it was


@contextlib.contextmanager
def unchanged(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Fail if the block changes anything of the model, the images or torch's global state."""
    tables = [name for name in vars(nn.Module()) if name.endswith("hooks")]

    def state() -> dict[str, Any]:
        modules = list(model.named_modules())
        return {
            "modules": [(path, id(m), type(m)) for path, m in modules],
            "modes": [m.training for _, m in modules],
            "attributes": [sorted(vars(m)) for _, m in modules],
            "inplace": [getattr(m, "inplace", None) for _, m in modules],
            "hooks": [list(getattr(m, t).items()) for _, m in modules for t in tables],
            "forward overrides": [m.__dict__.get("forward") for _, m in modules],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grad": [(id(p.grad), p.grad is not None and p.grad.tolist()) for p in model.parameters()],
            "identity": [id(t) for t in (*model.parameters(), *model.buffers())],
            "versions": [t._version for t in (*model.parameters(), *model.buffers())],
            "values": [t.tolist() for t in (*model.parameters(), *model.buffers())],
            "global random state": torch.get_rng_state().tolist(),
            "grad mode": torch.is_grad_enabled(),
            "images": (x.requires_grad, x.grad, x.tolist()),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
            "default dtype": torch.get_default_dtype(),
        }

    before = state()
    try:
        yield
    finally:
        for what, value in state().items():
            if what != "versions":  # in-place writes that restore a value are allowed
                assert value == before[what], f"{what} changed"


def lived_in(architecture: str) -> explainer.Explanandum:
    """A classifier whose user has set gradients, flags, modes, a hook and a forward override of his own."""
    classifier = tiny(architecture)
    network = classifier.classifier
    parameters = list(network.parameters())
    parameters[0].requires_grad_(True)
    parameters[0].grad = torch.ones_like(parameters[0])
    parameters[-1].grad = torch.full_like(parameters[-1], 2.0)
    last = next(m for m in reversed(list(network.modules())) if isinstance(m, nn.Linear))
    original = last.forward
    last.forward = lambda x: original(x)  # type: ignore[method-assign]
    network.register_forward_hook(lambda module, args, output: None)
    next(m for m in network.modules() if isinstance(m, (nn.ReLU, nn.GELU))).training = True
    return classifier


@ON_NETWORKS
def test_leaves_the_model_as_it_was(name: str, architecture: str) -> None:
    classifier, x = lived_in(architecture), images().clone().requires_grad_()
    attributor = method(name, classifier)
    with unchanged(classifier, x):
        explain(attributor, x, [1, 2])
        attributor.all_classes(x, [0], masks=object_masks())


class BlownError(Exception):
    """What a classifier of the user's may raise."""


class Fuse:
    """Blows on the call with the given number, in the forward or backward pass of one module."""

    def __init__(self, module: nn.Module, backward: bool) -> None:
        self.calls, self.limit, self.error = 0, 0, Exception
        if backward:
            self.handle = module.register_forward_hook(self.watch)
        else:
            self.handle = module.register_forward_pre_hook(lambda module, args: self.count())

    def watch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: self.count())

    def count(self) -> None:
        self.calls += 1
        if self.calls == self.limit:
            raise self.error("fuse")

    def arm(self, limit: int, error: type[BaseException]) -> None:
        self.calls, self.limit, self.error = 0, limit, error  # type: ignore[assignment]


@ALL
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("error", [BlownError, KeyboardInterrupt])
def test_leaves_the_model_as_it_was_after_an_exception(name: str, backward: bool, error: type[BaseException]) -> None:
    home = homes(name)[0]
    classifier, x = lived_in(home), images().clone()
    forward_at, backward_at = ("blocks.1", "blocks.1.norm2") if home == "vit" else ("features.3", "classifier.3")
    fuse = Fuse(classifier.classifier.get_submodule(backward_at if backward else forward_at), backward)
    explain(method(name, classifier), x, [1, 2])
    calls = fuse.calls
    for limit in sorted({1, (calls + 1) // 2, calls}) if calls else ():
        attributor = method(name, classifier)
        fuse.arm(limit, error)
        with unchanged(classifier, x), pytest.raises(error, match="fuse"):
            explain(attributor, x, [1, 2])
        fuse.arm(0, error)
        assert_same(explain(attributor, x, [1, 2]), reference(name))


# ------------------------------------------------------------------------------------------------ errors


@ALL
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (lambda x: (x[0], 0), ShapeError, "images must be"),
        (lambda x: ((x * 255).byte(), 0), ShapeError, "images must be"),
        (lambda x: (x[:0], 0), ShapeError, "B >= 1"),
        (lambda x: (x * 255, 0), ShapeError, r"lie in \[0,1\], received values .* Divide images in 0\.\.255 by 255"),
        (
            lambda x: (torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.nan, x), 0),
            ShapeError,
            r"positions \[1\] in the batch",
        ),
        (lambda x: (x, CLASSES), ConfigError, "class_index must lie in"),
        (lambda x: (x, -1), ConfigError, "class_index must lie in"),
        (lambda x: (x, [0, 1, 2]), ShapeError, "one integer per image"),
        (lambda x: (x, torch.tensor([0.0, 1.0])), ShapeError, "one integer per image"),
    ],
)
def test_wrong_arguments(name: str, arguments: Callable[[Tensor], tuple], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        method(name, tiny(homes(name)[0]))(*arguments(images()), masks=object_masks())


@ALL
def test_unknown_option(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no option 'no_such_option'"):
        build(name, tiny(homes(name)[0]), no_such_option=1)


@WITHOUT_ATTENTION
def test_unsupported_layer_is_named(name: str) -> None:
    """A gate multiplies two activations: a method either handles it, or names the layer, itself and an alternative."""
    attributor = method(name, tiny("gated"))
    if name not in NO_RULE_FOR_PRODUCTS:
        assert explain(attributor, images(), [1, 2]).isfinite().all()
        return
    with pytest.raises(UnsupportedLayerError) as caught:
        explain(attributor, images(), [1, 2])
    message = str(caught.value)
    assert message.startswith(INSIDE[name]) if name in INSIDE else name in message, message
    assert "features.3" in message or "Gate" in message, message
    assert any(other in message for other in METHODS if other != name), message


@WITH_ATTENTION
def test_without_attention_is_refused_with_methods_that_work_there(name: str) -> None:
    with pytest.raises(UnsupportedLayerError, match="attention") as caught:
        explain(method(name, tiny("vgg")), images(), [1, 2])
    message = str(caught.value)
    offered = [other for other in METHODS if f" {other}," in message or f" {other}." in message]
    assert name in message, message
    assert "TinyVGG" in message, message
    assert len(offered) > 2, message
    for other in offered:
        explain(method(other, tiny("vgg")), images(), [1, 2])


@WITH_ATTENTION
def test_unsupported_operation_in_a_transformer_is_named(name: str) -> None:
    """A gate of tokens: read past by the methods that look at attention alone, named by those that need a rule for it."""
    attributor = method(name, tiny("gated_vit"))
    if name in {"attention_rollout", "attention_grad_cam", "generic_attention"}:
        assert explain(attributor, images(), [1, 2]).isfinite().all()
        return
    with pytest.raises(UnsupportedLayerError, match=rf"{name}.*'blocks\.1\.norm1\.1' \(TokenGate\)") as caught:
        explain(attributor, images(), [1, 2])
    assert any(other in str(caught.value) for other in METHODS if other != name)


@ALL
def test_wrong_layer_is_answered_with_the_list(name: str) -> None:
    try:
        plugins.check_options(METHODS[name], {"layer": "x"})
    except ConfigError:
        return  # has no layer option
    options = {k: v for k, v in OPTIONS.get(name, {}).items() if k != "areas"}
    with pytest.raises(ConfigError, match=r"no_such_layer.*features\.3"):
        explain(build(name, tiny(homes(name)[0]), **{**options, "layer": "no_such_layer"}), images(), [1, 2])


@pytest.mark.gpu
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_device(name: str, dtype: torch.dtype) -> None:
    attributor = method(name, tiny(homes(name)[0], dtype).cuda())
    masks = object_masks(dtype).cuda() if attributor.needs_masks else None
    maps = attributor(images(dtype).cuda(), [1, 2], masks=masks)
    assert maps.device.type == "cuda"
    assert maps.dtype == dtype
    if dtype == torch.float64:
        assert_same(maps.cpu(), reference(name), 1e-6)
