"""A traced graph as a list of steps, cut into segments at the layers that are rounded.

A step is one op, or a whole attention: scores of 4096 x 4096 tokens for eight heads take half a gigabyte, so the ops
from the first MatMul to the second run for a few queries at a time.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sdconvert.errors import UsageError
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.layers import Convolution, RoundedLayer
from sdconvert.quantize.simplify import attribute

aten = torch.ops.aten

SCORES_BYTES = 16 << 20
"""The most that attention scores of one step take."""
_BETWEEN_MATMULS = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.softmax.int}
Call = Callable[[Node, dict[Node, Any]], Any]


@dataclass(frozen=True)
class Step:
    """Ops that run together.

    Attributes:
        nodes: In execution order; what others read is the last one's value.
        inputs: What they read of others that depends on the graph's inputs.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]

    @property
    def output(self) -> Node:
        """The node whose value the step computes."""
        return self.nodes[-1]

    @property
    def query_rows(self) -> int:
        """Queries that run at a time."""
        queries: int = self.nodes[0].meta["val"].shape[-2]
        return max(1, SCORES_BYTES * queries // max(1, size(self.nodes[0])))

    def run(self, values: Mapping[Node, Any], call: Call) -> Any:
        """Compute the step's value.

        Args:
            values: Of the inputs.
            call: Computes one node from the values of those that it reads.
        """
        if len(self.nodes) == 1:
            return call(self.output, dict(values))
        first = self.nodes[0]
        queries = first.args[0]
        assert isinstance(queries, Node)  # for the type checker
        parts = []
        for rows in torch.split(values[queries], self.query_rows, -2):
            own: dict[Node, Any] = {**values, queries: rows}
            for node in self.nodes:
                own[node] = call(node, own)
                if node is not first:
                    own.pop(_previous(self.nodes, node))
            parts.append(own[self.output])
        return torch.cat(parts, -2)


@dataclass(frozen=True)
class RoundedGroup:
    """Layers that read one value in one way, in execution order, and the nodes that they are."""

    input: Node
    layers: tuple[RoundedLayer, ...]
    nodes: tuple[Node, ...]


class SegmentedGraph:
    """A traced graph, cut before the first layer of every group.

    Args:
        graph_module: From `graph.trace`, or a simulation's with its quantizers.
        names: Of the weights to be rounded. Of a layer that runs more than once the first run counts.

    Raises:
        UsageError: One of them is no weight of a convolution or linear layer of the graph.
    """

    def __init__(self, graph_module: GraphModule, names: Collection[str]) -> None:
        self.graph_module = graph_module
        self._names = {parameter.node: parameter.name for parameter in graph.parameters(graph_module)}
        self.steps = list(_steps(graph_module))
        self.groups = self._find_groups(names)
        positions = {node: index for index, step in enumerate(self.steps) for node in step.nodes}
        starts = [positions[group.nodes[0]] for group in self.groups]
        edges = [0, *starts, len(self.steps)]
        self.segments = [self.steps[first:last] for first, last in itertools.pairwise(edges)]

    @property
    def inputs(self) -> list[Node]:
        """The graph's inputs, in order."""
        return [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The graph's outputs, in order."""
        output = next(node for node in self.graph_module.graph.nodes if node.op == "output")
        return tuple(output.all_input_nodes)

    @cached_property
    def reads(self) -> list[list[Node]]:
        """By segment, what it reads of earlier ones and of the graph's inputs; the last one also reads the outputs."""
        found = []
        for index, segment in enumerate(self.segments):
            own = {step.output for step in segment}
            wanted = [node for step in segment for node in step.inputs]
            if index + 1 == len(self.segments):
                wanted += self.outputs
            found.append([node for node in dict.fromkeys(wanted) if node not in own])
        return found

    @cached_property
    def last_reads(self) -> list[dict[int, list[Node]]]:
        """By segment and position of a step: whose values nothing in the segment reads any more."""
        found = []
        for index, segment in enumerate(self.segments):
            last = dict.fromkeys(self.reads[index], -1)
            for position, step in enumerate(segment):
                last[step.output] = position
                last.update(dict.fromkeys(step.inputs, position))
            kept = self.outputs if index + 1 == len(self.segments) else ()
            by_position: dict[int, list[Node]] = {}
            for node, position in last.items():
                if node not in kept:
                    by_position.setdefault(position, []).append(node)
            found.append(by_position)
        return found

    @cached_property
    def uses(self) -> dict[Node, int]:
        """How many later segments read a value, for all values that any later one reads."""
        counts: dict[Node, int] = {}
        for nodes in self.reads:
            for node in nodes:
                counts[node] = counts.get(node, 0) + 1
        return counts

    def differing(self, *, quantizers: bool, weights: Collection[str]) -> set[Node]:
        """All nodes whose values differ between the floating-point path and the quantized one.

        Args:
            quantizers: The graph's quantizers are active on the quantized path.
            weights: Names that have other values on it.
        """
        found: set[Node] = set()
        for node in self.graph_module.graph.nodes:
            own = (quantizers and node.op == "call_module") or self._names.get(node) in weights
            if own or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def parameters(self) -> dict[str, Tensor]:
        """All parameters of the graph by name."""
        return {name: attribute(self.graph_module, node).detach() for node, name in self._names.items()}

    def name_of(self, node: Node) -> str | None:
        """Name of the parameter that a node is, directly or through its quantizer."""
        source = node
        while source.op == "call_module":
            (source,) = source.all_input_nodes
        return self._names.get(source)

    def _find_groups(self, names: Collection[str]) -> list[RoundedGroup]:
        found: dict[tuple[Node, Convolution | None], list[tuple[RoundedLayer, Node]]] = {}
        seen: set[str] = set()
        for step in self.steps:
            node = step.output
            if node.target not in (aten.conv2d.default, aten.linear.default):
                continue
            source, weight = node.args[:2]
            assert isinstance(source, Node)  # for the type checker
            assert isinstance(weight, Node)  # for the type checker
            name = self.name_of(weight)
            if name is None or name not in names or name in seen:
                continue
            seen.add(name)
            bias = node.kwargs.get("bias", node.args[2] if len(node.args) > 2 else None)
            own = self.name_of(bias) if isinstance(bias, Node) else None
            layer = RoundedLayer(name, tuple(weight.meta["val"].shape), _convolution(node), own)
            found.setdefault((source, layer.convolution), []).append((layer, node))
        if missing := sorted(set(names) - seen):
            raise UsageError(
                f"{len(missing)} weights to be rounded enter no convolution or linear layer of the graph, "
                f"the first is `{missing[0]}`",
                hint="leave them out: other weights are rounded to nearest",
            )
        return [
            RoundedGroup(source, tuple(layer for layer, _ in members), tuple(node for _, node in members))
            for (source, _), members in found.items()
        ]


def size(node: Node) -> int:
    """Bytes of a node's value in float32."""
    value = node.meta.get("val")
    return value.numel() * 4 if isinstance(value, Tensor) else 0


def _steps(graph_module: GraphModule) -> Iterator[Step]:
    """All ops that depend on an input, in order; a tuple's parts right behind it, an attention's ops at its end."""
    attentions = [_attention(node) for node in graph_module.graph.nodes if node.target is aten.matmul.default]
    by_end = {nodes[-1]: nodes for nodes in attentions if nodes}
    inside = {node for nodes in by_end.values() for node in nodes[:-1]}
    parts = {
        node: [user for user in node.users if user.name.startswith("getitem")] for node in graph_module.graph.nodes
    }
    every_part = {part for found in parts.values() for part in found}
    variable: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or (node.op != "output" and variable.intersection(node.all_input_nodes)):
            variable.add(node)
        if node not in variable or node.op == "placeholder" or node in inside or node in every_part:
            continue
        for member in [node, *parts[node]]:
            variable.add(member)
            nodes = by_end.get(member, (member,))
            inputs = dict.fromkeys(source for own in nodes for source in own.all_input_nodes if source not in nodes)
            yield Step(tuple(nodes), tuple(source for source in inputs if source in variable))


def _attention(first: Node) -> list[Node]:
    """The ops from a MatMul to the next one whose left operand they make, row by row; none if there is no such."""
    nodes = [first]
    queries = first.args[0]
    while len(nodes[-1].users) == 1:
        (following,) = nodes[-1].users
        others = [source for source in following.all_input_nodes if source is not nodes[-1]]
        if queries in others:
            return []
        if following.target is aten.matmul.default:
            return [*nodes, following] if following.args[0] is nodes[-1] and others else []
        is_softmax = following.target is aten.softmax.int
        dims = len(first.meta["val"].shape)
        if is_softmax and following.args[1] not in (-1, dims - 1):
            return []
        if not (following.target in _BETWEEN_MATMULS or following.op == "call_module"):
            return []
        if any(source.meta["val"].dim() > 1 and source.meta["val"].shape[-2] != 1 for source in others):
            return []
        nodes.append(following)
    return []


def _previous(nodes: tuple[Node, ...], node: Node) -> Node:
    return nodes[nodes.index(node) - 1]


def _convolution(node: Node) -> Convolution | None:
    if node.target is aten.linear.default:
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    settings: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight = settings["weight"]
    pairs = {
        name: _pair(settings[name]) for name in ("stride", "padding", "dilation") if settings.get(name) is not None
    }
    return Convolution(tuple(weight.meta["val"].shape[2:]), **pairs, groups=settings.get("groups", 1))


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return (values[0], values[-1])
