"""Tensor names of an MHA graph and of its SHA graph, matched by what the two ONNX files say of each tensor.

A tensor is known by the module that made it, its op and its position there, and a graph input or output by its place.
The path stands in a node's name (`/attn1/MatMul_1`, AIMET's `attn1.to_q#1.end`) or in what torch's exporter leaves as
metadata. So names that are mere counts (`17`, `linear_3`) are matched, too.
"""

import ast
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from sdconvert.errors import EncodingsError
from sdconvert.mha2sha.encodings_modules import ModuleMap
from sdconvert.mha2sha.encodings_onnx import INSIDE, LeftOut, module_path
from sdconvert.mha2sha.encodings_positions import split_positions

_SCOPES = "pkg.torch.onnx.name_scopes"
_STEPS = ("Mul", "MatMul", "Add", "Softmax", "Concat", "Div")
_OPS = {"Concat": "cat"}

Key = tuple[str, str, int]


@dataclass
class GraphTensors:
    """The tensors of an ONNX graph by module, op and position.

    Attributes:
        keys: Of each tensor, by name.
        names: The inverse.
        last: The last tensor that a module itself makes.
        inputs: Of the graph.
        outputs: Of the graph.
    """

    keys: dict[str, Key] = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "GraphTensors":
        """Read an ONNX file without its weights.

        Raises:
            EncodingsError: It is no ONNX file.
        """
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except (OSError, ValueError, DecodeError) as error:
            raise EncodingsError(f"`{path}` is no ONNX file: {error}", hint="export the graph again") from error
        constants = {tensor.name for tensor in graph.initializer}
        found = cls(
            inputs=[value.name for value in graph.input if value.name not in constants],
            outputs=[value.name for value in graph.output],
        )
        seen: Counter[tuple[str, str]] = Counter()
        traced = any(prop.key == _SCOPES for node in graph.node for prop in node.metadata_props)
        for node in graph.node:
            module = _module(node, traced)
            if module is None:
                continue
            key = (module, node.op_type, seen[module, node.op_type])
            seen[module, node.op_type] += 1
            found.keys[node.output[0]] = key
            found.names[key] = node.output[0]
            found.last[module] = node.output[0]
        return found

    def steps(self, module: str) -> list[Key]:
        """The computing ops of a module itself, in order of execution."""
        return [key for key in self.names if key[0] == module and key[1] in _STEPS]


class MatchedGraphs:
    """Maps tensor names of an MHA graph to those of the SHA graph, both at hand.

    Args:
        module_map: Of the modules.
        mha: ONNX file of the MHA form.
        sha: ONNX file of the SHA form, by the same exporter.
    """

    def __init__(self, module_map: ModuleMap, mha: Path, sha: Path) -> None:
        self._map = module_map
        self._mha, self._sha = GraphTensors.read(mha), GraphTensors.read(sha)

    def children(self, name: str) -> tuple[str, ...] | LeftOut:
        """Names of the tensors that stand for one."""
        for old, new in ((self._mha.inputs, self._sha.inputs), (self._mha.outputs, self._sha.outputs)):
            if name in old and len(old) == len(new):
                return (new[old.index(name)],)
        if name not in self._mha.keys:
            return LeftOut(name, "the MHA graph has no such tensor")
        key = self._mha.keys[name]
        found: Sequence[str | None]
        if key[0] in self._map.convolutions:
            if name != self._mha.last[key[0]]:
                return LeftOut(name, INSIDE)
            found = [self._sha.last.get(child) for child in self._map.convolutions[key[0]]]
        elif key[0] in self._map.heads:
            found = [self._sha.names.get(child) for child in self._of_heads(key)]
        else:
            found = [self._sha.names.get(key)]
        names = tuple(one for one in found if one is not None)
        if not names or len(names) != len(found):
            return LeftOut(name, INSIDE)
        return names

    def _of_heads(self, key: Key) -> list[Key]:
        """Keys of the SHA graph for a tensor of an attention's forward; none for moves and other processors' steps."""
        layer = key[0]
        steps = {f"{_OPS.get(op, op.lower())}.{index}": (layer, op, index) for _, op, index in self._mha.steps(layer)}
        try:
            positions = split_positions(layer, list(steps), self._map.heads[layer])
        except EncodingsError:
            return []
        ops = {_OPS.get(op, op.lower()): op for op in _STEPS}
        found = {steps[one.name]: one.children for one in positions}
        children = [child.split(".") for child in found.get(key, ())]
        return [(layer, ops[op], int(index)) for op, index in children]


def _module(node: onnx.NodeProto, traced: bool) -> str | None:
    """Path of the module that made a node's output, if the file says."""
    for prop in node.metadata_props:
        if prop.key == _SCOPES:
            with suppress(ValueError, SyntaxError):
                return str(["", *ast.literal_eval(prop.value)][-2])
    if traced:
        return None  # the exporter put it in afterwards, and a name of its own counts
    path, slash, _ = node.name.rpartition("/")
    return module_path(path if slash else node.name)
