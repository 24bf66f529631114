"""First and last layers of graphs by hand."""

from explainer.export.edge_layers import edge_layers


def test_one_network() -> None:
    chain = {"norm": ["image"], "a": ["norm", "w"], "relu": ["a"], "b": ["relu"], "add": ["b", "a"], "c": ["add"], "sigmoid": ["c"]}
    assert edge_layers(chain, {"a", "b", "c"}) == ["a", "c"]
    assert edge_layers(chain, {"b"}) == ["b"], "a single layer is both"
    assert edge_layers(chain, set()) == []


def test_two_networks_that_share_the_image_have_edges_each() -> None:
    both = {"a": ["image"], "p": ["image"], "b": ["a"], "q": ["p"], "c": ["b"], "merged": ["c", "q"]}
    assert edge_layers(both, {"a", "b", "c", "p", "q"}) == ["a", "p", "q", "c"]


def test_branches() -> None:
    """A layer in a side branch is inner if a layer follows where the branches meet."""
    graph = {"a": ["image"], "left": ["a"], "right": ["a"], "join": ["left", "right"], "head": ["join"], "out": ["head"]}
    assert edge_layers(graph, {"a", "left", "right", "head"}) == ["a", "head"]
