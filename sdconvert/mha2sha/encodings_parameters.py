"""Cut the encoding of one parameter as its rows are cut, and put it together again.

    one scale                      to every part
    a scale per row                rows start … stop
    scales per row and block       likewise, with the blocks; a weight (rows, C) that becomes (rows, C, 1, 1) gets
                                   blocks (rows, n, 1, 1)
    LPBQ                           block scales and channel scales likewise

A weight that stands transposed in the file, (C, rows) as the constant of a MatMul, has its rows last; the weights of
the convolutions have them first.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings.tensor import LEGACY, LISTS, Kind, TensorEncoding, depth, from_matrix, to_matrix
from sdconvert.mha2sha.row_split import RowSplit

_CONSTANT = re.compile(r"(?P<key>.+)_\d+")
_CONVOLUTION_RANK = 4


@dataclass(frozen=True, slots=True)
class Named:
    """A parameter under the name that a file has for it.

    Args:
        name: In the file.
        key: In the weights.
        transposed: Whether the file's tensor is the transposed weight, `to_q.weight_0`.
    """

    name: str
    key: str
    transposed: bool


def find_parameter(name: str, encoding: TensorEncoding, keys: Collection[str]) -> Named | None:
    """The parameter that a file's name means, if any."""
    if name in keys:
        # Rows on axis 1 are those of a transposed matrix, whatever it is called.
        last = encoding.fields.get("axis") == (1 if encoding.kind is Kind.CHANNEL else 0)
        return Named(name, name, transposed=last)
    match = _CONSTANT.fullmatch(name)
    return Named(name, match["key"], transposed=True) if match and match["key"] in keys else None


def cut(
    named: Named, encoding: TensorEncoding, split: RowSplit
) -> tuple[list[tuple[str, TensorEncoding]], dict[str, Any]]:
    """Cut an encoding.

    Args:
        named: Its parameter.
        encoding: Of the whole parameter.
        split: Of the same parameter.

    Returns:
        Name and encoding of each part, and what `join` needs to know beside them: empty for a scale per row.

    Raises:
        EncodingsError: Its length does not fit the rows, or it is of a kind that has no rows.
    """
    kind = kind_for_rows(named.name, encoding, split.rows)
    suffix = "" if split.to_convolution else named.name.removeprefix(named.key)
    names = [part.name + suffix for part in split]
    note: dict[str, Any] = {}
    if named.name != named.key:
        note["name"] = named.name
    if kind is Kind.TENSOR:
        note["kind"] = str(kind)
        return [(name, renamed(encoding, name)) for name in names], note
    if named.transposed:
        note["transposed"] = True
    changes: list[dict[str, Any]] = [{} for _ in names]
    for field, values in encoding.arrays().items():
        try:
            pieces = _cut_values(values, split, transposed=named.transposed)
        except ValueError as error:
            raise _wrong_length(named.name, len(values), split.rows) from error
        for change, piece in zip(changes, pieces, strict=True):
            change[field] = piece
    for field, axis in _axes(encoding, split).items():
        note.setdefault("axes", {})[field] = axis[0]
        for change in changes:
            change[field] = axis[1]
    per_row = encoding.count // split.rows if encoding.version == LEGACY else 0
    return [
        (name, renamed(encoding.with_fields(change, per_row * (part.stop - part.start) or 1), name))
        for name, change, part in zip(names, changes, split, strict=True)
    ], note


def join(split: RowSplit, parts: Sequence[TensorEncoding], note: dict[str, Any]) -> tuple[str, TensorEncoding]:
    """Put an encoding together again.

    Args:
        split: Of the parameter.
        parts: What `cut` returned for it.
        note: Likewise.

    Returns:
        Its name in the file, and the encoding.

    Raises:
        EncodingsError: The parts are not of one kind, or of one tensor and different.
    """
    first, name = parts[0], note.get("name", split.parent)
    if note.get("kind") == Kind.TENSOR:
        if any(renamed(part, "") != renamed(first, "") for part in parts):
            raise EncodingsError(f"the parts of `{name}` had one scale, and now differ", hint="they were edited")
        return name, renamed(first, name)
    if len({(part.version, tuple(part.fields), part.kind, part.bitwidth) for part in parts}) > 1:
        raise EncodingsError(f"the parts of `{name}` have different grids", hint="they were edited")
    transposed = note.get("transposed", False)
    changes: dict[str, Any] = dict(note.get("axes", {}))
    for field in first.arrays():
        pieces = [part.arrays()[field] for part in parts]
        try:
            changes[field] = _join_values(pieces, split, transposed=transposed)
        except ValueError as error:
            raise _wrong_length(name, sum(map(len, pieces)), split.rows) from error
    count = sum(part.count for part in parts) if first.version == LEGACY else 1
    return name, renamed(first.with_fields(changes, count), name)


