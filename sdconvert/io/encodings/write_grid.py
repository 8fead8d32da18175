"""Grids as entries of each version."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings.grid import Grid, Scales
from sdconvert.io.encodings.tensor import ENC_TYPES, LEGACY, LISTS, Kind, TensorEncoding, from_matrix


@dataclass(frozen=True)
class Place:
    """What an entry must know beside its grid.

    Attributes:
        rank: Of the file's tensor; None where the version does not ask.
        axis: Of its rows.
        block_size: Columns of a block, where the grid does not say.
    """

    rank: int | None = None
    axis: int = 0
    block_size: int | None = None

    @property
    def transposed(self) -> bool:
        """Whether rows are the last axis of a matrix."""
        return self.rank == 2 and self.axis == 1


def write_grid(version: str, name: str, grid: Grid, place: Place) -> TensorEncoding:
    """Write a grid as an entry of a version.

    Raises:
        EncodingsError: The version has no place for it.
    """
    write = {LEGACY: _legacy, LISTS: _lists}.get(version, _typed)
    return write(version, name, grid, place)


def ranges(grid: Grid) -> tuple[Scales, Scales]:
    """Smallest and largest value of each scale, as AIMET states them: in float32 if the scales are such numbers."""
    with np.errstate(over="ignore"):
        lowest, highest = grid.scale * grid.offset, grid.scale * (grid.offset + (2.0**grid.bitwidth - 1))
        narrow = grid.scale.astype(np.float32)
        if np.array_equal(narrow, grid.scale):
            rounded = [bound.astype(np.float32).astype(np.float64) for bound in (lowest, highest)]
            if all(np.isfinite(bound).all() for bound in rounded):
                lowest, highest = rounded
    return lowest, highest


def _legacy(version: str, name: str, grid: Grid, place: Place) -> TensorEncoding:
    if grid.kind is Kind.FLOAT:
        return TensorEncoding(version, {"bitwidth": grid.bitwidth, "dtype": "float"})
    if grid.lpbq is not None:
        raise _cannot(version, name, "LPBQ, whose scales of blocks are products")
    lowest, highest = ranges(grid)
    if not (np.isfinite(lowest).all() and np.isfinite(highest).all()):
        raise _cannot(version, name, "a range that is no finite number")
    columns = {"max": highest, "min": lowest, "offset": grid.offset, "scale": grid.scale}
    fields: dict[str, Any] = {"bitwidth": grid.bitwidth, "dtype": "int", "is_symmetric": str(grid.symmetric)}
    fields |= {key: _flat(values, place) for key, values in columns.items()}
    fields["offset"] = [int(value) for value in fields["offset"]]
    count = grid.scale.size
    if grid.shift:
        fields["zero_point_shift"] = [grid.shift] * count
    return TensorEncoding(version, fields, count)


def _lists(version: str, name: str, grid: Grid, place: Place) -> TensorEncoding:
    if grid.kind is Kind.FLOAT:
        whole = {"name": name, "enc_type": ENC_TYPES[Kind.TENSOR], "dtype": "FLOAT", "bw": grid.bitwidth}
        return TensorEncoding(version, whole)
    head: dict[str, Any] = {"name": name, "enc_type": ENC_TYPES[grid.kind], "dtype": "INT", "bw": grid.bitwidth}
    block_size = grid.block_size or place.block_size
    blocks = {} if grid.kind not in (Kind.BLOCK, Kind.LPBQ) else {"block_size": block_size}
    if grid.lpbq is not None:
        lpbq = grid.lpbq
        scale = lpbq.scale.flatten().tolist()
        fields = head | {"bw": lpbq.bitwidth, "is_sym": True, "scale": scale}
        fields |= {"offset": [-(2 ** (lpbq.bitwidth - 1))] * len(scale), **blocks, "compressed_bw": grid.bitwidth}
        fields["per_block_int_scale"] = [int(value) for value in _flat(lpbq.steps, place)]
        return TensorEncoding(version, fields)
    fields = head | {"is_sym": grid.symmetric, "scale": _flat(grid.scale, place)}
    fields |= {"offset": [int(value) for value in _flat(grid.offset, place)], **blocks}
    if grid.shift:
        fields["zero_point_shift"] = [grid.shift] * grid.scale.size
    return TensorEncoding(version, fields)


def _typed(version: str, name: str, grid: Grid, place: Place) -> TensorEncoding:
    if grid.kind is Kind.FLOAT:
        raise _cannot(version, name, f"a float of {grid.bitwidth} bits")
    middle = -(2.0 ** (grid.bitwidth - 1))
    if grid.symmetric and (grid.offset != middle).any():
        raise _cannot(version, name, f"a symmetric grid with an offset other than {middle:.0f}")
    if not grid.symmetric and ((grid.offset > 0) | (grid.offset <= 2 * middle)).any():
        raise _cannot(version, name, "a zero point outside of its type")
    fields: dict[str, Any] = {"name": name, "output_dtype": f"{'' if grid.symmetric else 'u'}int{grid.bitwidth}"}
    if grid.lpbq is not None:
        if grid.lpbq.bitwidth != 2 * grid.bitwidth:
            raise _cannot(version, name, f"LPBQ from {grid.lpbq.bitwidth} to {grid.bitwidth} bits")
        steps = np.vectorize(int, otypes=[object])(grid.lpbq.steps)
        fields |= {"axis": 1 - place.axis, "block_size": grid.block_size}
        fields["per_block_int_scale"] = _nested(steps, place)
        fields["per_channel_float_scale"] = _nested(grid.lpbq.scale, place)
        return TensorEncoding(version, fields)
    # Without a shift zero points are whole, and written so.
    zero = (middle if grid.symmetric else 0.0) - grid.offset - grid.shift
    whole = zero if grid.shift else np.vectorize(int, otypes=[object])(zero)
    shaped = {"y_scale": grid.scale} | ({"y_zero_point": whole} if zero.any() else {})
    if grid.kind is Kind.TENSOR:
        return TensorEncoding(version, fields | {key: values.flatten().tolist()[0] for key, values in shaped.items()})
    if grid.kind is Kind.CHANNEL:
        flat = {key: values.flatten().tolist() for key, values in shaped.items()}
        return TensorEncoding(version, {**fields, **flat, "axis": place.axis})
    nested = {key: _nested(values, place) for key, values in shaped.items()}
    block_size = grid.block_size or place.block_size
    return TensorEncoding(version, {**fields, **nested, "axis": 1 - place.axis, "block_size": block_size})


def _flat(values: Scales, place: Place) -> list[Any]:
    return from_matrix(values.tolist(), 1, transposed=place.transposed)


def _nested(values: Any, place: Place) -> list[Any]:
    assert place.rank is not None  # form 2 asks for it
    return from_matrix(values.tolist(), place.rank, transposed=place.transposed)


def _cannot(version: str, name: str, what: str) -> EncodingsError:
    return EncodingsError(f"`{name}` has {what}, which form {version} cannot say", hint="convert it to another version")
