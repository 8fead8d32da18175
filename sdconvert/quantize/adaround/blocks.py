"""Regions of a traced graph whose weights are rounded together: a module's part of it, or layers and their activations.

A block begins with a layer, where the two frontiers wait, and ends with a value that the rest of the graph reads.
BRECQ (Li et al., 2021, arXiv:2102.05426, section 3.2) finds that the error of a residual block's output tells more of
the network's error than that of each layer alone: between layers of a block, errors can cancel.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch.fx import Node

from sdconvert.errors import UsageError
from sdconvert.quantize.adaround.layers import RoundedLayer
from sdconvert.quantize.adaround.steps import SegmentedGraph, Step, size
from sdconvert.quantize.graph import MOVE_OPS, module_paths

aten = torch.ops.aten

Kind = Literal["layer+activation", "block"]
_ACTIVATIONS = {aten.silu.default, aten.gelu.default, aten.sigmoid.default, aten.leaky_relu.default}
_ELEMENTWISE = {aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor} | _ACTIVATIONS


@dataclass(frozen=True)
class Block:
    """A region of a graph.

    Attributes:
        name: The module's path, or the first layer's weight.
        first: Index of the group with which it begins.
        last: Index of the last group that begins in it.
        steps: In execution order.
        inputs: Values that it reads, other than parameters.
        outputs: Its values that others read.
        layers: Layers that are rounded, and run in it alone.
    """

    name: str
    first: int
    last: int
    steps: tuple[Step, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    layers: tuple[RoundedLayer, ...]

    @property
    def stored_bytes(self) -> int:
        """What the store holds for one sample until the block is done, in float32: inputs, and what is to come out."""
        return sum(map(size, (*self.inputs, *self.outputs)))

    @cached_property
    def last_reads(self) -> dict[int, list[Node]]:
        """By position of a step: whose values nothing in the block reads any more."""
        last = {node: position for position, step in enumerate(self.steps) for node in step.inputs}
        found: dict[int, list[Node]] = {}
        for node, position in last.items():
            if node not in self.outputs:
                found.setdefault(position, []).append(node)
        return found


@dataclass(frozen=True)
class BlockFigures:
    """What became of one block: errors of its outputs over their energy, on held-out samples.

    Attributes:
        name: Of the block.
        taken: The rounding that was best there.
        changed: Part of the codes that are not those of `moments`.
        nearest_loss: Every layer rounded to nearest.
        moments_loss: Every layer as its own moments have it.
        reconstruction_loss: All layers trained together.
    """

    name: str
    taken: Literal["nearest", "moments", "reconstruction"]
    changed: float
    nearest_loss: float
    moments_loss: float
    reconstruction_loss: float


def find_blocks(
    segmented: SegmentedGraph, kind: Kind, *, paths: Sequence[str] = (), largest: int = 12
) -> tuple[Block, ...]:
    """The blocks of a graph, none of which begins before another one ends.

    Args:
        segmented: The graph.
        kind: `block`: modules; `layer+activation`: layers and the activations behind them, functions or modules.
        paths: Of the modules; without, the outermost ones that have at most `largest` layers and one output.
        largest: Layers of a module.

    Raises:
        UsageError: A path names no module of two rounded layers or more, two paths name modules in each other, or the
            graph has no block of this kind.
    """
    finder = _Finder(segmented)
    if kind == "layer+activation":
        if paths:
            raise UsageError("`layer+activation` takes no paths of modules", hint="ask for `block`")
        found = finder.activated()
    elif paths:
        found = [finder.of_module(path) or _refuse(segmented, path) for path in paths]
    else:
        found = finder.modules(largest)
    found.sort(key=lambda block: block.first)
    for block, following in itertools.pairwise(found):
        if following.first <= block.last:
            raise UsageError(
                f"the blocks `{block.name}` and `{following.name}` overlap", hint="name modules that follow one another"
            )
    if not found:
        raise UsageError(
            f"the graph has nothing to reconstruct as `{kind}`",
            hint="no rounded layer has an activation behind it, or none shares a module with others",
        )
    return tuple(found)


class _Finder:
    def __init__(self, segmented: SegmentedGraph) -> None:
        self._segmented = segmented
        self._positions = {node: index for index, step in enumerate(segmented.steps) for node in step.nodes}
        self._starts = [self._positions[group.nodes[0]] for group in segmented.groups]
        self._layers = {
            node: layer for group in segmented.groups for node, layer in zip(group.nodes, group.layers, strict=True)
        }
        self._runs: dict[str, set[Node]] = {}
        for step in segmented.steps:
            for node in step.nodes:
                for source in node.all_input_nodes:
                    if name := segmented.name_of(source):
                        self._runs.setdefault(name, set()).add(node)

    def modules(self, largest: int) -> list[Block]:
        """The outermost modules that will do."""
        every = {path for step in self._segmented.steps for path in module_paths(step.output)} - {""}
        found: list[Block] = []
        for path in sorted(every, key=lambda path: path.count(".")):
            if any(path.startswith(f"{block.name}.") for block in found):
                continue
            block = self.of_module(path)
            if block and len(block.layers) <= largest and len(block.outputs) == 1:
                found.append(block)
        # A module may run between the ops of another one.
        found.sort(key=lambda block: block.first)
        apart: list[Block] = []
        for block in found:
            if not apart or block.first > apart[-1].last:
                apart.append(block)
        return apart

    def of_module(self, path: str) -> Block | None:
        """The steps from a module's first rounded layer to its last op; None with fewer than two layers."""
        own = [index for index, step in enumerate(self._segmented.steps) if path in module_paths(step.output)]
        groups = [index for index, start in enumerate(self._starts) if own and own[0] <= start <= own[-1]]
        if not groups:
            return None
        steps = self._segmented.steps[self._starts[groups[0]] : own[-1] + 1]
        block = self._block(path, groups[0], groups[-1], steps)
        return block if len(block.layers) > 1 else None

    def activated(self) -> list[Block]:
        """Layers whose output goes through an activation before another layer sees it."""
        found = []
        for index, group in enumerate(self._segmented.groups):
            regions = [self._activation_of(node) for node in group.nodes]
            nodes = set[Node]().union(*regions)
            if nodes:
                steps = [step for step in self._segmented.steps if step.output in nodes]
                first = next(layer for layer, region in zip(group.layers, regions, strict=True) if region)
                found.append(self._block(first.name, index, index, steps))
        return found

    def _activation_of(self, layer: Node) -> set[Node]:
        """A layer and the elementwise ops of its output alone, if an activation is among them."""
        found, grown = {layer}, True
        while grown:
            following = {user for node in found for user in node.users} - found
            own = {node for node in following if _is_elementwise(node) and self._variable(node) <= found}
            found |= own
            grown = bool(own)
        return found if any(node.target in _ACTIVATIONS for node in found) else set()

    def _variable(self, node: Node) -> set[Node]:
        """What a node reads that depends on the graph's inputs."""
        return {source for source in node.all_input_nodes if source in self._positions or source.op == "placeholder"}

    def _block(self, name: str, first: int, last: int, steps: Iterable[Step]) -> Block:
        steps = tuple(steps)
        inside = {node for step in steps for node in step.nodes}
        inputs = dict.fromkeys(node for step in steps for node in step.inputs if node not in inside)
        outputs = tuple(step.output for step in steps if set(step.output.users) - inside)
        layers = [
            self._layers[step.output]
            for step in steps
            if step.output in self._layers and self._runs[self._layers[step.output].name] <= inside
        ]
        return Block(name, first, last, steps, tuple(inputs), outputs, tuple(layers))


def _is_elementwise(node: Node) -> bool:
    elementwise: Collection[Callable[..., Any]] = _ELEMENTWISE | MOVE_OPS
    return node.target in elementwise or node.op == "call_module" or node.name.startswith("getitem")


def _refuse(segmented: SegmentedGraph, path: str) -> Block:
    every = sorted({path for step in segmented.steps for path in module_paths(step.output)} - {""})
    raise UsageError(
        f"`{path}` is no module of the graph with two rounded layers or more",
        hint=f"modules of the graph are {', '.join(every[:10])}, …",
    )
