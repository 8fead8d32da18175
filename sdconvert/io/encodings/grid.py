"""The grid that an entry describes, whatever its version: what conversion and comparison work on.

    real = scale · (q + offset + shift)     q = 0 … 2^bits − 1

Form 0.6.1 and 1.0.0 state that offset; in form 2 it is −zero point for unsigned types, and −2^(bits−1) − zero point for
signed ones. `shift` is AIMET's zero_point_shift, 0 or 0.5; form 2 takes it off the zero point.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings.tensor import LEGACY, LISTS, Kind, TensorEncoding, to_matrix

Scales = NDArray[np.float64]


@dataclass(frozen=True)
class Lpbq:
    """How scales of blocks follow from one scale per row (low-power blockwise quantization).

    Attributes:
        bitwidth: Bits after decompression.
        steps: Whole multiples, (rows, blocks).
        scale: Of each row, (rows, 1).
    """

    bitwidth: int
    steps: NDArray[np.float64]
    scale: Scales


@dataclass(frozen=True)
class Grid:
    """The grid of one tensor.

    Attributes:
        kind: Tensor, channel, block, LPBQ or float.
        bitwidth: Bits of a stored value.
        symmetric: Whether zero is in the middle by rule.
        scale: (rows, blocks), (1, 1) for a whole tensor, (0, 0) for floats.
        offset: The same shape.
        shift: 0 or 0.5.
        block_size: Columns of a block.
        lpbq: Of that kind.
    """

    kind: Kind
    bitwidth: int
    symmetric: bool = False
    scale: Scales = field(default_factory=lambda: np.zeros((0, 0)))
    offset: Scales = field(default_factory=lambda: np.zeros((0, 0)))
    shift: float = 0.0
    block_size: int | None = None
    lpbq: Lpbq | None = None

    def rows(self, start: int, stop: int) -> "Grid":
        """The grid of some rows."""
        if self.kind in (Kind.TENSOR, Kind.FLOAT):
            return self
        lpbq = self.lpbq and Lpbq(self.lpbq.bitwidth, self.lpbq.steps[start:stop], self.lpbq.scale[start:stop])
        scale, offset = self.scale[start:stop], self.offset[start:stop]
        return Grid(
            self.kind, self.bitwidth, self.symmetric, scale, offset, self.shift, block_size=self.block_size, lpbq=lpbq
        )

    def equals(self, other: "Grid") -> bool:
        """Whether both are the same grid, to the last bit."""
        first, second = (
            (one.bitwidth, one.symmetric, one.shift, one.block_size, one.kind is Kind.FLOAT) for one in (self, other)
        )
        return (
            first == second
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.offset, other.offset)
            and (self.lpbq is None) == (other.lpbq is None)
            and (self.lpbq is None or other.lpbq is None or np.array_equal(self.lpbq.steps, other.lpbq.steps))
        )

    def dequantized(self, weight: NDArray[np.float32]) -> NDArray[np.float32]:
        """A weight (rows, columns) on its grid, in float32 as AIMET computes."""
        if self.kind is Kind.FLOAT:
            return weight
        rows, columns = weight.shape
        blocks = self.scale.shape[1]
        scale = self.scale.astype(np.float32)[:, :, None]
        offset = (self.offset + self.shift).astype(np.float32)[:, :, None]
        steps = np.rint(weight.reshape(rows, blocks, columns // blocks) / scale - offset)
        real = (np.clip(steps, 0, 2**self.bitwidth - 1) + offset) * scale
        return np.asarray(real, dtype=np.float32).reshape(rows, columns)


def grid_of(name: str, encoding: TensorEncoding, rows: int | None = None, *, transposed: bool = False) -> Grid:
    """Read the grid of an entry.

    Args:
        name: Of the tensor, for messages.
        encoding: Checked.
        rows: Of the tensor; None where it has one scale, or one per row.
        transposed: Whether rows are the last axis of the file's tensor.

    Raises:
        EncodingsError: The numbers do not fit the rows, or it is of a kind that has no grid here.
    """
    kind = encoding.kind
    if kind is Kind.FLOAT:
        return Grid(kind, encoding.bitwidth)
    if kind is Kind.OPAQUE:
        what = encoding.fields.get("enc_type") or encoding.fields.get("output_dtype") or "VECTOR"
        raise EncodingsError(f"`{name}` is quantized as {what}, which has no grid", hint="quantize it to integers")
    read = _named_grid if encoding.version in (LEGACY, LISTS) else _typed_grid
    try:
        return read(encoding, kind, rows, transposed)
    except ValueError as error:
        raise EncodingsError(
            f"`{name}` has numbers of scales that do not fit {rows} rows",
            hint="were weights and encodings of one model?",
        ) from error


def _named_grid(encoding: TensorEncoding, kind: Kind, rows: int | None, transposed: bool) -> Grid:
    fields = encoding.fields
    symmetric = fields["is_symmetric"] == "True" if encoding.version == LEGACY else fields["is_sym"]
    if encoding.version == LEGACY and rows and encoding.count not in (1, rows):
        kind = Kind.BLOCK
    count = 1 if kind is Kind.TENSOR else rows or len(fields["scale"])
    scale = np.array(to_matrix(fields["scale"], count, transposed=transposed), dtype=np.float64)
    offset = np.array(to_matrix(fields["offset"], count, transposed=transposed), dtype=np.float64)
    shifts = set(fields.get("zero_point_shift", [0.0]))
    if len(shifts) > 1:
        raise ValueError
    if kind is not Kind.LPBQ:
        return Grid(
            kind, encoding.bitwidth, symmetric, scale, offset, shifts.pop(), block_size=fields.get("block_size")
        )
    compressed = fields["compressed_bw"]
    steps = np.array(to_matrix(fields["per_block_int_scale"], count, transposed=transposed), dtype=np.float64)
    lpbq = Lpbq(encoding.bitwidth, steps, scale)
    middle = np.full(steps.shape, -(2.0 ** (compressed - 1)))
    return Grid(kind, compressed, symmetric, steps * scale, middle, 0.0, block_size=fields["block_size"], lpbq=lpbq)


def _typed_grid(encoding: TensorEncoding, kind: Kind, rows: int | None, transposed: bool) -> Grid:
    fields, bits = encoding.fields, encoding.bitwidth
    middle = 0.0 if fields["output_dtype"].startswith("u") else -(2.0 ** (bits - 1))
    block_size = fields.get("block_size")
    if kind is Kind.LPBQ:
        nested = fields.get("y_scale")
        steps, scale = (
            (nested["x"], nested["x_scale"])
            if nested
            else (fields["per_block_int_scale"], fields["per_channel_float_scale"])
        )
        count = rows or len(steps)
        lpbq = Lpbq(
            2 * bits,
            np.array(to_matrix(steps, count, transposed=transposed), dtype=np.float64),
            np.array(to_matrix(scale, count, transposed=transposed), dtype=np.float64),
        )
        offset = np.full(lpbq.steps.shape, middle)
        return Grid(kind, bits, True, lpbq.steps * lpbq.scale, offset, 0.0, block_size=block_size, lpbq=lpbq)
    if kind is Kind.TENSOR:
        scale = np.array([[fields["y_scale"]]], dtype=np.float64)
        zero = np.array([[fields.get("y_zero_point", 0)]], dtype=np.float64)
    else:
        count = rows or len(fields["y_scale"])
        scale = np.array(to_matrix(fields["y_scale"], count, transposed=transposed), dtype=np.float64)
        zero = np.zeros_like(scale)
        if "y_zero_point" in fields:
            zero = np.array(to_matrix(fields["y_zero_point"], count, transposed=transposed), dtype=np.float64)
    offset = middle - zero
    shift = set((offset - np.floor(offset)).flatten().tolist())
    if len(shift) != 1:
        raise ValueError
    one = shift.pop()
    symmetric = middle < 0 and not (zero + one).any()
    return Grid(kind, bits, symmetric, scale, np.floor(offset), one, block_size=block_size)
