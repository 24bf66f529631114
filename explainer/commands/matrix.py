"""Which method works on which family of classifiers: every method is tried on a small network of every family."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from explainer import baselines
from explainer.attribution import Attributor
from explainer.errors import ConfigError, ExplainerError
from explainer.models.explanandum import Explanandum
from explainer.models.families import FAMILIES

CLASSES = 3
_NETWORKS = 3  # random networks that are asked before flat maps count as an error
_SEARCH = {"size": 4, "iterations": 1, "points": 2, "step": 5.0}
#: A few steps or samples say whether a method works; how good its maps are is not asked here.
QUICK: dict[str, dict[str, Any]] = {
    "extremal_perturbation": {"areas": (0.1,), "max_iterations": 2},
    "gradient_shap": {"samples": 2},
    "igos": _SEARCH,
    "igos_pp": _SEARCH,
    "integrated_gradients": {"steps": 2},
    "meaningful_perturbation": {"iterations": 2},
    "occlusion": {"window": 16, "stride": 16},
    "rise": {"n_masks": 8, "grid": 4},
    "smooth_grad": {"samples": 2},
}


#: Methods by family that give finite maps of the class which do not find planted evidence in the family's trained network.
NOT_FOUND: dict[str, tuple[str, ...]] = {
    "ResNet (torchvision)": ("full_grad",),
    "ConvNeXt (torchvision)": ("gradient", "meta_saliency", "smooth_grad"),
    "ViT (timm)": ("ablation_cam", "attention_grad_cam"),
    "Swin (torchvision)": ("ablation_cam", "competition_cam", "gradient", "meta_saliency", "norm_grad", "smooth_grad"),
}


@dataclass(frozen=True)
class Cell:
    """What came of one method on one network.

    Attributes:
        status: ``refused``: the method said why it does not apply. ``error``: a fault of this project, an exception of another kind or maps
            that say nothing.
        reason: one line; empty where it works.
    """

    status: Literal["works", "refused", "error"]
    reason: str = ""


def try_method(name: str, family: str) -> Cell:
    """Run one method for two classes of one image. Where all maps are flat, as a relu may leave them, the next random network is asked."""
    fault = ""
    for seed in range(_NETWORKS):
        explanandum, image = subject(family, seed)
        try:
            method = baselines.build(name, explanandum, **QUICK.get(name, {}))
            maps = method.all_classes(image, [0, 1], masks=_halves(image) if method.needs_masks else None)
        except ExplainerError as error:
            return Cell("refused", _one_line(name, explanandum, str(error)))
        except Exception as error:
            return Cell("error", f"{type(error).__name__}: {' '.join(str(error).split())}")
        fault = _fault(method, maps)
        if not fault:
            return Cell("works")
    return Cell("error", fault)


def _halves(image: Tensor) -> Tensor:
    """Ground truth for methods that read it, ``[1,K,H,W]``: the left half for class 0, the right one for the others."""
    masks = image.new_zeros(1, CLASSES, *image.shape[-2:])
    half = image.shape[-1] // 2
    masks[:, 0, :, :half] = masks[:, 1:, :, half:] = 1
    return masks


def _fault(method: Attributor, maps: Tensor) -> str:
    """What is wrong with the maps ``[1,2,H,W]`` of two classes; nothing: an empty string."""
    flat = maps[0].flatten(1)
    if not bool(flat.isfinite().all()):
        return "its maps are not finite"
    if method.name == "constant":
        return ""
    if bool((flat.amax(1) == flat.amin(1)).all()):
        return f"its maps are constant on {_NETWORKS} random networks"
    if method.class_specific and bool((flat == flat[:1]).all()):
        return "its maps are the same for both classes"
    return ""


def _one_line(name: str, explanandum: Explanandum, message: str) -> str:
    """What a refusal says up to its remedy, without the names of method and network and the place, so that equal reasons read the same."""
    reason = " ".join(message.split()).replace(type(explanandum.classifier).__name__, "the network")
    for end in (". Use ", ": use ", ". It ", ": name ", ": pass ", ", but layer ", ". Stop "):
        reason = reason.partition(end)[0]
    for place in (r" \(node [^)]*\)", r",? (in layer|at|in) '[^']*'( \([^)]*\))?", r", operation \d+ of the forward pass"):
        reason = re.sub(place, "", reason)
    return reason.removeprefix(f"{name}: ").removeprefix(f"{name} ").rstrip(".")


Matrix = dict[str, dict[str, Cell]]


def compute(
    families: Iterable[str] | None = None,
    methods: Iterable[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Matrix:
    """The cells by family and method.

    Args:
        families: names of :data:`~explainer.models.families.FAMILIES`; None: all.
        methods: None: all.
        progress: called with the number of cells done and of all.

    Raises:
        ConfigError: a family is unknown.
    """
    rows = list(FAMILIES if families is None else families)
    columns = list(baselines.names() if methods is None else methods)
    for family in rows:
        if family not in FAMILIES:
            raise ConfigError(f"--families: {family!r} is none of {'; '.join(FAMILIES)}.")
    matrix: Matrix = {}
    for family in rows:
        matrix[family] = {}
        for method in columns:
            matrix[family][method] = try_method(method, family)
            progress(len(matrix) * len(columns) - len(columns) + len(matrix[family]), len(rows) * len(columns))
    return matrix


@functools.lru_cache(maxsize=_NETWORKS)
def subject(family: str, seed: int = 0) -> tuple[Explanandum, Tensor]:
    """A family's network with random weights, and an image for it ``[1,3,H,W]``: coarse random colours."""
    side = FAMILIES[family].side
    explanandum = Explanandum(FAMILIES[family].build(CLASSES, seed), CLASSES, task="multiclass", mean=0.5, std=0.25)
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return explanandum, torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=False)


