"""The one graph: a model traced by `torch.export`, cleaned, with a name for every tensor that a phone stores.

A tensor's key is the path of the module that made it, and the op and its position in that module:
`down_blocks.0.resnets.0.conv1:conv2d.0`, `mid_block.attentions.0.transformer_blocks.0.attn1:matmul.1`; a graph input's
is `:<name>`. Keys do not depend on the exporter's numbering, so ranges measured on one trace land on another.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.errors import UnsupportedModelError
from sdconvert.plugins import require_fused
from sdconvert.quantize.simplify import attribute, reshape, simplify
from sdconvert.quantize.untraceable import export_or_name_module

aten = torch.ops.aten

# Ops whose result is a tensor of its own, by the name that settings and keys use.
VALUE_OPS: dict[Any, str] = {
    aten.conv2d.default: "conv2d",
    aten.linear.default: "linear",
    aten.matmul.default: "matmul",
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.softmax.int: "softmax",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
    aten.sigmoid.default: "sigmoid",
    aten.leaky_relu.default: "leaky_relu",
    aten.group_norm.default: "group_norm",
    aten.layer_norm.default: "layer_norm",
    aten.cat.default: "cat",
    aten.concat.default: "cat",
    aten.upsample_nearest2d.vec: "upsample_nearest2d",
}
# Ops that only move values: what leaves them has the range and grid of what entered.
MOVE_OPS = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.pad.default,
    aten.embedding.default,
    aten.index_select.default,
}
# Moves of a table's rows, by the name that settings use for the table's grid.
LOOKUPS: dict[Any, str] = {aten.embedding.default: "embedding"}
SECOND = ".second"
CONSTANT = "constant"


@dataclass(frozen=True)
class Value:
    """A tensor of the graph that is stored, and so gets a quantizer."""

    key: str
    op: str
    node: Node


@dataclass(frozen=True)
class Parameter:
    """A weight, bias or table of the graph, the op that it enters, and whether it is that op's bias."""

    name: str
    op: str
    is_bias: bool
    node: Node

    @property
    def layer(self) -> str:
        """Path of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own, before any move."""
        return tuple(self.node.meta["val"].shape)


@dataclass(frozen=True)
class Operand:
    """The second operand of a MatMul of two computed tensors, which the HTP stores in a form of its own."""

    key: str
    matmul: Node
    node: Node


def trace(adapter: ModelAdapter, inputs: Tensors) -> GraphModule:
    """Trace a model's static graph, without ops that do nothing, in the form that the HTP computes correctly.

    Args:
        adapter: Covers the model, which is left as it was.
        inputs: One set of graph inputs; their shapes become the graph's.

    Raises:
        PluginError: The model has plugins whose effect is not in its weights yet; the files would lack it.
        UnsupportedModelError: A module cannot be traced, or the graph has ops that no rule covers; they are named.
    """
    require_fused(adapter.model)
    with adapter.as_graph() as module:
        exported = export_or_name_module(module, tuple(inputs.values()), adapter.graph_name)
    graph_module = exported.module(check_guards=False)
    simplify(graph_module)
    _rename_inputs(graph_module, list(inputs))
    _reshape_sixteen_row_layer_norms(graph_module)
    _require_known_ops(graph_module)
    graph_module.recompile()
    return graph_module


def values(graph_module: GraphModule) -> list[Value]:
    """All stored floating-point tensors in execution order: constants, graph inputs and results of value ops."""
    seen: Counter[tuple[str, str]] = Counter()
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and _is_float(node):
            found.append(Value(f":{node.name}", "input", node))
            continue
        op = CONSTANT if _is_constant(graph_module, node) else VALUE_OPS.get(node.target)
        if op is not None:
            path = module_path(node)
            found.append(Value(f"{path}:{op}.{seen[path, op]}", op, node))
            seen[path, op] += 1
    return found


