"""`sdconvert mha2sha`: weights and encodings in MHA form → the SHA form, read again and compared; and back."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.io.files import atomic_folder
from sdconvert.io.weights_index import WeightsLayout, read_index
from sdconvert.mha2sha.head_counts import heads_from_config, read_heads_file
from sdconvert.mha2sha.heads import attention_paths, head_splits, plan_splits
from sdconvert.mha2sha.name_map import NAME, NameMap
from sdconvert.mha2sha.rewrites import rewrite_splits
from sdconvert.mha2sha.row_split import RowSplit
from sdconvert.mha2sha.source import Source, find_source, renamed, stem
from sdconvert.mha2sha.state_dict import merge_weights, split_weights, verify_weights

FORMATS = ("safetensors", "pth")


class ModelProof(Protocol):
    """Runs the model in both forms; see `sdconvert.mha2sha.proof.Proof`, which needs torch as nothing here does."""

    @property
    def samples(self) -> Any:
        """What ranges per head are taken from, or None."""

    def __call__(self, folder: Path) -> dict[str, float]:
        """Compare a folder in SHA form with the model; return the worst figures."""


@dataclass(frozen=True)
class Mha2ShaSummary:
    """What one conversion did.

    Attributes:
        source: Folder or file that was read.
        out: Folder that was written.
        attention_layers: That were rewritten.
        heads: Of all these layers together.
        tensors_before: In the source.
        tensors_after: In the result.
        verified_tensors: Read again and compared with their rows, byte for byte; None without verification.
        verified_grids: Parameters whose encodings were read again and compared; None without verification.
        left_alone: Attention layers that were not rewritten, and why.
        left_out: Entries of encodings files that have no place in the result, and why.
        files: Names of what was written.
        figures: The worst of the proof; empty without one.
    """

    source: Path
    out: Path
    attention_layers: int
    heads: int
    tensors_before: int
    tensors_after: int
    verified_tensors: int | None
    verified_grids: int | None
    left_alone: Mapping[str, str]
    left_out: Mapping[str, str]
    files: tuple[str, ...]
    figures: Mapping[str, float] = field(default_factory=dict)


def convert_folder(
    source: Path,
    out: Path,
    num_heads: int | None = None,
    format: str | None = None,
    *,
    heads_file: Path | None = None,
    skip_unsupported: bool = False,
    rewrites: Sequence[str] = (),
    proof: ModelProof | None = None,
    verify: bool = True,
) -> Mha2ShaSummary:
    """Write the SHA form of a model; the source is not touched and `out` appears whole or not at all.

    Args:
        source: A folder with `state_dict_mha.{safetensors,pth}`, a diffusers model folder, or one weights file; see
            `find_source`. A folder's `config.json` gives the heads, its `*.encodings` are converted along.
        out: Folder to write: the same files in SHA form, and `heads.json`.
        num_heads: Of every layer; only where there is no `config.json`.
        format: `safetensors` or `pth`; None: the source's.
        heads_file: JSON of heads by layer, likewise.
        skip_unsupported: Leave layers alone that cannot be split, instead of refusing the model; the summary names
            them.
        rewrites: Beside attention per head, by name: `sdconvert.models.rewrite_names.REWRITES`.
        proof: Runs the model in both forms before the result appears.
        verify: Read what was written and compare every tensor and every grid with the source's.

    Raises:
        CheckpointError: Weights or heads are wrong; nothing is written.
        EncodingsError: An encodings file does not fit.
        QualityGateError: What was written is not what was read.
        UsageError: An option has no effect or is missing.
        SdconvertError: What the proof raises.
    """
    suffix = _suffix(format)
    files = find_source(source)
    _require_other_folder(files, out)
    index = read_index(files.weights)
    heads = _heads(files, index.shapes, num_heads, heads_file)
    splits, left_alone = (
        plan_splits(index.shapes, heads) if skip_unsupported else (head_splits(index.shapes, heads), {})
    )
    heads = {layer: count for layer, count in heads.items() if layer not in left_alone}
    splits = _in_order([*splits, *rewrite_splits(index.shapes, rewrites)], index.shapes)
    with atomic_folder(out) as partial:
        # The system copies the weights; Python is free for the encodings meanwhile.
        with ThreadPoolExecutor(1) as background:
            name = stem(Path(renamed(files.weights.name, "sha")))
            weights = background.submit(split_weights, index, splits, partial, name, suffix)
            records, left_out, grids = _split_encodings(
                files,
                partial,
                splits,
                list(index.shapes),
                # For the reverse, `heads.json` keeps the ranges that the proof will change.
                keep_ranges=proof is not None and proof.samples is not None,
                verify=verify,
            )
            if files.config:
                (partial / files.config.name).write_bytes(files.config.read_bytes())
            layout = asdict(index.layout())
            NameMap(tuple(splits), heads, left_alone, layout, records, tuple(rewrites)).save(partial)
        written = weights.result()
        tensors = verify_weights(index, read_index(written), splits) if verify else None
        figures = proof(partial) if proof else {}
        names = tuple(sorted(path.name for path in partial.iterdir()))
    return Mha2ShaSummary(
        source=source,
        out=out,
        attention_layers=len(heads),
        heads=sum(heads.values()),
        tensors_before=len(index.tensors),
        tensors_after=len(index.tensors) + sum(len(split.parts) - 1 for split in splits),
        verified_tensors=tensors,
        verified_grids=grids if verify else None,
        left_alone=left_alone,
        left_out=left_out,
        files=names,
        figures=figures,
    )


def reverse_folder(source: Path, out: Path, *, verify: bool = True) -> Mha2ShaSummary:
    """Write the MHA form of a folder that `convert_folder` wrote: the original tensors and encodings, in their order.

    Args:
        source: Holds the SHA form and `heads.json`.
        out: Folder to write.
        verify: Read what was written and compare every tensor and every grid with the source's.

    Raises:
        CheckpointError: The folder is no such folder, or its files do not fit its `heads.json`.
        EncodingsError: Its encodings do not.
        QualityGateError: What was written is not what was read.
        UsageError: `out` is the source.
    """
    name_map = NameMap.load(source)
    if name_map.folded:
        raise UsageError(
            f"`{source}` holds weights that the scale of attention is folded into ({len(name_map.folded)} tensors), so "
            "the original bits are gone",
            hint="the MHA form is still where the road wrote it: 30-quantize",
        )
    layout = WeightsLayout.parse(dict(name_map.weights), source / NAME)
    files = find_source(source, "sha")
    _require_other_folder(files, out)
    index = read_index(files.weights)
    with atomic_folder(out) as partial:
        written = read_index(merge_weights(index, name_map.splits, layout, partial))
        grids = _merge_encodings(files, partial, name_map, verify=verify)
        tensors = verify_weights(written, index, name_map.splits) if verify else None
        if files.config:
            (partial / files.config.name).write_bytes(files.config.read_bytes())
        names = tuple(sorted(path.name for path in partial.iterdir()))
    return Mha2ShaSummary(
        source=source,
        out=out,
        attention_layers=len(name_map.heads),
        heads=sum(name_map.heads.values()),
        tensors_before=len(index.tensors),
        tensors_after=len(written.tensors),
        verified_tensors=tensors,
        verified_grids=grids if verify else None,
        left_alone=name_map.left_alone,
        left_out={},
        files=names,
    )


def _suffix(format: str | None) -> str | None:
    if format is not None and format not in FORMATS:
        raise UsageError(f"no format is called `{format}`", hint=f"choose {' or '.join(FORMATS)}")
    return f".{format}" if format else None


def _in_order(splits: list[RowSplit], keys: Iterable[str]) -> list[RowSplit]:
    by_parent = {split.parent: split for split in splits}
    return [by_parent[key] for key in keys if key in by_parent]


def _require_other_folder(files: Source, out: Path) -> None:
    if out.resolve() == files.folder.resolve():
        raise UsageError(f"`{out}` is the source itself", hint="name another folder with -o")


def _heads(
    files: Source, shapes: Mapping[str, tuple[int, ...]], num_heads: int | None, heads_file: Path | None
) -> dict[str, int]:
    given = [name for name, value in (("--num-heads", num_heads), ("--num-heads-file", heads_file)) if value]
    layers = attention_paths(shapes)
    config = files.read_config()
    if config is not None:
        if given:
            raise UsageError(
                f"{given[0]} has no effect: `{files.config}` says the head count of every layer",
                hint=f"leave {given[0]} out",
            )
        return heads_from_config(config, layers, shapes)
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are both given", hint="leave one of them out")
    if heads_file is not None:
        return read_heads_file(heads_file, layers)
    if num_heads is None:
        raise UsageError(
            f"`{files.weights}` has no config.json beside it that belongs to it, so the head counts are unknown",
            hint="give them with --num-heads N or --num-heads-file JSON",
        )
    return dict.fromkeys(layers, num_heads)


def _split_encodings(
    files: Source, out: Path, splits: list[RowSplit], keys: list[str], *, keep_ranges: bool, verify: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """Convert every encodings file; return what the reverse needs, what was left out, and the grids compared."""
    if not files.encodings:
        return {}, {}, 0
    # numpy and onnx, which these need, take a third of a second: weights alone are converted without.
    from sdconvert.io.encodings import read_encodings_file
    from sdconvert.mha2sha.encodings import split_encodings, verify_parameter_encodings

    records: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    grids = 0
    for path in files.encodings:
        mha = read_encodings_file(path)
        result = split_encodings(mha, splits, keys, keep_ranges=keep_ranges)
        name = renamed(path.name, "sha")
        result.file.write(out / name)
        if verify:
            grids += verify_parameter_encodings(mha, read_encodings_file(out / name), splits)
        records[name] = result.record
        left_out |= {f"{path.name}: {one.name}": one.reason for one in result.left_out}
    return records, left_out, grids


def _merge_encodings(files: Source, out: Path, name_map: NameMap, *, verify: bool) -> int:
    """The reverse of `_split_encodings`; return the grids compared.

    Raises:
        CheckpointError: An encodings file has come or gone since the folder was written.
    """
    from sdconvert.io.encodings import read_encodings_file
    from sdconvert.mha2sha.encodings import merge_encodings, verify_parameter_encodings

    found = {path.name: path for path in files.encodings}
    if odd := sorted(found.keys() ^ name_map.encodings.keys()):
        raise CheckpointError(
            f"`{files.folder}` and its {NAME} disagree on the encodings files: {', '.join(odd)}",
            hint="use the folder as `sdconvert mha2sha` wrote it",
        )
    grids = 0
    for name, record in name_map.encodings.items():
        sha = read_encodings_file(found[name])
        target = out / renamed(name, "mha")
        merge_encodings(sha, name_map.splits, record).write(target)
        if verify:
            grids += verify_parameter_encodings(read_encodings_file(target), sha, name_map.splits)
    return grids
