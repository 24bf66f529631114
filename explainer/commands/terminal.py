"""Tables and progress on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explainer.tasks.class_report import ClassReport


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with folded columns.

    Args:
        title: line above it.
        head: a heading for each column.
        rows: cells, as many as headings.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in head:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def show_row(title: str, row: dict[str, Any]) -> None:
    """Print quantities with four decimals, one a line.

    Args:
        title: line above the table.
        row: numbers by name; a dictionary of numbers is spread over lines ``name/part``.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    for key, value in sorted(row.items()):
        for name, number in _flat(key, value):
            table.add_row(name, f"{number:.4f}")
    Console().print(table)


def show_classes(report: ClassReport, title: str) -> None:
    """Print recall and precision of every class, and the confusion matrix where the classes are few."""
    from rich.console import Console
    from rich.table import Table

    shown = [(f"{title}, by class", report.table())]
    if report.printable:
        shown.append((f"{title}, confusion", report.matrix()))
    for heading, (header, *rows) in shown:
        table = Table(title=heading, title_justify="left")
        for i, cell in enumerate(header):
            table.add_column(cell, justify="left" if i == 0 or cell.startswith("taken") else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


def _flat(key: str, value: Any) -> list[tuple[str, float]]:
    return [(f"{key}/{name}", part) for name, part in value.items()] if isinstance(value, dict) else [(key, value)]
