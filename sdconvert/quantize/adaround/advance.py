"""Two frontiers walk through a graph, sample by sample: the floating-point path and the quantized one.

Between two groups of layers every sample's live tensors wait in the `ActivationStore`. Each path runs each sample once,
and where the two are the same only one does: at most 2 N forwards in all, however many layers there are. AIMET runs the
model from its input again for every layer.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from sdconvert.errors import UsageError
from sdconvert.quantize.adaround.steps import RoundedGroup, SegmentedGraph
from sdconvert.quantize.adaround.store import ActivationStore
from sdconvert.quantize.simplify import attribute

Path = str
FLOATING, QUANTIZED, BOTH = "floating", "quantized", "both"
Weights = Callable[[str], Tensor | None]
"""Gives the quantized path's value of a parameter, None where it is the model's own."""


class Frontiers:
    """The samples of a calibration set on both paths.

    Args:
        segmented: The graph.
        store: For the tensors between two segments.
        sequential: The quantized path exists; without, both are the floating-point one.
        quantizers: The graph's quantizers are active on the quantized path.
        weights: Names of parameters that have other values on it.

    Attributes:
        ops: Steps that were run, by path.
    """

    def __init__(
        self,
        segmented: SegmentedGraph,
        store: ActivationStore,
        *,
        sequential: bool,
        quantizers: bool,
        weights: Collection[str],
    ) -> None:
        self._segmented, self._store, self._quantizers = segmented, store, quantizers
        self._paths = [FLOATING, QUANTIZED] if sequential else [FLOATING]
        self._differing = segmented.differing(quantizers=quantizers, weights=weights) if sequential else set[Node]()
        self._labels: list[str] = []
        self.ops = dict.fromkeys(self._paths, 0)

    @property
    def forwards(self) -> float:
        """Runs of the whole graph that the steps so far amount to, both paths together."""
        return sum(self.ops.values()) / max(1, len(self._segmented.steps))

    def ingest(self, samples: Iterable[Mapping[str, Tensor]], labels: Callable[[int], str]) -> None:
        """Put the graph's inputs of all samples into the store.

        Args:
            samples: By input name.
            labels: What a message calls a sample.

        Raises:
            UsageError: A sample does not have the graph's inputs, in its shapes.
        """
        for index, sample in enumerate(samples):
            self._labels.append(labels(index))
            for node in self._segmented.inputs:
                tensor = sample.get(node.name)
                shape = tuple(node.meta["val"].shape)
                if tensor is None or tuple(tensor.shape) != shape or len(sample) != len(self._segmented.inputs):
                    found = ", ".join(f"{name} {tuple(value.shape)}" for name, value in sample.items())
                    raise UsageError(
                        f"{self._labels[-1]} is no input of this graph: it wants `{node.name}` of shape {shape}, "
                        f"the sample has {found}",
                        hint="take the calibration data of this model, at this size",
                    )
                for path in self._paths:
                    self._put(index, path, node, tensor)

    def advance(self, index: int, weights: Weights) -> None:
        """Run one segment on every sample and path, up to the inputs of the layers behind it.

        Args:
            index: Of the segment.
            weights: Of the quantized path.
        """
        constants = {path: Constants(self._segmented, self._active(path), weights) for path in self._paths}
        differs = any(step.output in self._differing for step in self._segmented.segments[index])
        for sample in range(len(self._labels)):
            for path in self._paths:
                if path == FLOATING or differs:
                    self._run(index, sample, path, constants[path])
                else:  # it would only compute the same once more
                    self._skip(index, sample, path)

    def outputs(self, weights: Weights) -> Iterator[dict[Path, list[Tensor]]]:
        """Run the last segment; yield the graph's outputs of every sample, by path.

        Args:
            weights: Of the quantized path.
        """
        last = len(self._segmented.segments) - 1
        constants = {path: Constants(self._segmented, self._active(path), weights) for path in self._paths}
        for sample in range(len(self._labels)):
            values = {path: self._run(last, sample, path, constants[path]) for path in self._paths}
            yield {path: [found[node] for node in self._segmented.outputs] for path, found in values.items()}

    def inputs_of(self, group: RoundedGroup, samples: Sequence[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """A group's input of some samples: on the quantized path, and what the floating-point path has more.

        Raises:
            UsageError: It is not finite; the message names layer and sample.
        """
        for sample in samples:
            quantized = self._look(sample, self._paths[-1], group.input)
            if not quantized.isfinite().all():
                raise UsageError(
                    f"the input of `{group.layers[0].name}` is not finite in {self._labels[sample]}",
                    hint="check the model and the calibration data in fp32",
                )
            if group.input not in self._differing:
                yield quantized, None
            else:
                yield quantized, self._look(sample, FLOATING, group.input) - quantized

    def hold(self, nodes: Iterable[Node]) -> None:
        """Have values of all samples stay on the quantized path, beyond what the segments need."""
        for key in self._keys(nodes):
            self._store.hold(key)

    def release(self, nodes: Iterable[Node]) -> None:
        """Let go of what was held."""
        for key in self._keys(nodes):
            self._store.release(key)

    def value(self, sample: int, path: Path, node: Node) -> Tensor:
        """A waiting value; with `fp` inputs both paths are the floating-point one."""
        return self._look(sample, path if path in self._paths else FLOATING, node)

    def replace(self, sample: int, node: Node, value: Tensor) -> None:
        """Another value on the quantized path, if one is waiting there."""
        key = self._key(sample, self._paths[-1], node)
        if node in self._differing and key in self._store:
            self._store.replace(key, value)

    def _keys(self, nodes: Iterable[Node]) -> list[tuple[int, str, Path]]:
        return [self._key(sample, self._paths[-1], node) for node in nodes for sample in range(len(self._labels))]

    def _run(self, index: int, sample: int, path: Path, constants: "Constants") -> dict[Node, Any]:
        """Run a segment on one sample and path; return what is left of its values."""
        segment, reads = self._segmented.segments[index], self._segmented.reads[index]
        values: dict[Node, Any] = {node: self._store.take(self._key(sample, path, node)) for node in reads}
        for position, step in enumerate(segment):
            values[step.output] = step.run(values, constants.call)
            self._put(sample, path, step.output, values[step.output])
            self.ops[path] += 1
            for node in self._segmented.last_reads[index].get(position, ()):
                del values[node]
        return values

    def _skip(self, index: int, sample: int, path: Path) -> None:
        """Count what a segment reads as taken."""
        for node in self._segmented.reads[index]:
            self._store.release(self._key(sample, path, node))

    def _active(self, path: Path) -> bool | None:
        """Whether quantizers are active on a path; None on the floating-point path, which has no other weights."""
        return self._quantizers if path == QUANTIZED else None

    def _key(self, sample: int, path: Path, node: Node) -> tuple[int, str, Path]:
        return sample, node.name, path if node in self._differing else BOTH

    def _put(self, sample: int, path: Path, node: Node, value: Any) -> None:
        uses = self._segmented.uses.get(node)
        if uses is None:
            return
        if node in self._differing:
            self._store.put(self._key(sample, path, node), value, uses)
        elif path == FLOATING:
            self._store.put(self._key(sample, path, node), value, uses * len(self._paths))

    def _look(self, sample: int, path: Path, node: Node) -> Tensor:
        return self._store.look(self._key(sample, path, node))


class Constants:
    """Computes nodes on one path during one segment: parameters, and all that depends on nothing else, only once.

    Args:
        segmented: The graph.
        quantizers: They are active; None on the floating-point path, which has no other weights.
        weights: Of the quantized path.
    """

    def __init__(self, segmented: SegmentedGraph, quantizers: bool | None, weights: Weights) -> None:
        self._segmented, self._quantizers = segmented, bool(quantizers)
        self._weights: Weights = weights if quantizers is not None else lambda _: None
        self._known: dict[Node, Any] = {}

    def call(self, node: Node, values: dict[Node, Any]) -> Any:
        """One node's value from those of the nodes that it reads."""

        def value(source: Node) -> Any:
            return values[source] if source in values else self._constant(source)

        if node.op == "call_module":
            (source,) = node.all_input_nodes
            if not self._quantizers or self._own(source) is not None:
                return value(source)
            quantizer = self._segmented.graph_module.get_submodule(str(node.target))
            return self.quantize(quantizer, value(source))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        target: Any = node.target
        return target(*args, **kwargs)

    def quantize(self, quantizer: nn.Module, value: Tensor) -> Tensor:
        """A value on its grid."""
        # AIMET returns a tensor class of its own.
        quantized: Tensor = quantizer(value).as_subclass(Tensor)
        return quantized

    def _constant(self, node: Node) -> Any:
        if node not in self._known:
            if node.op != "get_attr":
                self._known[node] = self.call(node, {})
            else:
                own = self._own(node)
                self._known[node] = attribute(self._segmented.graph_module, node).detach() if own is None else own
        return self._known[node]

    def _own(self, node: Node) -> Tensor | None:
        """The quantized path's own value of a parameter."""
        name = self._segmented.name_of(node)
        return self._weights(name) if name is not None else None
