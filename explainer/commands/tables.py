"""A run's numbers on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def show_row(title: str, row: dict[str, Any]) -> None:
    """Print quantities with four decimals, one a line.

    Args:
        title: above the table.
        row: numbers by name; a dictionary of numbers is spread over lines ``name/part``.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for key, value in sorted(row.items()):
        for name, number in _flat(key, value):
            table.add_row(name, f"{number:.4f}")
    Console().print(table)


def _flat(key: str, value: Any) -> list[tuple[str, float]]:
    return [(f"{key}/{name}", part) for name, part in value.items()] if isinstance(value, dict) else [(key, value)]
