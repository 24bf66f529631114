"""What every metric promises, whichever file it is in. A metric's inputs are found by the names of its ``values``."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torch
from torch import nn

from explainer import plugins
from explainer.metrics.base import PerClassMetric, PerImageMetric
from explainer.models.explanandum import Explanandum

B, K, SIDE = 6, 4, 12
METRICS = plugins.discover("explainer.metrics")
PER_IMAGE = {name: cls for name, cls in METRICS.items() if issubclass(cls, PerImageMetric)}
# Smaller than the defaults, so that the whole file runs in seconds on 12x12 images.
OPTIONS = {
    "fidelity": {"subsets": 12, "subset_size": 20},
    "stability": {"samples": 3},
    "infidelity": {"samples": 5},
    "max_sensitivity": {"samples": 3},
    "deletion": {"steps": 4},
    "insertion": {"steps": 4},
    "pointing_game": {"tolerance": 2.0},
}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, K)).double()
    explanandum = Explanandum(network, num_classes=K, task="multilabel", mean=0.4, std=0.25)
    targets = torch.eye(K)[torch.arange(B) % K]
    targets[::2, 3] = 1
    return {
        "explanandum": explanandum,
        "attributor": lambda images, index: (images * torch.arange(1, 4).view(1, 3, 1, 1)).sum(1) * (1 + index)[:, None, None],
        "images": rand(B, 3, SIDE, SIDE),
        "mask": rand(B, SIDE, SIDE),
        "saliency": rand(B, SIDE, SIDE) - 0.3,
        "least_saliency": rand(B, SIDE, SIDE),
        "other_saliency": rand(B, SIDE, SIDE),
        "class_masks": rand(B, K, SIDE, SIDE),
        "area_masks": (rand(B, 1, SIDE, SIDE) < torch.tensor([0.05, 0.1, 0.2, 0.4, 0.6, 1.0]).view(1, 6, 1, 1)).double(),
        "truth": (rand(B, SIDE, SIDE) < 0.3).double(),
        "void": rand(B, SIDE, SIDE) < 0.1,
        "class_truth": (rand(B, K, SIDE, SIDE) < 0.2).double(),
        "class_index": torch.arange(B) % K,
        "targets": targets,
    }


def build(cls, **kwargs):
    options = dict(OPTIONS.get(cls.name, {}))
    if "num_classes" in inspect.signature(cls).parameters:
        options["num_classes"] = K
    return cls(**options, **kwargs)


def arguments(cls, inputs, rows=slice(None), update=False):
    names = list(inspect.signature(cls.values).parameters)[1:]
    if update and issubclass(cls, PerClassMetric):
        names.append("class_index")
    missing = set(names) - set(inputs)
    assert not missing, f"{cls.name} asks for {missing}, which the vocabulary of explainer.metrics.base does not have"
    return {name: inputs[name][rows] if isinstance(inputs[name], torch.Tensor) else inputs[name] for name in names}


def same(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    else:
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("cls", METRICS.values(), ids=METRICS)
def test_states_its_facts(cls):
    assert cls.higher_is_better in (True, False, None)
    assert cls.__doc__ and ("range" in cls.__doc__.lower() or "[0,1]" in cls.__doc__), "the docstring tells the range"
    assert cls.name.islower() and cls.name.isidentifier()


@pytest.mark.parametrize("cls", PER_IMAGE.values(), ids=PER_IMAGE)
def test_values_are_per_image_within_bounds_and_do_not_depend_on_the_batch(cls, inputs):
    metric = build(cls)
    values = metric.values(**arguments(cls, inputs))
    assert values.shape == (B, *metric.total.shape) or (issubclass(cls, PerClassMetric) and values.shape == (B,))
    defined = values[~values.isnan()]
    assert len(defined), "the example defines the metric for some image"
    low, high = cls.bounds
    assert float(defined.min()) >= low - 1e-12 and float(defined.max()) <= high + 1e-12
    assert cls.optimum is None or low <= cls.optimum <= high
    alone = torch.cat([metric.values(**arguments(cls, inputs, slice(i, i + 1))) for i in range(B)])
    torch.testing.assert_close(alone, values, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert int(metric.used.sum()) == 0, "values() changes no state"


@pytest.mark.parametrize("cls", PER_IMAGE.values(), ids=PER_IMAGE)
def test_total_is_the_mean_and_merges_over_two_processes(cls, inputs):
    single, left, right = build(cls), build(cls), build(cls)
    single.update(**arguments(cls, inputs, slice(0, 4), update=True))
    single.update(**arguments(cls, inputs, slice(4, 6), update=True))
    left.update(**arguments(cls, inputs, slice(0, 1), update=True))
    right.update(**arguments(cls, inputs, slice(1, 6), update=True))
    left.merge_state(right)
    same(left.compute(), single.compute())
    for state in ("total", "used", "excluded"):
        same(getattr(left, state), getattr(single, state))
    values = single.values(**arguments(cls, inputs))
    if values.ndim == 1:
        assert int(single.used.sum()) == int((~values.isnan()).sum())
        assert int(single.used.sum() + single.excluded.sum()) == B
        same(single.total.sum(), values.nansum())


@pytest.mark.parametrize("cls", PER_IMAGE.values(), ids=PER_IMAGE)
def test_forward_gives_the_batch_and_keeps_the_total(cls, inputs):
    whole, stepwise, last = build(cls), build(cls), build(cls)
    whole.update(**arguments(cls, inputs, update=True))
    last.update(**arguments(cls, inputs, slice(3, 6), update=True))
    stepwise(**arguments(cls, inputs, slice(0, 3), update=True))
    same(stepwise(**arguments(cls, inputs, slice(3, 6), update=True)), last.compute())
    same(stepwise.compute(), whole.compute())


@pytest.mark.parametrize("cls", PER_IMAGE.values(), ids=PER_IMAGE)
def test_two_connected_processes(cls, inputs):
    """The synchronisation of torchmetrics, with a second process that holds the same numbers."""
    metric = build(cls, dist_sync_fn=lambda tensor, group: [tensor, tensor.clone()], distributed_available_fn=lambda: True)
    alone = build(cls)
    metric.update(**arguments(cls, inputs, update=True))
    alone.update(**arguments(cls, inputs, update=True))
    same(metric.compute(), alone.compute())
    both, one = metric.summary(), alone.summary()
    same(both["value"], one["value"])
    assert torch.equal(both["used"], 2 * one["used"]) and torch.equal(both["excluded"], 2 * one["excluded"])
    assert torch.equal(metric.used, alone.used), "summary() leaves the process its own numbers"


MAPS = ("mask", "saliency", "least_saliency", "other_saliency", "class_masks", "area_masks", "attributor")
READS_MAPS = {name: cls for name, cls in PER_IMAGE.items() if set(MAPS) & set(inspect.signature(cls.values).parameters)}


@pytest.mark.parametrize("cls", READS_MAPS.values(), ids=READS_MAPS)
def test_nan_maps_are_excluded_and_counted(cls, inputs):
    given = arguments(cls, inputs, update=True)
    spoilt = {k: torch.full_like(v, torch.nan) if k in MAPS and isinstance(v, torch.Tensor) else v for k, v in given.items()}
    if "attributor" in spoilt:
        spoilt["attributor"] = lambda images, index: images.sum(1) * torch.nan
    metric = build(cls)
    metric.update(**given)
    before = {k: getattr(metric, k).clone() for k in ("total", "used", "excluded")}
    metric.update(**spoilt)
    if cls.name == "masking_matrix":
        # Its last column ("none") reads no mask.
        keep = torch.ones(K, K + 1, dtype=torch.bool)
        keep[:, -1] = False
        before = {k: v[keep.flatten()] for k, v in before.items()}
        after = {k: getattr(metric, k)[keep.flatten()] for k in before}
    else:
        after = {k: getattr(metric, k) for k in before}
    same(after["total"], before["total"])
    same(after["used"], before["used"])
    added = after["excluded"] - before["excluded"]
    assert int(added.sum() if issubclass(cls, PerClassMetric) else added.min()) == B


@pytest.mark.parametrize("cls", PER_IMAGE.values(), ids=PER_IMAGE)
def test_reset_empty_and_pickle(cls, inputs):
    metric = build(cls)
    metric.update(**arguments(cls, inputs, update=True))
    before = metric.compute()
    same(pickle.loads(pickle.dumps(metric)).compute(), before)
    metric.reset()
    assert int(metric.used.sum()) == 0
    metric.update(**arguments(cls, inputs, update=True))
    same(metric.compute(), before)
    metric.reset()
    metric.add(torch.full((2, *metric.total.shape), torch.nan))
    empty = metric.compute()
    for value in empty.values() if isinstance(empty, dict) else [empty]:
        assert bool(value.isnan().all()), "no image used: NaN, not 0"


@pytest.mark.parametrize("cls", PER_IMAGE.values(), ids=PER_IMAGE)
def test_float32_agrees_with_float64(cls, inputs):
    metric = build(cls)
    full = metric.values(**arguments(cls, inputs))
    single = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments(cls, inputs).items()}
    if "explanandum" in single:
        import copy

        single["explanandum"] = copy.deepcopy(inputs["explanandum"]).float()
    half = metric.values(**single)
    # Random draws (noise, uniform perturbations) differ between the precisions.
    if cls.name not in ("stability", "max_sensitivity", "infidelity", "sufficiency", "necessity"):
        torch.testing.assert_close(half.double(), full.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
    assert torch.equal(half.isnan(), full.isnan())
