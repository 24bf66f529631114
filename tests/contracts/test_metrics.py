"""What every metric promises, whichever file it is in: each function as a mean over images, pointing also over classes, and the classes."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest
import torch
from torch import nn

from explainer import plugins
from explainer.metrics.base import ImageMean, PerClassMetric, PerImageMetric
from explainer.metrics.facts import INPUTS
from explainer.models.explanandum import Explanandum

B, K, SIDE = 6, 4, 12
METRICS = plugins.discover("explainer.metrics")
#: Each metric, and one more of the kind that averages over classes first.
CASES = {**METRICS, "pointing_game by class": METRICS["pointing_game"]}
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
        "class_saliency": rand(B, K, SIDE, SIDE) - 0.3,
        "area_masks": (rand(B, 1, SIDE, SIDE) < torch.tensor([0.05, 0.1, 0.2, 0.4, 0.6, 1.0]).view(1, 6, 1, 1)).double(),
        "truth": (rand(B, SIDE, SIDE) < 0.3).double(),
        "void": rand(B, SIDE, SIDE) < 0.1,
        "class_truth": (rand(B, K, SIDE, SIDE) < 0.2).double(),
        "class_index": torch.arange(B) % K,
        "targets": targets,
        "logits": rand(B, K) - 0.5,
    }


def build(case, **kwargs) -> ImageMean:
    metric, options = CASES[case], dict(OPTIONS.get(CASES[case].name, {}))
    if inspect.isclass(metric):
        given = {"num_classes": K} if "num_classes" in inspect.signature(metric).parameters else {}
        return metric(**given, **options, **kwargs)
    if case.endswith("by class"):
        return PerClassMetric(metric, K, **options, **kwargs)
    return PerImageMetric(metric, **options, **kwargs)


def arguments(metric, inputs, rows=slice(None), update=False):
    names = [*metric.inputs, *(["class_index"] if update and isinstance(metric, PerClassMetric) else [])]
    return {name: inputs[name][rows] if isinstance(inputs[name], torch.Tensor) else inputs[name] for name in names}


def same(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    else:
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12, equal_nan=True)


def test_the_vocabulary_is_that_of_the_examples(inputs):
    assert set(inputs) == set(INPUTS)


@pytest.mark.parametrize("case", METRICS)
def test_states_its_facts(case):
    metric = build(case)
    assert metric.higher_is_better in (True, False, None) and metric.name == case
    assert re.search(r"(in|Range) [\[{]", METRICS[case].__doc__), "the docstring tells the range"
    assert metric.name.islower() and metric.name.isidentifier()


@pytest.mark.parametrize("case", CASES)
def test_values_are_per_image_within_bounds_and_do_not_depend_on_the_batch(case, inputs):
    metric = build(case)
    values = metric.values(**arguments(metric, inputs))
    assert values.shape == (B, *metric.total.shape) or (isinstance(metric, PerClassMetric) and values.shape == (B,))
    defined = values[~values.isnan()]
    assert len(defined), "the example defines the metric for some image"
    low, high = metric.bounds
    assert float(defined.min()) >= low - 1e-12 and float(defined.max()) <= high + 1e-12
    assert metric.optimum is None or low <= metric.optimum <= high
    alone = torch.cat([metric.values(**arguments(metric, inputs, slice(i, i + 1))) for i in range(B)])
    torch.testing.assert_close(alone, values, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert int(metric.used.sum()) == 0, "values() changes no state"


@pytest.mark.parametrize("case", CASES)
def test_total_is_the_mean_and_merges_over_two_processes(case, inputs):
    single, left, right = build(case), build(case), build(case)
    single.update(**arguments(single, inputs, slice(0, 4), update=True))
    single.update(**arguments(single, inputs, slice(4, 6), update=True))
    left.update(**arguments(single, inputs, slice(0, 1), update=True))
    right.update(**arguments(single, inputs, slice(1, 6), update=True))
    left.merge_state(right)
    same(left.compute(), single.compute())
    for state in ("total", "used", "excluded"):
        same(getattr(left, state), getattr(single, state))
    values = single.values(**arguments(single, inputs))
    if values.ndim == 1:
        assert int(single.used.sum()) == int((~values.isnan()).sum())
        assert int(single.used.sum() + single.excluded.sum()) == B
        same(single.total.sum(), values.nansum())


@pytest.mark.parametrize("case", CASES)
def test_forward_gives_the_batch_and_keeps_the_total(case, inputs):
    whole, stepwise, last = build(case), build(case), build(case)
    whole.update(**arguments(whole, inputs, update=True))
    last.update(**arguments(whole, inputs, slice(3, 6), update=True))
    stepwise(**arguments(whole, inputs, slice(0, 3), update=True))
    same(stepwise(**arguments(whole, inputs, slice(3, 6), update=True)), last.compute())
    same(stepwise.compute(), whole.compute())


@pytest.mark.parametrize("case", CASES)
def test_two_connected_processes(case, inputs):
    """The synchronisation of torchmetrics, with a second process that holds the same numbers."""
    metric = build(case, dist_sync_fn=lambda tensor, group: [tensor, tensor.clone()], distributed_available_fn=lambda: True)
    alone = build(case)
    metric.update(**arguments(metric, inputs, update=True))
    alone.update(**arguments(metric, inputs, update=True))
    same(metric.compute(), alone.compute())
    both, one = metric.summary(), alone.summary()
    same(both["value"], one["value"])
    assert torch.equal(both["used"], 2 * one["used"]) and torch.equal(both["excluded"], 2 * one["excluded"])
    assert torch.equal(metric.used, alone.used), "summary() leaves the process its own numbers"


MAPS = ("mask", "saliency", "least_saliency", "other_saliency", "class_masks", "class_saliency", "area_masks", "attributor")
READS_MAPS = [case for case in CASES if set(MAPS) & set(build(case).inputs)]


@pytest.mark.parametrize("case", READS_MAPS)
def test_nan_maps_are_excluded_and_counted(case, inputs):
    metric = build(case)
    given = arguments(metric, inputs, update=True)
    spoilt = {k: torch.full_like(v, torch.nan) if k in MAPS and isinstance(v, torch.Tensor) else v for k, v in given.items()}
    if "attributor" in spoilt:
        spoilt["attributor"] = lambda images, index: images.sum(1) * torch.nan
    metric.update(**given)
    before = {k: getattr(metric, k).clone() for k in ("total", "used", "excluded")}
    metric.update(**spoilt)
    if metric.name == "masking_matrix":
        # Its last column ("none") reads no mask.
        keep = torch.ones(K, K + 1, dtype=torch.bool)
        keep[:, -1] = False
        before = {k: v[keep] for k, v in before.items()}
        after = {k: getattr(metric, k)[keep] for k in before}
    else:
        after = {k: getattr(metric, k) for k in before}
    same(after["total"], before["total"])
    same(after["used"], before["used"])
    added = after["excluded"] - before["excluded"]
    assert int(added.sum() if isinstance(metric, PerClassMetric) else added.min()) == B


@pytest.mark.parametrize("case", CASES)
def test_reset_empty_and_pickle(case, inputs):
    metric = build(case)
    metric.update(**arguments(metric, inputs, update=True))
    before = metric.compute()
    same(pickle.loads(pickle.dumps(metric)).compute(), before)
    metric.reset()
    assert int(metric.used.sum()) == 0
    metric.update(**arguments(metric, inputs, update=True))
    same(metric.compute(), before)
    metric.reset()
    metric.add(torch.full((2, *metric.total.shape), torch.nan))
    empty = metric.compute()
    for value in empty.values() if isinstance(empty, dict) else [empty]:
        assert bool(value.isnan().all()), "no image used: NaN, not 0"


@pytest.mark.parametrize("case", CASES)
def test_float32_agrees_with_float64(case, inputs):
    metric = build(case)
    full = metric.values(**arguments(metric, inputs))
    single = {k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments(metric, inputs).items()}
    if "explanandum" in single:
        import copy

        single["explanandum"] = copy.deepcopy(inputs["explanandum"]).float()
    half = metric.values(**single)
    # Random draws (noise, uniform perturbations) differ between the precisions.
    if metric.name not in ("stability", "max_sensitivity", "infidelity", "sufficiency", "necessity"):
        torch.testing.assert_close(half.double(), full.double(), rtol=1e-3, atol=1e-4, equal_nan=True)
    assert torch.equal(half.isnan(), full.isnan())
