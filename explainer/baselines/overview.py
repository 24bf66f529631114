"""All methods with what each needs, from the facts that the contract tests verify."""

from __future__ import annotations

import inspect

import yaml

from explainer import plugins

_COLUMNS = ("method", "gradients", "layer option", "cost in passes", "class-specific", "signed", "random")


def overview() -> list[tuple[str, ...]]:
    """One row a method: name, needs gradients, takes a layer, cost, class-specific, signed, random."""
    rows: list[tuple[str, ...]] = []
    for name, cls in plugins.discover("explainer.baselines").items():
        options = inspect.signature(cls).parameters
        layer = next((option for option in ("layer", "encoder_output") if option in options), "")
        rows.append(
            (
                name,
                _mark(cls.needs_gradients),
                layer,
                cls.passes,
                _mark(cls.class_specific),
                _mark(cls.signed),
                _mark(not cls.deterministic),
            )
        )
    return rows


def _mark(fact: bool) -> str:
    return "yes" if fact else "no"


def markdown() -> str:
    """The overview as a Markdown table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in overview()])


def options_as_yaml(name: str) -> str:
    """A method's entry for ``methods:`` of an evaluation (or ``teachers:`` of a training), with the defaults of its options.

    Args:
        name: name of the method.

    Returns:
        YAML. Options whose default is decided by the method (None) are listed in a comment.
    """
    cls = plugins.find("explainer.baselines", name)
    defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values() if p.default is not inspect.Parameter.empty}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items() if value is not None}
    unset = [key for key, value in defaults.items() if value is None]
    summary = (inspect.getdoc(inspect.getmodule(cls)) or "").strip().splitlines()[0]
    lines = [f"# {summary}", f"# Cost per image: {cls.passes}"]
    if unset:
        lines.append(f"# Unset here, decided by the method: {', '.join(unset)}")
    chosen: str = yaml.safe_dump({"name": name, "options": plain}, sort_keys=False, default_flow_style=None)
    return "\n".join(lines) + "\n" + chosen.strip()
