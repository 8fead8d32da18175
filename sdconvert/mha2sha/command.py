"""`sdconvert mha2sha`: a folder with the MHA form of weights and encodings → a folder with the SHA form."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.artifacts import atomic_folder
from sdconvert.errors import CheckpointError, UsageError
from sdconvert.io.encodings import read_encodings, write_encodings, write_params
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.mha2sha.encodings import split_activations, split_parameters
from sdconvert.mha2sha.heads import attention_paths, head_splits, heads_from_config
from sdconvert.mha2sha.row_split import RowSplit
from sdconvert.mha2sha.state_dict import split_state_dict

_STEM = "state_dict_mha"
_PARAMS = "parameters_mha.encodings"
_FORMATS = ("safetensors", "pth")


@dataclass(frozen=True)
class Mha2ShaSummary:
    """What one conversion did."""

    source: Path
    out: Path
    attention_layers: int
    heads: int
    tensors_before: int
    tensors_after: int
    files: tuple[str, ...]


def convert_folder(source: Path, out: Path, num_heads: int | None = None, format: str | None = None) -> Mha2ShaSummary:
    """Write the SHA form of a folder; the source is not touched and `out` appears whole or not at all.

    Args:
        source: Holds `state_dict_mha.{safetensors,pth}`; besides, optionally, `config.json`, `parameters_mha.encodings`
            and files `<graph>.encodings`.
        out: Folder to write: `state_dict_sha.*`, `parameters_sha.encodings`, `<graph>.encodings`.
        num_heads: Of every layer; only where there is no `config.json`.
        format: `safetensors` or `pth`; None: the source's.

    Raises:
        CheckpointError: Weights or heads are wrong; nothing is written.
        EncodingsError: An encodings file does not fit.
        UsageError: `num_heads` or `format` has no effect or is missing.
    """
    if format is not None and format not in _FORMATS:
        raise UsageError(f"no format is called `{format}`", hint=f"choose {' or '.join(_FORMATS)}")
    if out.resolve() == source.resolve():
        raise UsageError(f"`{out}` is the source itself", hint="name another folder with -o")
    weights = _weights(source)
    state_dict = load_tensors(weights)
    splits = head_splits(
        {key: tuple(tensor.shape) for key, tensor in state_dict.items()},
        _heads(source, list(state_dict), num_heads),
    )
    converted = split_state_dict(state_dict, splits)
    with atomic_folder(out) as partial:
        suffix = f".{format}" if format else weights.suffix
        save_tensors(converted, partial / f"state_dict_sha{suffix}")
        _convert_encodings(source, partial, splits, list(state_dict))
        if (config := source / "config.json").is_file():
            (partial / config.name).write_bytes(config.read_bytes())
        files = tuple(sorted(path.name for path in partial.iterdir()))
    layers = {split.layer: len(split.parts) for split in splits}
    return Mha2ShaSummary(source, out, len(layers), sum(layers.values()), len(state_dict), len(converted), files)


def _weights(source: Path) -> Path:
    found = [source / f"{_STEM}.{suffix}" for suffix in _FORMATS if (source / f"{_STEM}.{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"`{source}` holds both {' and '.join(p.name for p in found)}", hint="keep one of them")
    there = ", ".join(sorted(path.name for path in source.iterdir())[:10]) if source.is_dir() else "no folder"
    raise CheckpointError(
        f"`{source}` holds no {_STEM}.safetensors or {_STEM}.pth; found: {there or 'nothing'}",
        hint="name a folder that the quantize stage or AIMET wrote",
    )


def _heads(source: Path, keys: list[str], num_heads: int | None) -> dict[str, int]:
    config = source / "config.json"
    layers = attention_paths(keys)
    if not config.is_file():
        if num_heads is None:
            raise UsageError(
                f"`{source}` has no config.json, so the head counts are unknown", hint="give them with --num-heads N"
            )
        return dict.fromkeys(layers, num_heads)
    if num_heads is not None:
        raise UsageError(
            f"--num-heads has no effect: `{config}` says the head count of every layer", hint="leave --num-heads out"
        )
    try:
        content: Any = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"`{config}` is no JSON: {error}", hint="copy it again from the checkpoint") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"`{config}` holds a {type(content).__name__}, not an object", hint="copy it again")
    return heads_from_config(content, layers)


def _convert_encodings(source: Path, out: Path, splits: list[RowSplit], keys: list[str]) -> None:
    params = source / _PARAMS
    if params.is_file():
        sections = read_encodings(params)
        write_params(out / "parameters_sha.encodings", split_parameters(sections["param_encodings"], splits, keys))
    for path in sorted(source.glob("*.encodings")):
        if path == params:
            continue
        sections = read_encodings(path)
        converted = split_activations(sections, splits)
        converted["param_encodings"] = split_parameters(sections["param_encodings"], splits, keys)
        write_encodings(out / path.name, converted)
