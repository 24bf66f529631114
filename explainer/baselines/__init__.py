"""Per-image explanation methods: one method, one file, one paper. ``build`` makes an attributor by name."""

from __future__ import annotations

from typing import Any

from explainer import plugins
from explainer.attribution import Attributor

__all__ = ["build", "names"]


def build(name: str, explanandum: Any, **options: Any) -> Attributor:
    """The method called ``name`` for this classifier; unknown names and options are answered with the known ones."""
    method: Attributor = plugins.build(__name__, name, explanandum, **options)
    return method


def names() -> list[str]:
    """All method names, sorted."""
    return list(plugins.discover(__name__))
