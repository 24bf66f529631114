"""The words of the command line and of configurations, without importing torch: ``--help`` and a typing error are answered at once.

The names of plug-ins are read from their files (a class body with ``name = "..."``, or a function under ``@Facts("...")``), so that a new
plug-in stays one new file. A test compares them with what :func:`explainer.plugins.discover` finds by importing everything.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Container, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal

#: What can replace removed pixels (:func:`explainer.fills.make_fill`).
FillKind = Literal["mean", "black", "grey", "white", "blur", "noise", "shuffle"]
#: What can refine a mask: two searches and a filter that follows the image.
RefineMethod = Literal["extremal_perturbation", "igos_pp", "guided_filter"]
#: Names that version 0.1 spelled otherwise, by their old spelling. What users type in it keeps working.
FORMER: dict[str, str] = {
    "attribution_localisation": "attribution_localization",
    "binarised": "binarized",
    "data_randomisation": "data_randomization",
    "licence": "license",
    "localisation": "localization",
    "neighbours": "neighbors",
    "optimiser": "optimizer",
    "parameter_randomisation": "parameter_randomization",
    "randomise": "randomize",
    "randomised_classifier": "randomized_classifier",
}
#: The refinement methods that iterate; the others take no iterations and need no gradients.
SEARCHES: tuple[RefineMethod, ...] = ("extremal_perturbation", "igos_pp")


def methods() -> list[str]:
    """Names of the per-image methods (``explainer.baselines``)."""
    return names("explainer.baselines")


def protocols() -> list[str]:
    """Names of the evaluation's protocols."""
    return names("explainer.evaluation.protocols")


def formats() -> list[str]:
    """Names of the export formats."""
    return names("explainer.export")


def todays(name: str, known: Container[str]) -> str:
    """A name in today's spelling, where only that is known.

    Args:
        name: a command, an option, a protocol or a metric, in any spelling.
        known: the names that there are.
    """
    return FORMER[name] if name not in known and FORMER.get(name) in known else name


@functools.cache
def names(package: str) -> list[str]:
    """Names of the plug-ins of a package, sorted, read from its files without importing them.

    Args:
        package: dotted name, for example ``explainer.losses``.
    """
    # `resources.files` imports the package it is given; only the root package is free of torch.
    root, *inner = package.split(".")
    return names_in(resources.files(root).joinpath(*inner))


def names_in(folder: Traversable) -> list[str]:
    """Names of the plug-ins in the Python files of one folder, sorted."""
    files = [file for file in folder.iterdir() if file.name.endswith(".py")]
    return sorted(name for file in files for name in _names_of(ast.parse(file.read_text("utf-8"))))


def _names_of(module: ast.Module) -> Iterator[str]:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and not _is_abstract(node):
            yield from (value for statement in node.body if (value := _assigned_name(statement)) is not None)
        elif isinstance(node, ast.FunctionDef):
            yield from (value for decorator in node.decorator_list if (value := _declared_name(decorator)) is not None)


def _is_abstract(node: ast.ClassDef) -> bool:
    """Whether the class itself declares abstract methods; one that only inherits them has no ``name``."""
    decorators = [d for f in node.body if isinstance(f, ast.FunctionDef) for d in f.decorator_list]
    return any("abstractmethod" in ast.unparse(d) for d in decorators)


def _assigned_name(statement: ast.stmt) -> str | None:
    """The text that ``name = "..."`` or ``name: ClassVar[str] = "..."`` assigns."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target: ast.expr = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign):
        target = statement.target
    else:
        return None
    value = statement.value
    if isinstance(target, ast.Name) and target.id == "name" and isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    return None


def _declared_name(decorator: ast.expr) -> str | None:
    """The text that ``@Facts("...")`` (:class:`explainer.metrics.facts.Facts`) gives a function as its name."""
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func).rpartition(".")[2] != "Facts":
        return None
    given = [*decorator.args[:1], *(keyword.value for keyword in decorator.keywords if keyword.arg == "name")]
    return next((value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)), None)
