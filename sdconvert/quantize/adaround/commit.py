"""Finished groups on disk, one file each: integer codes, scales and figures. What is there need not be solved again."""

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from sdconvert.io.encodings import Encoding
from sdconvert.io.tensors import load_tensors, read_metadata, save_tensors
from sdconvert.quantize.adaround.blocks import BlockFigures
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.layers import RoundedLayer
from sdconvert.quantize.adaround.solve import LayerFigures, LayerResult

_CODES, _SCALE, _LOWEST, _BIAS = "codes", "scale", "lowest", "bias"
_SAID = "group"


@dataclass(frozen=True)
class CommittedGroup:
    """A file of one group, and what it says.

    Attributes:
        path: The file.
        layers: Those that count, by weight.
        grids: Of their weights.
        figures: Of the layers. In a block they are those of the rounding by moments that it began with.
        block: Figures of the block, if the file is of one.
        biases: That changed with the codes, by weight.
    """

    path: Path
    layers: dict[str, RoundedLayer]
    grids: dict[str, CodeGrid]
    figures: dict[str, LayerFigures]
    block: BlockFigures | None = None
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> "CommittedGroup":
        """The same without layers that a block has rounded again."""
        kept = [name for name in self.layers if name not in names]
        return replace(
            self,
            layers={name: self.layers[name] for name in kept},
            grids={name: self.grids[name] for name in kept},
            figures={name: self.figures[name] for name in kept},
            biases={name: bias for name, bias in self.biases.items() if name in kept},
        )

    def codes(self, name: str) -> Tensor:
        """Integer codes of a weight, in its shape: w = scale * code."""
        return load_tensors(self.path)[f"{name}/{_CODES}"].reshape(self.layers[name].weight_shape)

    def weight(self, name: str) -> Tensor:
        """A weight as rounded, in its shape."""
        layer = self.layers[name]
        return self.grids[name].dequantize(self.codes(name).flatten(1)).reshape(layer.weight_shape)


class Commits:
    """The groups that are done, in a folder of their own.

    Args:
        folder: Made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def sweep(self, fingerprints: Sequence[str]) -> None:
        """Remove what does not belong to these groups: those of another request, and half-written files."""
        kept = {self._path(fingerprint) for fingerprint in fingerprints}
        for path in self._folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in kept:
                path.unlink()

    def drop(self, groups: Sequence[CommittedGroup]) -> None:
        """Remove groups of which nothing counts any more."""
        for group in groups:
            group.path.unlink()

    def find(
        self, fingerprint: str, layers: Sequence[RoundedLayer], grids: Mapping[str, CodeGrid]
    ) -> CommittedGroup | None:
        """A finished group; None if there is no such.

        Args:
            fingerprint: Of all that decides its codes.
            layers: Of the group.
            grids: Of their weights, which may be refitted.
        """
        path = self._path(fingerprint)
        if not path.is_file():
            return None
        said = json.loads(read_metadata(path)[_SAID])
        figures, block = said["figures"], said["block"]
        tensors = load_tensors(path)
        return CommittedGroup(
            path,
            {layer.name: layer for layer in layers},
            {layer.name: grids[layer.name].with_scale(tensors[f"{layer.name}/{_SCALE}"].clone()) for layer in layers},
            {name: LayerFigures(**values) for name, values in figures.items()},
            BlockFigures(**block) if block else None,
            {layer.name: tensors[key].clone() for layer in layers if (key := f"{layer.name}/{_BIAS}") in tensors},
        )

    def commit(
        self,
        fingerprint: str,
        layers: Sequence[RoundedLayer],
        results: Mapping[str, LayerResult],
        block: BlockFigures | None = None,
    ) -> CommittedGroup:
        """Write a group, whole or not at all.

        Args:
            fingerprint: Of all that decides its codes.
            layers: Of the group.
            results: By weight.
            block: Figures of the block that the group is.

        Raises:
            EnvironmentProblem: The disk is full.
        """
        tensors = {}
        for name, result in results.items():
            small = int(result.codes.min()) >= -128 and int(result.codes.max()) <= 127
            tensors[f"{name}/{_CODES}"] = result.codes.to(torch.int8) if small else result.codes
            tensors[f"{name}/{_SCALE}"] = result.grid.scale
            tensors[f"{name}/{_LOWEST}"] = result.grid.lowest
            if result.bias is not None:
                tensors[f"{name}/{_BIAS}"] = result.bias
        figures = {name: asdict(result.figures) for name, result in results.items()}
        said = {"figures": figures, "fingerprint": fingerprint, "block": asdict(block) if block else None}
        # Under one key: several would be written in any order, and equal groups as unequal files.
        save_tensors(tensors, self._path(fingerprint), {_SAID: json.dumps(said)})
        found = self.find(fingerprint, layers, {name: result.grid for name, result in results.items()})
        assert found is not None  # for the type checker
        return found

    def _path(self, fingerprint: str) -> Path:
        return self._folder / f"{fingerprint[:32]}.safetensors"


def parameter_encodings(groups: Sequence[CommittedGroup]) -> dict[str, list[Encoding]]:
    """Encodings of all rounded weights, in AIMET's form 0.6.1."""
    return {name: grid.encodings() for group in groups for name, grid in group.grids.items()}
