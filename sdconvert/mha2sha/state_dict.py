"""Cut weights per head, and put heads together again: bit-equal rows, moved as ranges of bytes.

source    to_q.weight (heads * d, C)   one range of bytes
result    to_q_convs.0.weight (d, C, 1, 1), to_q_convs.1.weight …   the same bytes, in as many ranges
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdconvert.errors import CheckpointError, QualityGateError
from sdconvert.io.byte_copy import first_difference
from sdconvert.io.stored_tensor import Piece, StoredTensor, whole
from sdconvert.io.weights_index import INDEX_SUFFIX, OutputFile, WeightsIndex, WeightsLayout, write_weights
from sdconvert.mha2sha.row_split import RowSplit

if TYPE_CHECKING:
    from torch import Tensor  # a checkpoint is converted without torch


def split_state_dict(state_dict: "Mapping[str, Tensor]", splits: Sequence[RowSplit]) -> "dict[str, Tensor]":
    """Replace each parent by its heads' parts, at the parent's place in the order.

    Args:
        state_dict: In MHA form; it is not changed, and the result's tensors share its memory.
        splits: On its shapes.

    Returns:
        State dict in SHA form: weights (d, C, 1, 1), biases (d,).
    """
    by_parent = {split.parent: split for split in splits}
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key not in by_parent:
            result[key] = tensor
            continue
        split = by_parent[key]
        for part in split:
            result[part.name] = tensor[part.rows].reshape(split.part_shape(part, tuple(tensor.shape)))
    return result


def split_weights(
    index: WeightsIndex, splits: Sequence[RowSplit], folder: Path, stem: str, suffix: str | None = None
) -> Path:
    """Write the SHA form of weights; memory does not depend on their size.

    Tensors keep types, order and files: an index's shards stay as many, and parts stay in their parent's shard.

    Args:
        index: Of the MHA form.
        splits: On its shapes.
        folder: To write to.
        stem: `<stem>.safetensors`, or `<stem>-00001-of-00002.safetensors` and so on, with an index.
        suffix: `.safetensors`, `.pth`, `.pt` or `.bin`; None: the source's.

    Returns:
        The file, or the index.

    Raises:
        CheckpointError: A split does not fit its parent, two tensors would get one name, or a source changed.
        EnvironmentProblem: The disk is full.
    """
    by_parent = _by_parent(index, splits)
    suffix = suffix or index.suffix
    count, files = len(index.files), []
    for number, file in enumerate(index.files, 1):
        pieces = [piece for tensor in file.tensors.values() for piece in _pieces(tensor, by_parent)]
        name = f"{stem}-{number:05}-of-{count:05}{suffix}" if index.is_sharded else f"{stem}{suffix}"
        files.append(OutputFile(name, pieces, file.metadata))
    order = [piece.name for tensor in index.tensors.values() for piece in _pieces(tensor, by_parent)]
    if len(set(order)) != len(order):
        twice = next(name for name in order if order.count(name) > 1)
        raise CheckpointError(f"two tensors of `{index.path}` would be called `{twice}`", hint="is it in SHA form?")
    if not index.is_sharded:
        return write_weights(folder, files)
    return write_weights(folder, files, f"{stem}{suffix}{INDEX_SUFFIX}", order, index.metadata)


def merge_weights(index: WeightsIndex, splits: Sequence[RowSplit], layout: WeightsLayout, folder: Path) -> Path:
    """Write the MHA form of weights again: the reverse of `split_weights`, bit for bit.

    Args:
        index: Of the SHA form, in either format and any number of files.
        splits: By which it came about.
        layout: Of the MHA form's files.
        folder: To write to.

    Returns:
        The file, or the index.

    Raises:
        CheckpointError: Tensors are missing, left over, or of other types or shapes than splits and layout say.
        EnvironmentProblem: The disk is full.
    """
    tensors = index.tensors
    by_parent = {split.parent: split for split in splits}
    used: set[str] = set()
    files = []
    for file in layout.files:
        pieces = []
        for name, shape in file.shapes.items():
            sources = _sources(index, tensors, name, shape, by_parent.get(name))
            used.update(source.name for source in sources)
            pieces.append(Piece(name, shape, tuple(sources)))
        files.append(OutputFile(file.name, pieces, file.metadata if Path(file.name).suffix == ".safetensors" else {}))
    if odd := sorted(tensors.keys() - used):
        raise CheckpointError(
            f"`{index.path}` has {len(odd)} tensors that the name map does not know, the first `{odd[0]}`",
            hint="use the folder as `sdconvert mha2sha` wrote it",
        )
    if layout.name.endswith(INDEX_SUFFIX):
        return write_weights(folder, files, layout.name, layout.order, layout.index_metadata)
    return write_weights(folder, files)


def verify_weights(source: WeightsIndex, written: WeightsIndex, splits: Sequence[RowSplit]) -> int:
    """Read every tensor of the SHA form again and compare it with its parent's rows, byte for byte.

    Args:
        source: Of the MHA form.
        written: Of the SHA form; any format and number of files.
        splits: By which one came from the other.

    Returns:
        How many tensors were compared.

    Raises:
        QualityGateError: A tensor differs, is missing or is left over.
        CheckpointError: A split does not fit its parent.
    """
    by_parent = _by_parent(source, splits)
    found = written.tensors
    pieces = [piece for tensor in source.tensors.values() for piece in _pieces(tensor, by_parent)]
    if odd := sorted(found.keys() ^ {piece.name for piece in pieces}):
        what = "is missing from" if odd[0] not in found else "is left over in"
        raise _differs(f"`{odd[0]}` {what} `{written.path}` ({len(odd)} such tensors)")
    for piece in pieces:
        tensor = found[piece.name]
        if (tensor.dtype, tensor.shape) != (piece.dtype, piece.shape):
            raise _differs(
                f"`{piece.name}` is {tensor.dtype} {tensor.shape} instead of {piece.dtype} {piece.shape} "
                f"in `{written.path}`"
            )
    position = first_difference(
        (source for piece in pieces for source in piece.sources), (found[piece.name] for piece in pieces)
    )
    if position is not None:
        for piece in pieces:
            position -= piece.nbytes
            if position < 0:
                raise _differs(f"`{piece.name}` of `{written.path}` is not what its rows in `{source.path}` are")
    return len(pieces)


def _differs(message: str) -> QualityGateError:
    return QualityGateError(message, hint="convert again; if it stays so, check the disk, and report it")


def _by_parent(index: WeightsIndex, splits: Sequence[RowSplit]) -> dict[str, RowSplit]:
    shapes = index.shapes
    for split in splits:
        shape = shapes.get(split.parent)
        if not shape or shape[0] != split.rows:
            raise CheckpointError(
                f"`{split.parent}` should have {split.rows} rows; in `{index.path}` its shape is {shape}",
                hint="the weights belong to another model, or are converted already",
            )
    return {split.parent: split for split in splits}


def _pieces(tensor: StoredTensor, by_parent: Mapping[str, RowSplit]) -> list[Piece]:
    split = by_parent.get(tensor.name)
    if split is None:
        return [whole(tensor)]
    shapes = [split.part_shape(part, tensor.shape) for part in split]
    return [
        Piece(part.name, shape, (tensor.rows(part.start, part.stop).viewed(shape),))
        for part, shape in zip(split, shapes, strict=True)
    ]


def _sources(
    index: WeightsIndex,
    tensors: Mapping[str, StoredTensor],
    name: str,
    shape: tuple[int, ...],
    split: RowSplit | None,
) -> list[StoredTensor]:
    """The tensors that one of the MHA form is made of."""
    expected = {part.name: split.part_shape(part, shape) for part in split} if split else {name: shape}
    found = [tensors[part] for part in expected if part in tensors]
    if (
        len(found) != len(expected)
        or (split and shape[:1] != (split.rows,))
        or any(tensor.shape != expected[tensor.name] or tensor.dtype != found[0].dtype for tensor in found)
    ):
        there = ", ".join(f"{tensor.name} {tensor.dtype} {tensor.shape}" for tensor in found) or "nothing"
        raise CheckpointError(
            f"`{index.path}` cannot give `{name}` of shape {shape}: found {there}",
            hint="use the folder as `sdconvert mha2sha` wrote it",
        )
    return found
