"""Which layers of a graph stay in floating point when the others are quantised."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def edge_layers(parents: Mapping[str, Sequence[str]], layers: Collection[str]) -> list[str]:
    """The layers with no other layer before them or none after them: of each network in the graph the first and the last.

    The first sees the image, whose small differences int8 levels erase; the last gives the mask's logits, where one level moves a border.
    Both have few channels on one side, so that they cost little.

    Args:
        parents: the nodes that each node reads, in an order in which a node comes after those it reads; nodes that are not keys are
            inputs and constants.
        layers: those of the nodes that have weights and can be quantised.

    Returns:
        Names in the order of the graph.
    """
    behind: set[str] = set()  # a layer comes before them
    for node, reads in parents.items():
        if any(r in layers or r in behind for r in reads):
            behind.add(node)
    ahead: set[str] = set()  # a layer comes after them
    for node, reads in reversed(list(parents.items())):
        if node in layers or node in ahead:
            ahead.update(reads)
    return [node for node in parents if node in layers and (node not in behind or node not in ahead)]
