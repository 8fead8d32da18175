"""The three dictionaries of many samples between two phases of a pipeline: tensors on the disk, the rest in memory."""

from pathlib import Path

from torch import Tensor

from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.pipelines.unit import Inputs

Sides = tuple[Inputs, Inputs, Inputs]


class InputsSpill:
    """Holds inputs by sample name; reading gives what was put there, bit for bit.

    Args:
        folder: Where the tensors go; removed by whoever made it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rest: dict[str, Sides] = {}

    def put(self, name: str, inputs: Sides) -> None:
        """Keep the inputs of a sample in the place of earlier ones."""
        tensors = {
            f"{index}/{key}": value.contiguous()
            for index, part in enumerate(inputs)
            for key, value in part.items()
            if isinstance(value, Tensor)
        }
        shared, posi, nega = (
            {key: None if isinstance(value, Tensor) else value for key, value in part.items()} for part in inputs
        )
        self._rest[name] = shared, posi, nega
        save_tensors(tensors, self._folder / f"{name}.safetensors")

    def get(self, name: str) -> Sides:
        """The inputs of a sample, keys in their order."""
        shared, posi, nega = (dict(part) for part in self._rest[name])
        for key, tensor in load_tensors(self._folder / f"{name}.safetensors").items():
            index, _, own = key.partition("/")
            (shared, posi, nega)[int(index)][own] = tensor
        return shared, posi, nega
