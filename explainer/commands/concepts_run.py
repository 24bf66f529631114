"""From a :class:`~explainer.commands.concepts_config.ConceptsConfig` to a results folder."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from explainer.commands import assembly
from explainer.commands.concepts_config import ConceptsConfig
from explainer.commands.concepts_layer import Probed, probe_classification, probe_segmentation
from explainer.commands.concepts_pictures import write_pictures
from explainer.commands.numbers import require_least, require_share
from explainer.concepts import embedding
from explainer.concepts.similarities import path_similarity, read_similarity
from explainer.concepts.store import Activations, ConceptMasks, collect
from explainer.concepts.supports import Supports, thresholds
from explainer.data.datamodule import DataModule
from explainer.data.samplers import spread
from explainer.errors import ConfigError
from explainer.evaluation.config import EvaluateConfig
from explainer.files import replacing, write_json
from explainer.geometry import height_width
from explainer.locks import claimed
from explainer.look.similarity import feature_maps
from explainer.models.checkpoints import configured_explanandum
from explainer.models.explanandum import Explanandum
from explainer.provenance import provenance
from explainer.tensors import Batch

log = logging.getLogger(__name__)
SUMMARY, WEIGHTS = "concepts.json", "weights.safetensors"
_OPTIONS = ("options", "train_options", "eval_options")
#: Concepts with fewer images are fitted and marked.
FEW_TRAIN, FEW_VAL = 10, 5


def run(config: ConceptsConfig) -> int:
    """Probe; returns the exit code."""
    with contextlib.ExitStack() as held:
        for folder in (config.out, config.store):
            if folder is not None:
                held.enter_context(claimed(folder, "concepts fit"))
        return _run(config)


def _run(config: ConceptsConfig) -> int:
    start = time.monotonic()
    require_least(config, 1, "batch_size", "limit", "threads", "mask_side", "clusters")
    require_least(config, 0, "bootstrap", "pictures")
    require_share(config, "confidence")  # now: the intervals are computed at the end
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = _images(config)
    names = _chosen(config, data)
    outside = _outside(config, names)
    explanandum = _classifier(config, data)
    splits = {name: _collected(config, data, explanandum, split) for name, split in _splits(config).items()}
    for _, truth in splits.values():
        _keep(truth, [data.class_names.index(n) for n in names])
    kept, dropped = _usable(splits["train"][1], splits["val"][1], names)
    queries = [(text, embedding.parse_query(text, names)) for text in config.queries]
    train, val = splits["train"][1], splits["val"][1]
    facts = _facts(train, val, names, getattr(data.dataset(config.train_split), "categories", None))
    categories = [fact["category"] for fact in facts]
    layers: dict[str, dict[str, Any]] = {}
    vectors: dict[str, Tensor] = {}
    probed: dict[str, dict[str, Probed]] = {}
    for layer in config.layers:
        log.info("layer %s", layer)
        activations = {name: own[layer] for name, (own, _) in splits.items()}
        found = _layer(config, activations, {n: t for n, (_, t) in splits.items()}, kept)
        probed[layer] = found
        layers[layer] = {
            "filters": activations["train"].filters,
            "grid": list(activations["train"].maps.shape[2:]),
            **{task: {**p.summary, **_space(config, p, names, queries, categories)} for task, p in found.items()},
        }
        for task, p in found.items():
            vectors[f"{task}/{layer}/weights"], vectors[f"{task}/{layer}/bias"] = p.fitted.weights, p.fitted.bias
            if p.limits is not None:
                vectors[f"{task}/{layer}/thresholds"] = p.limits
    summary: dict[str, Any] = {
        "concepts": facts,
        "dropped": dropped,
        "images": {"train": len(train.ids), "val": len(val.ids)},
        "layers": layers,
        "spaces": _spaces(probed, train.labels, outside, categories),
        "settings": {k: getattr(config, k) for k in ("preset", "tau", "pooling", "void", "bootstrap", "confidence")}
        | {"mask_side": train.side[0]},
    }
    out = Path(config.out)
    (out / SUMMARY).unlink(missing_ok=True)  # of an earlier call: until the end the folder has none that could be read with these files
    summary["pictures"] = write_pictures(config, data, splits=splits, probed=probed, names=names, out=out) if config.pictures else {}
    summary["provenance"] = provenance(
        asdict(config), {"classifier": explanandum.fingerprint()}, config.device, 1, time.monotonic() - start
    )
    with replacing(out / WEIGHTS) as stream:
        stream.write(save({k: v.contiguous() for k, v in vectors.items()}))
    write_json(out / SUMMARY, summary)
    print(f"{out / SUMMARY}: {len(names)} concepts, {len(layers)} layers, {time.monotonic() - start:.0f} s")
    print(f"The page: explainer concepts report {out}")
    return 0


def _splits(config: ConceptsConfig) -> dict[str, str]:
    return {"train": config.train_split, "val": config.val_split}


def _images(config: ConceptsConfig) -> DataModule:
    d = config.data
    plain: dict[str, Any] = {key: {k: v for k, v in getattr(d, key).items() if k != "augment"} for key in _OPTIONS}
    return assembly.data_module(EvaluateConfig(data=replace(d, eval_batch_size=config.batch_size, **plain), seed=config.seed))


def _classifier(config: ConceptsConfig, data: DataModule) -> Explanandum:
    c = config.classifier
    net = configured_explanandum(c, data.num_classes, data.task, None)
    return net.to(assembly.device_of(config.device))


def _collected(
    config: ConceptsConfig, data: DataModule, explanandum: Explanandum, split: str
) -> tuple[dict[str, Activations], ConceptMasks]:
    dataset = data.dataset(split)
    number = len(dataset) if config.limit is None else min(config.limit, len(dataset))
    indices = spread(len(dataset), number, config.seed) if number < len(dataset) else list(range(number))
    parts = [indices[i : i + config.batch_size] for i in range(0, number, config.batch_size)]
    device = explanandum.mean.device

    def features(images: Tensor) -> dict[str, Tensor]:
        return {k: v.cpu() for k, v in feature_maps(explanandum, images.to(device), config.layers).items()}

    def batches() -> Iterator[Batch]:
        yield from data.batches(split, parts)

    folder = None if config.store is None else Path(config.store) / split
    side = config.mask_side or min(height_width(data.size)) // 2
    return collect(batches(), features, number=number, side=side, folder=folder, ignore_void=config.void == "ignore")


def _chosen(config: ConceptsConfig, data: DataModule) -> list[str]:
    for name in config.concepts or ():
        if name not in data.class_names:
            raise ConfigError(f"concepts names {name!r}, which the data does not have. Its classes: {', '.join(data.class_names)}.")
    return list(config.concepts or data.class_names)


def _keep(truth: ConceptMasks, columns: list[int]) -> None:
    truth.labels, truth.rows = truth.labels[:, columns], truth.rows[:, columns]


def _usable(train: ConceptMasks, val: ConceptMasks, names: Sequence[str]) -> tuple[dict[str, list[int]], list[dict[str, str]]]:
    """Concepts that each task can fit and score; the others with the reason."""
    kept: dict[str, list[int]] = {"segmentation": [], "classification": []}
    dropped = []
    for c, name in enumerate(names):
        here = {"train": train, "val": val}
        no_mask = [s for s, t in here.items() if not len(t.images_with(c))]
        one_answer = [s for s, t in here.items() if t.labels[:, c].all() or not t.labels[:, c].any()]
        if no_mask:
            dropped.append({"concept": name, "task": "segmentation", "reason": f"no mask in {' and '.join(no_mask)}"})
        else:
            kept["segmentation"].append(c)
        if one_answer:
            reason = f"all images or none show it in {' and '.join(one_answer)}"
            dropped.append({"concept": name, "task": "classification", "reason": reason})
        else:
            kept["classification"].append(c)
    return kept, dropped


def _layer(
    config: ConceptsConfig, activations: dict[str, Activations], truth: dict[str, ConceptMasks], kept: dict[str, list[int]]
) -> dict[str, Probed]:
    found = {}
    if "segmentation" in config.tasks and kept["segmentation"]:
        limits = thresholds([a.maps for a in activations.values()], config.tau)
        supports = {name: Supports.of(a.maps, limits) for name, a in activations.items()}
        found["segmentation"] = probe_segmentation(config, supports, truth, kept["segmentation"], limits)
    if "classification" in config.tasks and kept["classification"]:
        pooled = {name: a.mean if config.pooling == "mean" else a.max for name, a in activations.items()}
        found["classification"] = probe_classification(config, pooled, truth, kept["classification"])
    return found


def _space(
    config: ConceptsConfig,
    probed: Probed,
    names: Sequence[str],
    queries: Sequence[tuple[str, list[tuple[int, float]]]],
    categories: Sequence[str],
) -> dict[str, Any]:
    """Neighbours, arithmetic, clusters and the plane of one layer's concept vectors."""
    kept = probed.concepts
    w = probed.fitted.weights[kept]
    place = {c: i for i, c in enumerate(kept)}
    answers = []
    for text, terms in queries:
        if all(c in place for c, _ in terms):
            near = embedding.arithmetic(w, [(place[c], sign) for c, sign in terms])
            answers.append({"query": text, "answers": [[names[kept[i]], s] for i, s in near]})
    label, inertia = embedding.kmeans(w, min(config.clusters, len(kept)), seed=config.seed)
    return {
        "nearest": {names[c]: [[names[kept[i]], s] for i, s in embedding.nearest(w, place[c])] for c in kept},
        "queries": answers,
        "clusters": {
            "inertia": inertia,
            "purity": embedding.purity(label, [categories[c] for c in kept]) if len(set(categories)) > 1 else None,
            "of": {names[c]: int(label[place[c]]) for c in kept},
        },
        "plane": {names[c]: embedding.plane(w)[place[c]].tolist() for c in kept},
    }


