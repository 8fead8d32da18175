"""Weights on disk as a map from names to byte ranges: one file, or several behind an index; read and written.

An index says which tensors there are, of which type and shape, and where their bytes lie. Reading it costs a header
or a pickle, whatever the size of the weights.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.io.files import atomic_file, disk_full, write_text_atomic
from sdconvert.io.safetensors_file import read_safetensors, write_safetensors
from sdconvert.io.stored_tensor import Piece, StoredTensor, is_text
from sdconvert.io.torch_file import read_torch_file, write_torch_file

INDEX_SUFFIX = ".index.json"
_SAFETENSORS = ".safetensors"
WEIGHTS_SUFFIXES = (_SAFETENSORS, ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class FileLayout:
    """One weights file: names and shapes in its order, and its metadata."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


@dataclass(frozen=True)
class WeightsLayout:
    """What weights are beside their values: files, order, shapes, metadata.

    Attributes:
        name: Of the file, or of the index.
        order: Of all tensors in the index; empty without one.
        index_metadata: Of the index.
        files: At least one.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    name: str
    order: list[str]
    index_metadata: dict[str, Any]
    files: list[FileLayout]

    @classmethod
    def parse(cls, value: object, where: Path) -> Self:
        """Check what a file says.

        Args:
            value: What `dataclasses.asdict` gave, after a way through JSON.
            where: The file that it was read from.

        Raises:
            CheckpointError: It is something else, or names files outside the folder.
        """
        # Here only: the way there writes a layout and reads none, and is a third of a second shorter without.
        from pydantic import TypeAdapter, ValidationError

        try:
            layout = TypeAdapter(cls).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(
                f"`{where}` describes no weights: {place}: {first['msg']}", hint="convert the folder again"
            ) from error
        files = [file.name for file in layout.files]
        _require_plain_names(where, [layout.name, *files])
        names = [name for file in layout.files for name in file.shapes]
        is_sharded = layout.name.endswith(INDEX_SUFFIX)
        if (
            len(set(files)) != len(files)
            or len(set(names)) != len(names)
            or sorted(layout.order) != (sorted(names) if is_sharded else [])
            or not (files if is_sharded else files == [layout.name])
        ):
            raise CheckpointError(
                f"`{where}` describes no weights: its files, names and order contradict each other",
                hint="convert the folder again",
            )
        return layout


@dataclass(frozen=True)
class WeightsFile:
    """One file of weights; tensors in its order."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class WeightsIndex:
    """All tensors of a model.

    Args:
        path: The file, or the index of several.
        files: At least one.
        order: Names of all tensors: the index's order, or the file's.
        metadata: Of the index.
    """

    path: Path
    files: tuple[WeightsFile, ...]
    order: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_sharded(self) -> bool:
        """Whether an index lies before the files."""
        return self.path.name.endswith(INDEX_SUFFIX)

    @property
    def suffix(self) -> str:
        """Of the files that hold the tensors."""
        return self.files[0].path.suffix

    @property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors, in order."""
        found = {name: tensor for file in self.files for name, tensor in file.tensors.items()}
        return {name: found[name] for name in self.order}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes, in order."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def layout(self) -> WeightsLayout:
        """All but the values."""
        files = [
            FileLayout(
                name=file.path.name,
                shapes={name: tensor.shape for name, tensor in file.tensors.items()},
                metadata=dict(file.metadata),
            )
            for file in self.files
        ]
        order = list(self.order) if self.is_sharded else []
        return WeightsLayout(name=self.path.name, order=order, index_metadata=dict(self.metadata), files=files)


def read_index(path: Path) -> WeightsIndex:
    """Read where the tensors of weights lie.

    Args:
        path: A `.safetensors`, `.pth`, `.pt` or `.bin` file, or the `.index.json` of several.

    Raises:
        CheckpointError: A file is missing, damaged, hostile, or not what its index says.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        file = _read_file(path)
        return WeightsIndex(path, (file,), tuple(file.tensors))
    weight_map, metadata = _read_index_json(path)
    _require_plain_names(path, list(weight_map.values()))
    names = sorted(set(weight_map.values()))
    files = tuple(_read_file(path.parent / name) for name in names)
    if len({file.path.suffix for file in files}) != 1:
        raise CheckpointError(f"`{path}` names files of {len(files)} formats or none", hint="save the model again")
    for file in files:
        mapped = {name for name, shard in weight_map.items() if shard == file.path.name}
        if odd := sorted(mapped ^ file.tensors.keys()):
            where = "lacks" if odd[0] in mapped else "holds, without an entry in the index,"
            raise CheckpointError(
                f"`{file.path}` {where} `{odd[0]}` of `{path.name}` ({len(odd)} such tensors)",
                hint="the files belong to different models, or one is damaged: copy or download them again",
            )
    return WeightsIndex(path, files, tuple(weight_map), metadata)