def parameters(graph_module: GraphModule) -> list[Parameter]:
    """All floating-point parameters that enter an op, directly or after moves."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and _is_float(node) and not _is_constant(graph_module, node):
            user = next(iter(node.users))
            is_bias = user.target in VALUE_OPS and node in user.args[2:]
            op = _entered_op(node)
            # Norms take (input, groups or shape, weight, bias): their bias is one place further back.
            if op in ("group_norm", "layer_norm"):
                is_bias = len(user.args) > 3 and user.args[3] is node
            found.append(Parameter(_model_path(node.target), op, is_bias, node))
    return found


def operands(graph_module: GraphModule) -> list[Operand]:
    """All second operands of MatMul."""
    return [
        Operand(f"{value.key}{SECOND}", value.node, second)
        for value in values(graph_module)
        if value.op == "matmul" and isinstance(second := value.node.args[1], Node)
    ]


def masked_scores(graph_module: GraphModule) -> dict[str, str]:
    """Keys of sums of attention scores and a mask, the additions between MatMul and Softmax → keys of the scores."""
    every = {value.node: value for value in values(graph_module)}
    return {
        value.key: every[source].key
        for value in every.values()
        if value.op == "add" and all(user.target is aten.softmax.int for user in value.node.users)
        for source in value.node.all_input_nodes
        if source in every and every[source].op == "matmul"
    }


def module_path(node: Node) -> str:
    """Path of the module whose forward made the node, or that holds it, in the model's own names."""
    stack = node.meta.get("nn_module_stack") or {}
    if node.op == "get_attr" and not stack:
        return _model_path(node.target).rpartition(".")[0]
    path = list(stack.values())[-1][0] if stack else ""
    return _model_path(path)


def module_paths(node: Node) -> set[str]:
    """Paths of the module whose forward made the node and of all modules around it, in the model's own names."""
    return {_model_path(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}


def _model_path(path: Any) -> str:
    """A path in the graph form, in the model's own names: without `model` before it and plugins' containers in it."""
    return str(path).removeprefix("model").removeprefix(".").replace("._host", "")


def _entered_op(node: Node) -> str:
    """The op that a parameter enters; after moves, such as one that picks rows of a table, the first that computes."""
    user = next(iter(node.users))
    if user.target in MOVE_OPS and user.target not in LOOKUPS:
        return _entered_op(user)
    return (VALUE_OPS | LOOKUPS).get(user.target, "")


def _is_constant(graph_module: GraphModule, node: Node) -> bool:
    """Whether a node is a tensor that belongs to the program, not to the model's weights: a mask, positions."""
    return node.op == "get_attr" and _is_float(node) and not isinstance(attribute(graph_module, node), nn.Parameter)


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _rename_inputs(graph_module: GraphModule, names: list[str]) -> None:
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node._rename(name)


def _reshape_sixteen_row_layer_norms(graph_module: GraphModule) -> None:
    """Run LayerNorm of (1, 16, C) or (1, 1, 16, C) as (1, 16, 1, C).

    QAIRT 2.51 computes garbage (-1 dB) for a LayerNorm over exactly 16 rows whose result enters a MatMul or 1x1
    convolution, on v69 to v79; 15, 17 and every other count tried are right, and so is this form (70 dB).
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.layer_norm.default:
            continue
        *rows, channels = node.meta["val"].shape
        if rows not in ([1, 16], [1, 1, 16]):
            continue
        with graph.inserting_before(node):
            column = reshape(graph_module, node, node.args[0], [1, 16, 1, channels])
        node.args = (column, *node.args[1:])
        with graph.inserting_after(node):
            back = reshape(graph_module, node, node, [*rows, channels])
        node.replace_all_uses_with(back, delete_user_cb=lambda user, back=back: user is not back)
        back.meta["val"] = node.meta["val"]
        node.meta = {**node.meta, "val": node.meta["val"].reshape(1, 16, 1, channels)}


def _require_known_ops(graph_module: GraphModule) -> None:
    unknown = Counter(
        f"{node.target} in {module_path(node) or 'the model'}" for node in graph_module.graph.nodes if not _known(node)
    )
    if unknown:
        raise UnsupportedModelError(
            f"{sum(unknown.values())} ops have no quantization rule: {', '.join(sorted(unknown))}",
            hint="add each to VALUE_OPS (it computes) or MOVE_OPS (it moves) in quantize/graph.py",
        )


def _known(node: Node) -> bool:
    if node.op != "call_function":
        return node.op in ("placeholder", "get_attr", "output")
    return node.target in VALUE_OPS or node.target in MOVE_OPS or node.name.startswith("getitem")
