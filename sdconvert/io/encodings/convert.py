"""Encodings from one version to another, exactly or not at all.

| to | derived | refused |
|---|---|---|
| 0.6.1 | min = scale · offset, max = scale · (offset + 2^bits − 1) | LPBQ |
| 1.0.0 | whether scales are of rows or of blocks: from the weights' shapes | |
| 2.0.0 | signed type without zero point for symmetric grids, else unsigned; axis and rank from the shapes | |

Refused in all: types without a grid (VECTOR, float8), a `min` or `max` that scale and offset do not give, and outside
of 0.6.1 activations that are keyed by module. Form 2 names no 16-bit floats, no `excluded_layers` and no
`quantizer_args`: what is lost there is returned by name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdconvert.errors import EncodingsError, UsageError
from sdconvert.io.encodings.document import ACTIVATIONS, FUNCTIONAL, MIXED, PARAMS, EncodingsFile
from sdconvert.io.encodings.grid import Grid, grid_of
from sdconvert.io.encodings.tensor import LEGACY, LISTS, Kind, TensorEncoding, depth, from_matrix
from sdconvert.io.encodings.write_grid import Place, ranges, write_grid

TARGETS = (LEGACY, LISTS, "2.0.0")
_HALF = 16
_PARAMETER = re.compile(r"(?P<key>[^/].*\.(?:weight|bias))(?P<constant>_\d+)?")
_LISTS_OF_FORM_2 = ("excluded_layers", "quantizer_args")
_SAME_MODEL = "give the weights of the same model"
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Converted:
    """A file in another version.

    Attributes:
        file: The result.
        lost: What the version has no place for, and why.
    """

    file: EncodingsFile
    lost: dict[str, str]


def convert(file: EncodingsFile, version: str, shapes: Shapes | None = None) -> Converted:
    """Write a file's grids in another version.

    Args:
        file: Of any version.
        version: One of `TARGETS`.
        shapes: Of the weights, by parameter; None where there are none at hand.

    Raises:
        EncodingsError: The version has no place for an entry, or an entry is no grid.
        UsageError: The file is of that version already, or the shapes are needed and missing.
    """
    if version not in TARGETS:
        raise UsageError(f"no version is called {version}", hint=f"choose {', '.join(TARGETS)}")
    if version == file.version:
        raise UsageError(f"the file has form {version} already", hint=f"choose another of {', '.join(TARGETS)}")
    if file.modules or file.functional:
        first = next(iter(file.modules or file.functional))
        raise EncodingsError(
            f"its activations are keyed by module (`{first}`), for which form {version} has no place",
            hint="convert the file that AIMET writes beside the ONNX graph, or one of parameters alone",
        )
    entries: dict[str, dict[str, TensorEncoding]] = {}
    lost: dict[str, str] = {}
    for section, tensors in file.tensors.items():
        for name, encoding in tensors.items():
            is_parameter = section == PARAMS or (section == MIXED and _is_parameter(name, shapes))
            new = _convert_entry(name, encoding, version, shapes if is_parameter else None)
            if new is None:
                lost[name] = "a 16-bit float: what form 2 does not name is one"
            else:
                to = MIXED if version not in (LEGACY, LISTS) else PARAMS if is_parameter else ACTIVATIONS
                entries.setdefault(to, {})[name] = new
    header = _header(file, version)
    if version not in (LEGACY, LISTS):
        lost |= {key: "form 2 has no such list" for key in _LISTS_OF_FORM_2 if file.header.get(key)}
    return Converted(EncodingsFile(version, header, {key: entries.get(key, {}) for key in _sections(version)}), lost)


def _sections(version: str) -> tuple[str, ...]:
    return (ACTIVATIONS, PARAMS) if version in (LEGACY, LISTS) else (MIXED,)


def _header(file: EncodingsFile, version: str) -> dict[str, Any]:
    """Top-level keys, sections behind the others; what is no longer true of the version goes."""
    old = {PARAMS, ACTIVATIONS, FUNCTIONAL, MIXED, "version"}
    if version not in (LEGACY, LISTS):
        old |= set(_LISTS_OF_FORM_2)
    kept = {key: value for key, value in file.header.items() if key not in old}
    return {"version": version, **kept, **dict.fromkeys(_sections(version))}


def _is_parameter(name: str, shapes: Shapes | None) -> bool:
    match = _PARAMETER.fullmatch(name)
    return bool(match and (shapes is None or match["key"] in shapes or name in shapes))


def _convert_entry(name: str, encoding: TensorEncoding, version: str, shapes: Shapes | None) -> TensorEncoding | None:
    if encoding.kind is Kind.FLOAT and encoding.bitwidth == _HALF and version not in (LEGACY, LISTS):
        return None
    match = _PARAMETER.fullmatch(name)
    constant = bool(match and match["constant"]) and not (shapes and name in shapes)
    if encoding.version in (LEGACY, LISTS):
        grid, place = _from_flat(name, encoding, version, _shape(name, shapes), constant=constant)
    else:
        grid, place = _from_typed(name, encoding)
    if encoding.version == LEGACY and grid.kind is not Kind.FLOAT:
        _require_plain_range(name, encoding, grid, place)
    return write_grid(version, name, grid, place)


def _shape(name: str, shapes: Shapes | None) -> Sequence[int] | None:
    if shapes is None:
        return None
    match = _PARAMETER.fullmatch(name)
    shape = shapes.get(name) or shapes.get(match["key"] if match else "")
    if shape is None:
        raise EncodingsError(f"`{name}` is no parameter of the weights", hint=_SAME_MODEL)
    return shape


def _from_flat(
    name: str, encoding: TensorEncoding, version: str, shape: Sequence[int] | None, *, constant: bool
) -> tuple[Grid, Place]:
    kind = encoding.kind
    if (
        version == LEGACY
        or kind in (Kind.TENSOR, Kind.FLOAT)
        or (shape is None and encoding.version == LISTS == version)
    ):
        return grid_of(name, encoding), Place()
    if shape is None:
        raise UsageError(
            f"`{name}` has several scales, and form {encoding.version} does not say along what",
            hint="name the weights with --weights",
        )
    axis = _axis(encoding, shape)
    grid = grid_of(name, encoding, shape[axis], transposed=constant)
    if grid.kind not in (Kind.BLOCK, Kind.LPBQ):
        return grid, Place(len(shape), 1 if constant else axis)
    blocks = grid.scale.shape[1]
    block_size, rest = divmod(shape[1], blocks) if len(shape) > 1 else (0, 1)
    if rest or grid.block_size not in (None, block_size):
        raise EncodingsError(
            f"`{name}` has {blocks} blocks per row, which do not fit its shape {tuple(shape)}", hint=_SAME_MODEL
        )
    return grid, Place(len(shape), 1 if constant else 0, block_size)


def _axis(encoding: TensorEncoding, shape: Sequence[int]) -> int:
    """Output channels stand first, except in weights of transposed convolutions."""
    scales = encoding.count if encoding.version == LEGACY else len(encoding.fields["scale"])
    fits_first = scales % shape[0] == 0 if encoding.version == LEGACY else scales == shape[0]
    is_transposed_convolution = len(shape) > 2 and scales == shape[1] and encoding.kind is Kind.CHANNEL
    return 1 if is_transposed_convolution and not fits_first else 0


def _from_typed(name: str, encoding: TensorEncoding) -> tuple[Grid, Place]:
    kind, fields = encoding.kind, encoding.fields
    if kind not in (Kind.BLOCK, Kind.LPBQ):
        return grid_of(name, encoding), Place(axis=fields.get("axis", 0))
    scale = fields.get("per_block_int_scale") or fields["y_scale"]
    values = scale["x"] if isinstance(scale, dict) else scale
    rank = depth(values)
    axis = 1 - fields["axis"] % rank
    rows = len(values) if axis == 0 else len(values[0])
    return grid_of(name, encoding, rows, transposed=axis == 1), Place(rank, axis)


def _require_plain_range(name: str, encoding: TensorEncoding, grid: Grid, place: Place) -> None:
    """A range that is not the grid's own clips values, which only form 0.6.1 can say."""
    for field, bound in zip(("min", "max"), ranges(grid), strict=True):
        stated = np.asarray(encoding.fields[field], dtype=np.float64)
        own = np.asarray(from_matrix(bound.tolist(), 1, transposed=place.transposed))
        if (np.abs(stated - own) > 0.01 * float(grid.scale.max()) + 1e-6 * np.abs(own)).any():
            raise EncodingsError(
                f"`{name}` has a {field} that its scale and offset do not give", hint="only form 0.6.1 can say that"
            )
