"""What the compiler was given, node by node."""

from collections.abc import Callable

from sdconvert.qnn.context import Context
from sdconvert.qnn.nodes import nodes_path, read_nodes

Compiled = Callable[[str, str], Context]


def test_nodes_of_a_compiled_graph_are_counted_by_type(compiled: Compiled) -> None:
    context = compiled("conv", "SM8650")
    nodes = read_nodes(context.bin)
    assert nodes_path(context.bin).name == "conv.nodes.json"
    assert nodes["Conv2d"] == 2
    # The HTP computes channels last: the graph's input and output are turned, nothing between is.
    assert nodes["Transpose"] == 2
    assert list(nodes.values()) == sorted(nodes.values(), reverse=True)
    nodes_path(context.bin).unlink()
    assert read_nodes(context.bin) == {}
