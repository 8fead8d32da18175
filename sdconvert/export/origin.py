"""Which layer of the torch model a node of an exported graph stems from."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto

TENSOR_KEY = "sdconvert.tensor"
"""Metadata of a DequantizeLinear: the key of the simulation's tensor that it makes."""
_PAIR = ["QuantizeLinear", "DequantizeLinear"]


@dataclass(frozen=True)
class Origin:
    """Where a node stands in the torch model, by paths of modules; the model itself is the empty path.

    Attributes:
        before: The module whose tensor comes nearest before the node, None without one.
        behind: The same behind it. It is the node's own if the node makes that tensor.
        own: Whether it does.
    """

    before: str | None
    behind: str | None
    own: bool

    def __str__(self) -> str:
        layers = [self.behind] if self.own else list(dict.fromkeys([self.before, self.behind]))
        named = [f"`{path}`" for path in layers if path]
        if len(named) == 2:
            return f"between layers {' and '.join(named)}"
        place = "of" if len(layers) == 1 else "beside"
        return f"{place} layer {named[0]}" if named else "of the model itself"


def origins(path: Path, names: Iterable[str]) -> dict[str, Origin]:
    """Return where nodes stem from, by name; those that a graph lacks, or has no keys near to, are left out.

    Args:
        path: A graph as `to_onnx` makes it; its weights are not read.
        names: Of nodes.
    """
    neighbours = _Neighbours(onnx.load(path, load_external_data=False).graph)
    found = {name: neighbours.origin(node) for name in names if (node := neighbours.nodes.get(name))}
    return {name: one for name, one in found.items() if (one.before, one.behind) != (None, None)}


def key_of(node: NodeProto) -> str:
    """Return the key of the simulation's tensor that a node makes; empty if it makes none."""
    return next((entry.value for entry in node.metadata_props if entry.key == TENSOR_KEY), "")


def nearest_sources(tensor: str, producers: Mapping[str, NodeProto], known: Container[str]) -> Iterator[str]:
    """Yield the nearest of some tensors from which a tensor is computed, each once.

    Args:
        tensor: That a node makes.
        producers: The node that makes each tensor, by name.
        known: Where the way back ends.
    """
    waiting, seen = list(producers[tensor].input), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in known:
            yield name
        elif name in producers:
            waiting += producers[name].input


class _Neighbours:
    """A graph's nodes, and who reads what they make."""

    def __init__(self, graph: GraphProto) -> None:
        self.nodes = {node.name: node for node in graph.node if node.name}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)

    def origin(self, node: NodeProto) -> Origin:
        passed, key = _nearest(node, self._behind)
        steps = [one.op_type for one in passed]
        # What makes a tensor is followed by its pair; a weight's Dequantize by that op first.
        own = bool(key) and (steps in ([], _PAIR[1:], _PAIR) or (node.op_type in _PAIR and steps[1:] == _PAIR))
        _, before = _nearest(node, self._before)
        return Origin(_module(before), _module(key), own)

    def _behind(self, node: NodeProto) -> list[NodeProto]:
        return [reader for name in node.output for reader in self._readers.get(name, [])]

    def _before(self, node: NodeProto) -> list[NodeProto]:
        return [self._producers[name] for name in node.input if name in self._producers]


def _nearest(node: NodeProto, neighbours: Callable[[NodeProto], list[NodeProto]]) -> tuple[list[NodeProto], str]:
    """The way in one direction to the nearest node with a key, and that key; of several as near, to the first."""
    ways: list[list[NodeProto]] = [[]]
    seen = {node.output[0]}
    while ways:
        following = []
        for way in ways:
            last = way[-1] if way else node
            if key := key_of(last):
                return way, key
            for near in neighbours(last):
                if near.output[0] not in seen:
                    seen.add(near.output[0])
                    following.append([*way, near])
        ways = following
    return [], ""


def _module(key: str) -> str | None:
    return key.partition(":")[0] if key else None
