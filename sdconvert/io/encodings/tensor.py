"""One tensor's entry of an encodings file, with the fields and the order that the file has.

The versions write one grid in three ways:

    0.6.1   [{"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "max": …, "min": …, "offset": -128, "scale": …}, …]
    1.0.0   {"name": …, "enc_type": "PER_CHANNEL", "dtype": "INT", "bw": 8, "is_sym": true, "scale": […], "offset": […]}
    2.0.0   {"name": …, "output_dtype": "int8", "y_scale": […], "axis": 0}

In memory all are columns: a field holds one value, or a list along the rows of the tensor. With blocks, a row has
several values: flat lists hold them row after row, nested lists have the rank of the tensor. A weight that became the
transposed constant of a MatMul (`to_q.weight_0`) has its rows last: flat lists then go block after block.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import chain
from typing import Any

VERSIONS = ("0.6.1", "1.0.0", "2.0.0", "2.1.0")
LEGACY = "0.6.1"
LISTS = "1.0.0"
_INTEGER = re.compile(r"u?int\d+")
_DIGITS = re.compile(r"\d+")


class Kind(StrEnum):
    """How many scales a tensor has."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    BLOCK = "block"
    LPBQ = "lpbq"
    FLOAT = "float"
    OPAQUE = "opaque"


@dataclass(frozen=True, slots=True)
class TensorEncoding:
    """What a file says about one tensor.

    Args:
        version: Of the file.
        fields: In the file's order; lists run along rows, or rows and blocks.
        count: Entries of the list in form 0.6.1, else 1.
    """

    version: str
    fields: dict[str, Any]
    count: int = 1

    @property
    def kind(self) -> Kind:
        """How many scales it has; form 0.6.1 does not tell channels from blocks and answers `CHANNEL` for both."""
        if self.version == LEGACY:
            if self.fields["dtype"] == "float":
                return Kind.FLOAT
            if "vector_dim" in self.fields:
                return Kind.OPAQUE
            return Kind.TENSOR if self.count == 1 else Kind.CHANNEL
        if self.version == LISTS:
            if self.fields["dtype"] == "FLOAT":
                return Kind.FLOAT
            return _ENC_TYPES[self.fields["enc_type"]]
        return self._kind_of_list()

    def _kind_of_list(self) -> Kind:
        if not _INTEGER.fullmatch(self.fields["output_dtype"]):
            return Kind.OPAQUE
        if "per_block_int_scale" in self.fields or isinstance(self.fields.get("y_scale"), dict):
            return Kind.LPBQ
        if "block_size" in self.fields:
            return Kind.BLOCK
        return Kind.CHANNEL if "axis" in self.fields else Kind.TENSOR

    @property
    def bitwidth(self) -> int:
        """Bits of a stored value; of LPBQ in form 1.0.0, before compression."""
        if self.version == LEGACY:
            return int(self.fields["bitwidth"])
        if self.version == LISTS:
            return int(self.fields["bw"])
        digits = _DIGITS.search(self.fields["output_dtype"])
        return int(digits.group()) if digits else 0

    def arrays(self) -> dict[str, list[Any]]:
        """The fields that run along rows or blocks; of a nested field, `y_scale.x` and `y_scale.x_scale`."""
        found = {}
        for name, value in self.fields.items():
            if isinstance(value, list):
                found[name] = value
            elif isinstance(value, dict):
                found |= {f"{name}.{part}": item for part, item in value.items() if isinstance(item, list)}
        return found

    def with_fields(self, changes: dict[str, Any], count: int = 1) -> "TensorEncoding":
        """The same with some fields changed, each at its place; `y_scale.x` names the part of a nested field."""
        fields = dict(self.fields)
        for name, value in changes.items():
            outer, _, inner = name.partition(".")
            fields[outer] = {**fields[outer], inner: value} if inner else value
        return replace(self, fields=fields, count=count)


_ENC_TYPES = {
    "PER_TENSOR": Kind.TENSOR,
    "PER_CHANNEL": Kind.CHANNEL,
    "PER_BLOCK": Kind.BLOCK,
    "LPBQ": Kind.LPBQ,
    "VECTOR": Kind.OPAQUE,
}
ENC_TYPES = {kind: name for name, kind in _ENC_TYPES.items()}


def to_matrix(values: Sequence[Any], rows: int, *, transposed: bool) -> list[list[Any]]:
    """Values of each row; raises ValueError where they do not divide.

    Args:
        values: Flat, or nested with the rank of the tensor.
        rows: Of the tensor.
        transposed: Whether rows are the last axis.
    """
    if values and isinstance(values[0], list):
        matrix = [list(row) for row in zip(*values, strict=True)] if transposed else [_flat(row) for row in values]
        if len(matrix) != rows or len({len(row) for row in matrix}) != 1:
            raise ValueError
        return matrix
    blocks, rest = divmod(len(values), rows)
    if rest or not blocks:
        raise ValueError
    if transposed:
        return [list(values[row::rows]) for row in range(rows)]
    return [list(values[row * blocks : (row + 1) * blocks]) for row in range(rows)]


def from_matrix(matrix: Sequence[Sequence[Any]], rank: int, *, transposed: bool) -> list[Any]:
    """The inverse of `to_matrix`.

    Args:
        matrix: Values of each row.
        rank: Of the nested lists; 1: flat.
        transposed: Whether rows become the last axis, in nested lists of rank 2 or flat.
    """
    if transposed:
        columns = [list(column) for column in zip(*matrix, strict=True)]
        return columns if rank > 1 else list(chain.from_iterable(columns))
    if rank == 1:
        return list(chain.from_iterable(matrix))
    return [[_nest(value, rank - 2) for value in row] for row in matrix]


def depth(values: Any) -> int:
    """Rank of nested lists."""
    return 1 + depth(values[0]) if isinstance(values, list) and values else 0


def _nest(value: Any, times: int) -> Any:
    for _ in range(times):
        value = [value]
    return value


def _flat(values: Any) -> list[Any]:
    return list(leaves(values)) if isinstance(values, list) else [values]


def leaves(values: Iterable[Any]) -> Iterable[Any]:
    """The numbers in nested lists, in order."""
    for value in values:
        if isinstance(value, list):
            yield from leaves(value)
        else:
            yield value
