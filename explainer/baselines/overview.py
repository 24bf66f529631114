"""All methods with what each needs, from the facts that the contract tests verify."""

from __future__ import annotations

import inspect

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
                _mark(cls.needs_gradients),  # type: ignore[attr-defined]
                layer,
                cls.passes,  # type: ignore[attr-defined]
                _mark(cls.class_specific),  # type: ignore[attr-defined]
                _mark(cls.signed),  # type: ignore[attr-defined]
                _mark(not cls.deterministic),  # type: ignore[attr-defined]
            )
        )
    return rows


def _mark(fact: bool) -> str:
    return "yes" if fact else "no"


def markdown() -> str:
    """The overview as a Markdown table."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in overview()])