def renamed(encoding: TensorEncoding, name: str) -> TensorEncoding:
    """The same for a tensor of another name."""
    return encoding if encoding.version == LEGACY else encoding.with_fields({"name": name})


def kind_for_rows(name: str, encoding: TensorEncoding, rows: int) -> Kind:
    """The kind of a parameter's encoding, given its rows.

    Raises:
        EncodingsError: It does not fit them, or has no rows.
    """
    kind = encoding.kind
    if kind is Kind.OPAQUE:
        what = encoding.fields.get("enc_type") or encoding.fields.get("output_dtype") or "VECTOR"
        raise EncodingsError(
            f"`{name}` is quantized as {what}, which has no rows to cut", hint="quantize it to integers"
        )
    if encoding.version == LEGACY:
        if encoding.count == 1:
            return Kind.TENSOR
        if encoding.count % rows:
            raise _wrong_length(name, encoding.count, rows)
        return Kind.CHANNEL if encoding.count == rows else Kind.BLOCK
    if encoding.version == LISTS and kind in (Kind.CHANNEL, Kind.LPBQ) and len(encoding.fields["scale"]) != rows:
        raise _wrong_length(name, len(encoding.fields["scale"]), rows)
    if kind is Kind.CHANNEL and encoding.version != LISTS and len(encoding.arrays()["y_scale"]) != rows:
        raise _wrong_length(name, len(encoding.arrays()["y_scale"]), rows)
    return Kind.TENSOR if kind is Kind.FLOAT else kind


def _wrong_length(name: str, count: int, rows: int) -> EncodingsError:
    return EncodingsError(
        f"`{name}` has {count} encodings: neither 1 (per tensor) nor {rows} (per row), nor blocks of {rows} rows",
        hint="weights and encodings must be of the same model",
    )


def _cut_values(values: list[Any], split: RowSplit, *, transposed: bool) -> list[list[Any]]:
    rank = depth(values)
    if rank == 1 and not (transposed and len(values) != split.rows):
        blocks, rest = divmod(len(values), split.rows)
        if rest or not blocks:
            raise ValueError
        return [values[part.start * blocks : part.stop * blocks] for part in split]
    matrix = to_matrix(values, split.rows, transposed=transposed)
    if rank > 1 and split.to_convolution:
        rank = _CONVOLUTION_RANK
    stays = transposed and not split.to_convolution
    return [from_matrix(matrix[part.rows], rank, transposed=stays) for part in split]


def _join_values(pieces: list[list[Any]], split: RowSplit, *, transposed: bool) -> list[Any]:
    rank = depth(pieces[0])
    rows = [part.stop - part.start for part in split]
    if rank == 1 and not (transposed and sum(map(len, pieces)) != split.rows):
        return [value for piece in pieces for value in piece]
    stays = transposed and not split.to_convolution
    matrix = [
        row for piece, count in zip(pieces, rows, strict=True) for row in to_matrix(piece, count, transposed=stays)
    ]
    if rank > 1 and split.to_convolution:
        rank = 2
    return from_matrix(matrix, rank, transposed=transposed)


def _axes(encoding: TensorEncoding, split: RowSplit) -> dict[str, tuple[int, int]]:
    """Axes of form 2 before and after, by field, where they differ."""
    if not split.to_convolution or encoding.version in (LEGACY, LISTS):
        return {}
    new = {"axis": 0 if encoding.kind is Kind.CHANNEL else 1}
    fields = dict(encoding.fields)
    scale = fields.get("y_scale")
    if isinstance(scale, dict) and "axis" in scale:
        fields["y_scale.axis"] = scale["axis"]
        new["y_scale.axis"] = 0 if scale["axis"] >= 0 else -_CONVOLUTION_RANK
    return {field: (fields[field], axis) for field, axis in new.items() if field in fields and fields[field] != axis}