def as_json(matrix: Matrix) -> str:
    """By family and method: status and reason."""
    return json.dumps({family: {name: asdict(cell) for name, cell in row.items()} for family, row in matrix.items()}, indent=1)


def page(matrix: Matrix, command: str) -> str:
    """The guide's page: what ``command`` prints, under a heading that says so.

    Args:
        matrix: all families and methods, or some.
        command: that made it.
    """
    return f"""# Which method works on which classifier

<!-- Written by: {command} -->
Every method is tried on a small network of every family: the code of the libraries with few and narrow blocks, and random weights.
`{command}` writes this page;
with `--families "ViT (timm)"` some families are asked. *yes*: finite maps that are not flat and differ between classes. A number: the
method refuses the network, for the reason below; the message itself also names the layer and methods to use instead.

Whether maps point at the evidence is another question. [Planted evidence](../results/planted.md) asks it of one trained network of each
kind, with numbers and reasons. {_not_found(matrix)}

{markdown(matrix)}"""


def _not_found(matrix: Matrix) -> str:
    """A sentence that names the methods of these families that run and do not find the evidence."""
    named = [
        f"{', '.join(f'`{name}`' for name in NOT_FOUND[family] if name in row)} ({family})"
        for family, row in matrix.items()
        if any(name in row for name in NOT_FOUND.get(family, ()))
    ]
    return f"These run and do not find it: {'; '.join(named)}." if named else "No method is known that runs here and does not find it."


def markdown(matrix: Matrix) -> str:
    """Methods that work everywhere in a line, the others as a table with a number for each reason. Equal columns are one."""
    methods = list(next(iter(matrix.values())))
    columns: dict[tuple[Cell, ...], list[str]] = {}
    for name in methods:
        columns.setdefault(tuple(row[name] for row in matrix.values()), []).append(name)
    everywhere = [n for cells, names in columns.items() if all(c.status == "works" for c in cells) for n in names]
    others = {cells: names for cells, names in columns.items() if any(c.status != "works" for c in cells)}
    lines = [f"On all {len(matrix)} families: {', '.join(f'`{n}`' for n in sorted(everywhere)) or 'none'}.", ""]
    if not others:
        return "\n".join(lines)
    reasons = _numbered(others)
    head = ["family", "kind", *("<br>".join(f"`{n}`" for n in names) for names in others.values())]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for i, family in enumerate(matrix):
        cells = [_sign(column[i], reasons) for column in others]
        lines.append("| " + " | ".join([family, FAMILIES[family].kind, *cells]) + " |")
    lines += ["", *(f"{number}. {_escaped(reason)}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


def _numbered(columns: Mapping[tuple[Cell, ...], Sequence[str]]) -> dict[str, int]:
    """The reasons, the most frequent first, with their numbers."""
    counted = Counter(cell.reason for cells, names in columns.items() for cell in cells for _ in names if cell.reason)
    return {reason: number for number, (reason, _) in enumerate(counted.most_common(), 1)}


def _sign(cell: Cell, reasons: Mapping[str, int]) -> str:
    return "yes" if cell.status == "works" else f"{'**error** ' if cell.status == 'error' else ''}{reasons[cell.reason]}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")
