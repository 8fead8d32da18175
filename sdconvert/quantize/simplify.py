"""Simplify a traced graph: the same values from fewer ops, all of kinds that the HTP has.

What depends on no input becomes a constant, ops that change nothing go, and an `einsum` that only moves values becomes
a permutation of at most five axes, the most that the HTP permutes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_NO_EFFECT = {
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.alias.default,
}
# These copy nothing and reorder nothing: if the shape stays, so does the tensor.
_SHAPES = {aten.view.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor}
_MOST_AXES = 5
_CONSTANT = "constant_"


def simplify(graph_module: GraphModule) -> None:
    """Simplify a graph in place.

    Args:
        graph_module: As `torch.export` makes it, every node with its value's shape and type in `meta["val"]`.
    """
    for node in list(graph_module.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph_module.graph.erase_node(node)
    _drop_unused(graph_module)
    _fold_constants(graph_module)
    _drop_unused(graph_module)
    _drop_ineffective(graph_module)
    for node in list(graph_module.graph.nodes):
        if node.target is aten.embedding.default:
            _take_first_rows(graph_module, node)
        elif node.target is aten.einsum.default:
            _permute(graph_module, node)
    _drop_unused(graph_module)


def attribute(graph_module: GraphModule, node: Node) -> Any:
    """What a `get_attr` node stands for: a parameter of the model, or a tensor that is none."""
    path, _, name = str(node.target).rpartition(".")
    return getattr(graph_module.get_submodule(path), name)


def reshape(graph_module: GraphModule, like: Node, source: Node, shape: list[int]) -> Node:
    """A new node that gives `source` a shape, made by the same module as `like`; inserted where the graph inserts."""
    node = graph_module.graph.call_function(aten.reshape.default, (source, shape))
    node.meta = {**like.meta, "val": source.meta["val"].reshape(shape)}
    return node


def _fold_constants(graph_module: GraphModule) -> None:
    """Compute what no input and no parameter enters, such as the positions of a model's patches."""
    known: dict[Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and not isinstance(value := attribute(graph_module, node), nn.Parameter):
            known[node] = value.clone()
        elif _is_function(node) and all(source in known for source in node.all_input_nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
    for node in list(known):
        if node.op == "call_function" and isinstance(known[node], Tensor) and not node.users.keys() <= known.keys():
            node.replace_all_uses_with(_constant(graph_module, node, known[node]))
    for node in reversed(known):
        # Ops in place among them would stay for what they do to their operand.
        if node.op == "call_function" and not node.users:
            graph_module.graph.erase_node(node)


def _constant(graph_module: GraphModule, node: Node, value: Tensor) -> Node:
    """A node for the value of another, one for all equal values: heads and layers share a mask."""
    made = {name: tensor for name, tensor in graph_module.named_buffers() if name.startswith(_CONSTANT)}
    constant: Node
    for constant in graph_module.graph.find_nodes(op="get_attr", sort=False):
        if (tensor := made.get(str(constant.target))) is not None and torch.equal(tensor, value):
            return constant
    graph_module.register_buffer(name := f"{_CONSTANT}{len(made)}", value)
    with graph_module.graph.inserting_before(node):
        constant = graph_module.graph.get_attr(name)
    constant.meta = dict(node.meta)
    return constant


def _is_function(node: Node) -> bool:
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())


def _drop_unused(graph_module: GraphModule) -> None:
    # An op that draws random numbers has no other effect: a layer with dropout whose output nobody takes may go.
    graph_module.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph_module.graph.erase_node(node)


def _drop_ineffective(graph_module: GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if _casts_nothing(node) or _keeps_shape(node) or _scales_by_one(node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)


def _casts_nothing(node: Node) -> bool:
    return node.target in _NO_EFFECT and _value(node).dtype == _value(node.args[0]).dtype


def _keeps_shape(node: Node) -> bool:
    return node.target in _SHAPES and _value(node).shape == _value(node.args[0]).shape


def _scales_by_one(node: Node) -> bool:
    return node.target in (aten.mul.Tensor, aten.div.Tensor) and node.args[1] in (1, 1.0)


def _value(node: Any) -> Tensor:
    value: Tensor = node.meta["val"]
    return value


def _take_first_rows(graph_module: GraphModule, node: Node) -> None:
    """Write a lookup of rows 0, 1, 2, … as a slice of the table: positions are known, tokens are not."""
    table, ids, *_ = node.args
    assert isinstance(table, Node)  # for the type checker
    assert isinstance(ids, Node)  # for the type checker
    if ids.op != "get_attr":
        return
    rows = attribute(graph_module, ids).flatten()
    if not torch.equal(rows, torch.arange(len(rows)).to(rows)):
        return
    with graph_module.graph.inserting_before(node):
        source = table
        if len(rows) < len(_value(table)):
            source = graph_module.graph.call_function(aten.slice.Tensor, (table, 0, 0, len(rows)))
            source.meta = {**node.meta, "val": _value(table)[: len(rows)]}
        node.replace_all_uses_with(reshape(graph_module, node, source, list(_value(node).shape)))


def _permute(graph_module: GraphModule, node: Node) -> None:
    """Write an `einsum` of one operand that keeps all axes as a permutation, without axes of size 1 if it has many."""
    equation, sources = node.args[:2]
    assert isinstance(sources, list | tuple)  # for the type checker
    before, _, after = str(equation).replace(" ", "").partition("->")
    if len(sources) != 1 or sorted(before) != sorted(after) or len(set(before)) != len(before):
        return
    source: Any = sources[0]
    sizes = dict(zip(before, _value(source).shape, strict=True))
    kept = before if len(before) <= _MOST_AXES else [axis for axis in before if sizes[axis] != 1]
    order = [kept.index(axis) for axis in after if axis in kept]
    with graph_module.graph.inserting_before(node):
        if len(kept) < len(before):
            source = reshape(graph_module, node, source, [sizes[axis] for axis in kept])
        permuted = graph_module.graph.call_function(aten.permute.default, (source, order))
        permuted.meta = {**node.meta, "val": _value(source).permute(order)}
        if len(kept) < len(before):
            permuted = reshape(graph_module, node, permuted, list(_value(node).shape))
    node.replace_all_uses_with(permuted)