@dataclass(frozen=True)
class OutputFile:
    """A weights file to be written."""

    name: str
    pieces: Sequence[Piece]
    metadata: Mapping[str, str]


def write_weights(
    folder: Path,
    files: Sequence[OutputFile],
    index: str | None = None,
    order: Sequence[str] = (),
    index_metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights file by file, each whole or not at all, in the format of its suffix.

    Args:
        folder: Of all files.
        files: Plain names, distinct.
        index: Name of the index to write; None: a single file stands alone.
        order: Of all tensors in the index.
        index_metadata: Of the index, beside the total size.

    Returns:
        The index, or the single file.

    Raises:
        CheckpointError: A tensor's type does not exist in the format, or a source changed while it was read.
        EnvironmentProblem: The disk is full.
        UsageError: A suffix is unknown.
    """
    for file in files:
        if (suffix := Path(file.name).suffix) not in WEIGHTS_SUFFIXES:
            raise UsageError(
                f"`{file.name}` has no suffix of a weights file", hint=f"use one of {', '.join(WEIGHTS_SUFFIXES)}"
            )
        with atomic_file(folder / file.name) as temporary:
            if sum(piece.nbytes for piece in file.pieces) > shutil.disk_usage(folder).free:
                raise disk_full(folder)
            if suffix == _SAFETENSORS:
                write_safetensors(temporary, file.pieces, file.metadata)
            else:
                write_torch_file(temporary, file.pieces, Path(file.name).stem)
    if index is None:
        return folder / files[0].name
    shards = {piece.name: file.name for file in files for piece in file.pieces}
    total = sum(piece.nbytes for file in files for piece in file.pieces)
    content = {
        "metadata": {**(index_metadata or {}), "total_size": total},
        "weight_map": {name: shards[name] for name in order},
    }
    write_text_atomic(json.dumps(content, indent=2) + "\n", folder / index)
    return folder / index


def weights_file(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    """Find `<stem>.safetensors` or `<stem>.bin` in a model folder; safetensors wins.

    Args:
        folder: A component folder of a diffusers or transformers checkpoint.
        stem: `diffusion_pytorch_model`; for transformers, `model` also finds `pytorch_model.bin`.

    Raises:
        CheckpointError: No such folder or file; the message lists what is there.
    """
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` is not a folder", hint="give the folder that holds config.json and weights")
    pickle_stem = "pytorch_model" if stem == "model" else stem
    names = (f"{stem}.safetensors", f"{pickle_stem}.bin")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(entry.name for entry in folder.iterdir())) or "nothing"
    raise CheckpointError(
        f"`{folder}` holds neither {names[0]} nor {names[1]}; it holds {there}",
        hint="download the weights of this component, or name the right folder",
    )


def require_weights_file(path: Path) -> None:
    """Check that there is a file, and that its name ends as those of weights do.

    Raises:
        CheckpointError: It does not, or there is none.
    """
    if path.suffix not in WEIGHTS_SUFFIXES:
        raise CheckpointError(f"`{path}` is no weights file", hint=f"known suffixes: {', '.join(WEIGHTS_SUFFIXES)}")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"weights file `{path}` {what}", hint="check the path, or download the file again")


def _read_file(path: Path) -> WeightsFile:
    require_weights_file(path)
    if path.suffix == _SAFETENSORS:
        return WeightsFile(path, *read_safetensors(path))
    return WeightsFile(path, read_torch_file(path), {})


def _read_index_json(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_distinct(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` cannot be read as JSON: {error}", hint="copy or download it again, with the files that it names"
        ) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    metadata = content.get("metadata") or {} if isinstance(content, dict) else {}
    if not (
        isinstance(weight_map, dict)
        and weight_map
        and isinstance(metadata, dict)
        and all(is_text(name) and isinstance(file, str) for name, file in weight_map.items())
    ):
        raise CheckpointError(f"`{path}` has no `weight_map` from tensors to files", hint="save the model again")
    return weight_map, metadata


def _distinct(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise CheckpointError(f"`{path}` names a tensor twice", hint="save the model again")
        return found

    return check


def _require_plain_names(where: Path, names: Sequence[str]) -> None:
    # A name from a file must not lead out of the folder, nor to a file that is not of this kind.
    for name in names:
        if Path(name).name != name or not is_text(name) or "\0" in name:
            raise CheckpointError(
                f"`{where}` names a file outside its folder: {name!r:.80}", hint="do not use this file"
            )