def _outside(config: ConceptsConfig, names: Sequence[str]) -> dict[str, Tensor]:
    """Similarities ``[C,C]`` of all concepts that do not come from the network."""
    found = {name: read_similarity(Path(path), names) for name, path in config.similarities.items()}
    if config.hierarchy is not None:
        found["hierarchy"] = path_similarity(Path(config.hierarchy), names)
    return found


def _spaces(probed: dict[str, dict[str, Probed]], labels: Tensor, outside: dict[str, Tensor], categories: Sequence[str]) -> dict[str, Any]:
    """How far apart the concept spaces of layers and tasks are, beside two halves of the training images, co-occurrence and what the
    user's files say; for each category the mean over its concepts of their share.
    """
    every = {f"{task} {layer}": p for layer, tasks in probed.items() for task, p in tasks.items()}
    shared = sorted(set.intersection(*[set(p.concepts) for p in every.values()])) if every else []
    if len(shared) < 2:
        return {"names": [], "distances": [], "halves": {}, "by_category": {}}
    similar = {name: embedding.similarity(p.comparable[shared]) for name, p in every.items()}
    similar["labels together"] = embedding.cooccurrence(labels)[shared][:, shared]
    similar |= {name: table[shared][:, shared] for name, table in outside.items()}
    halves = {
        name: embedding.space_distance(*[embedding.similarity(h[shared]) for h in p.halves])[0] for name, p in every.items() if p.halves
    }
    found = [[embedding.space_distance(a, b) for b in similar.values()] for a in similar.values()]
    own = [categories[c] for c in shared]
    by_category = {}
    for category in sorted(set(own)):
        belongs = torch.tensor([o == category for o in own])
        by_category[category] = [[float(rows[belongs].mean()) for _, rows in line] for line in found]
    distances = [[total for total, _ in line] for line in found]
    return {"names": list(similar), "concepts": len(shared), "distances": distances, "halves": halves, "by_category": by_category}


def _facts(train: ConceptMasks, val: ConceptMasks, names: Sequence[str], categories: dict[str, str] | None) -> list[dict[str, Any]]:
    facts = []
    for c, name in enumerate(names):
        images = train.images_with(c)
        size = float(train.masks(c, images).float().mean()) if len(images) else math.nan
        counts = {"train": int(train.labels[:, c].sum()), "val": int(val.labels[:, c].sum())}
        facts.append(
            {
                "name": name,
                "category": (categories or {}).get(name, "concept"),
                **counts,
                "masks_train": len(images),
                "masks_val": len(val.images_with(c)),
                "size": size,
                "few": counts["train"] < FEW_TRAIN or counts["val"] < FEW_VAL,
            }
        )
    return facts
