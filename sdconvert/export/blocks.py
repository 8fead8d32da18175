"""An exported graph cut into the model's blocks, and what the tensors between them hold."""

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import ModelProto

from sdconvert.export.origin import key_of, nearest_sources


@dataclass(frozen=True)
class Block:
    """A block of the model as a part of the graph.

    Attributes:
        path: Of the module.
        inputs: Names of the ONNX tensors that enter, before their Q/DQ pair, by key; a graph input's key is `:name`.
        outputs: Names of the ONNX tensors that leave, behind their pair, by key.
    """

    path: str
    inputs: dict[str, str]
    outputs: dict[str, str]


def cut_into_blocks(model: ModelProto, paths: Sequence[str]) -> list[Block]:
    """Find what enters and leaves each block.

    A tensor belongs to the block that has its module. What lies between blocks belongs to the block that reads it, or,
    where it is an output of the graph, to the block before.

    Args:
        model: As `to_onnx` makes it.
        paths: Of the blocks, in execution order.
    """
    cutter = _Cutter(model, paths)
    entering: dict[str, dict[str, str]] = {path: {} for path in paths}
    leaving: dict[str, dict[str, str]] = {path: {} for path in paths}
    for tensor, block in cutter.blocks.items():
        for source in cutter.sources(tensor):
            maker = cutter.blocks.get(source)
            if maker == block:
                continue
            entering[block][cutter.key(source)] = cutter.before_pair(source)
            if maker is not None:
                leaving[maker][cutter.key(source)] = source
    for value in model.graph.output:
        leaving[cutter.blocks[value.name]][cutter.key(value.name)] = value.name
    return [Block(path, entering[path], leaving[path]) for path in paths if leaving[path]]


class _Cutter:
    """Tensors with a key, and the block of each."""

    def __init__(self, model: ModelProto, paths: Sequence[str]) -> None:
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._inputs = {value.name for value in model.graph.input}
        self._keys = {node.output[0]: key_of(node) for node in model.graph.node if key_of(node)}
        self.blocks: dict[str, str] = {}
        outputs = {value.name for value in model.graph.output}
        for tensor, key in self._keys.items():
            if block := _block(key.partition(":")[0], paths):
                self.blocks[tensor] = block
            elif tensor in outputs:
                self.blocks[tensor] = next(
                    self.blocks[source] for source in self.sources(tensor) if source in self.blocks
                )

    def key(self, tensor: str) -> str:
        """Of a tensor, or of a graph input."""
        return self._keys.get(tensor, f":{tensor}")

    def before_pair(self, tensor: str) -> str:
        """The tensor that a pair quantizes; a graph input is one already."""
        return tensor if tensor in self._inputs else str(self._producers[self._producers[tensor].input[0]].input[0])

    def sources(self, tensor: str) -> list[str]:
        """The nearest tensors of blocks, and graph inputs, from which one is computed."""
        return list(nearest_sources(tensor, self._producers, self.blocks.keys() | self._inputs))


def _block(module: str, paths: Sequence[str]) -> str:
    """The path of the block that has a module; empty if none has."""
    return next((path for path in paths if module == path or module.startswith(f"{path}.")), "")
