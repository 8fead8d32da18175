"""Where a model's weights are: one file, the parts of one, or the folder of a component; complete, or an error.

Everything is read from the disk: a path is a path, and nothing here knows the network.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.errors import CheckpointError
from sdconvert.io.tensors import iterate_tensors, tensor_shapes
from sdconvert.io.weights_index import weights_file
from sdconvert.models.config_json import read_config

Shapes = dict[str, tuple[int, ...]]

_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_STEMS = ("diffusion_pytorch_model", "model")
_SHOWN = 5


@dataclass(frozen=True)
class ModelConfig:
    """One thing to load for a pipeline.

    Attributes:
        path: A weights file, a component folder (`config.json` and weights), or a diffusers folder of several.
        name: What the pipeline calls the model, where its class alone does not say; only for a single model.
    """

    path: str | Path
    name: str = ""


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one model's weights, all of them there and readable.

    Attributes:
        files: In the order of their names.
        config: Content of the `config.json` beside them; empty if there is none.
        shapes: Layout of the weights, from the headers alone.
    """

    files: tuple[Path, ...]
    config: dict[str, Any] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)

    @property
    def single(self) -> Path | None:
        """The file, if it is one alone."""
        return self.files[0] if len(self.files) == 1 else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors one after another."""
        for file in self.files:
            yield from iterate_tensors(file)


def find_weights(path: Path) -> WeightFiles:
    """Find a model's files and check that none is missing or damaged, before anybody asks what model it is.

    Args:
        path: A weights file, an index of shards, or a folder that holds one of them.

    Raises:
        CheckpointError: There is nothing, a shard is missing or lacks tensors, or a file is damaged.
    """
    if not path.exists():
        raise CheckpointError(
            f"`{path}` does not exist", hint="give a path on this disk; sdconvert does not download models"
        )
    if path.is_dir():
        path = _main_file(path)
    if path.name.endswith(_INDEX):
        return _sharded(path)
    if match := _SHARD.fullmatch(path.name):
        index = path.with_name(match["stem"] + _INDEX)
        what = f"`{path}` is one of {int(match['count'])} parts"
        if not index.is_file():
            raise CheckpointError(f"{what}, and `{index.name}` is not beside it", hint="copy the whole folder")
        raise CheckpointError(what, hint=f"give the index that names all of them, `{index}`, or its folder")
    return WeightFiles((path,), _config_beside(path), tensor_shapes(path))


def _config_beside(weights: Path) -> dict[str, Any]:
    file = weights.with_name("config.json")
    return read_config(file) if file.is_file() else {}


def _main_file(folder: Path) -> Path:
    indexes = sorted(folder.glob(f"*{_INDEX}"))
    if len(indexes) > 1:
        raise CheckpointError(
            f"`{folder}` holds {len(indexes)} indexes: {', '.join(index.name for index in indexes)}",
            hint="give the one that is meant",
        )
    if indexes:
        return indexes[0]
    if parts := sorted(file for file in folder.glob("*.safetensors") if _SHARD.fullmatch(file.name)):
        raise CheckpointError(
            f"`{folder}` holds {len(parts)} parts of a model and no index of them", hint=f"copy the *{_INDEX} file too"
        )
    stems = [stem for stem in _STEMS if any(folder.glob(f"{stem}.*"))] or [_STEMS[0]]
    # transformers calls its pickles pytorch_model.bin, which the stem `model` finds.
    return weights_file(folder, "model" if (folder / "pytorch_model.bin").is_file() else stems[0])


def _sharded(index: Path) -> WeightFiles:
    places = read_config(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"`{index}` has no weight_map", hint="copy or download it again")
    files = {name: index.parent / name for name in sorted(set(map(str, places.values())))}
    if missing := [name for name, file in files.items() if not file.is_file()]:
        shown = ", ".join(missing[:_SHOWN]) + (f", and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise CheckpointError(
            f"`{index.parent}` lacks {len(missing)} of {len(files)} files that its index names: {shown}",
            hint="download or copy them; the others are there",
        )
    layouts = {name: tensor_shapes(file) for name, file in files.items()}
    if strays := [key for key, name in places.items() if key not in layouts[name]]:
        raise CheckpointError(
            f"`{index}` says that `{places[strays[0]]}` holds {strays[0]}, which it does not "
            f"({len(strays)} such tensors)",
            hint="the index and the files are of different downloads: copy all of them again",
        )
    shapes = {key: shape for layout in layouts.values() for key, shape in layout.items()}
    return WeightFiles(tuple(files.values()), _config_beside(index), shapes)
