"""What an entry must say, by version; whatever is wrong is named with its tensor and the rule."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings.tensor import ENC_TYPES, LEGACY, LISTS, Kind, TensorEncoding, depth, leaves

_NEEDED = {
    LEGACY: (("bitwidth", "dtype"), ("is_symmetric", "max", "min", "offset", "scale")),
    LISTS: (("bw", "dtype", "enc_type"), ("is_sym", "offset", "scale")),
}
_OF_KIND: dict[bool, dict[Kind, tuple[str, ...]]] = {
    True: {Kind.BLOCK: ("block_size",), Kind.LPBQ: ("block_size", "compressed_bw", "per_block_int_scale")},
    False: {Kind.BLOCK: ("axis",), Kind.LPBQ: ("axis", "block_size")},
}
_SCALES = ("scale", "y_scale", "y_scale.x", "y_scale.x_scale", "per_block_int_scale", "per_channel_float_scale")
_WIDEST = 32
_DTYPE = re.compile(r"u?int\d+|b?float\d+\w*")


def check(name: str, encoding: TensorEncoding) -> None:
    """Check one entry.

    Raises:
        EncodingsError: A field is missing, of the wrong type, or no grid: a scale that is not positive and finite.
    """
    fields = encoding.fields
    if encoding.version in _NEEDED:
        always, of_integers = _NEEDED[encoding.version]
        _require(name, fields, always)
        if str(fields["dtype"]).lower() == "int":
            _require(name, fields, of_integers)
    else:
        _require(name, fields, ("output_dtype",))
        _require(name, fields, () if "per_block_int_scale" in fields else ("y_scale",))
    _check_words(name, encoding)
    if not 1 <= encoding.bitwidth <= _WIDEST:
        raise EncodingsError(f"`{name}` has {encoding.bitwidth} bits", hint=f"a grid has 1 to {_WIDEST} bits")
    if encoding.kind in (Kind.FLOAT, Kind.OPAQUE):
        return
    if encoding.version != LEGACY:
        _require(name, fields, _OF_KIND[encoding.version == LISTS].get(encoding.kind, ()))
        _check_shape(name, encoding)
    for field in _SCALES:
        _check_numbers(name, field, fields, _is_scale, "a scale is a positive, finite number")
    for field in ("min", "max"):
        _check_numbers(name, field, fields, np.isfinite, "a bound of a range is a finite number")
    for field in ("offset", "zero_point_shift", "y_zero_point"):
        _check_numbers(name, field, fields, np.isfinite, "an offset is a finite number of steps")
    if any(type(value) is not int for value in _values(fields, "offset")):
        raise EncodingsError(f"`{name}` has an offset that is no whole number", hint="export it again")
    _check_lengths(name, encoding)


def _check_numbers(
    name: str, field: str, fields: dict[str, Any], rule: Callable[[NDArray[np.float64]], Any], hint: str
) -> None:
    values = _values(fields, field)
    if set(map(type, values)) <= {int, float}:
        with suppress(OverflowError):
            passed = rule(np.asarray(values, dtype=np.float64))
            if passed.all():
                return
            values = values[int(np.argmin(passed)) :]
    else:
        values = [value for value in values if type(value) not in (int, float)]
    raise EncodingsError(f"`{name}` has the {field} {values[0]!r}", hint=hint)


def _is_scale(values: NDArray[np.float64]) -> Any:
    return (values > 0) & np.isfinite(values)


def _values(fields: dict[str, Any], field: str) -> Sequence[Any]:
    """All numbers of a field, nested or not; `y_scale.x` is a part of a nested field."""
    outer, _, inner = field.partition(".")
    value = fields.get(outer)
    if inner:
        value = value.get(inner) if isinstance(value, dict) else None
    if value is None or isinstance(value, dict):
        return ()
    if not isinstance(value, list):
        return (value,)
    return list(leaves(value)) if value and isinstance(value[0], list) else value


def _require(name: str, fields: dict[str, Any], needed: Sequence[str]) -> None:
    if missing := [field for field in needed if field not in fields]:
        raise EncodingsError(f"`{name}` lacks {', '.join(missing)}", hint="export it again")


def _check_words(name: str, encoding: TensorEncoding) -> None:
    fields = encoding.fields
    words_of: dict[str, dict[str, tuple[Any, ...]]] = {
        LEGACY: {"dtype": ("int", "float"), "is_symmetric": ("True", "False")},
        LISTS: {"dtype": ("INT", "FLOAT"), "is_sym": (True, False), "enc_type": tuple(ENC_TYPES.values())},
    }
    for field, words in words_of.get(encoding.version, {}).items():
        if field in fields and not any(fields[field] is word or fields[field] == word for word in words):
            raise EncodingsError(
                f"`{name}` has the {field} {fields[field]!r}", hint=f"expected {' or '.join(map(str, words))}"
            )
    whole = [field for field in ("bitwidth", "bw", "compressed_bw", "block_size", "axis") if field in fields]
    for field in whole:
        if type(fields[field]) is not int or (field == "block_size" and fields[field] < 1):
            raise EncodingsError(f"`{name}` has the {field} {fields[field]!r}", hint="expected a whole number")
    dtype = fields.get("output_dtype")
    if dtype is not None and not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype)):
        raise EncodingsError(f"`{name}` has the output_dtype {dtype!r}", hint="expected int8, uint16, float8e4m3fn, …")


def _check_shape(name: str, encoding: TensorEncoding) -> None:
    """Form 1 has lists; form 2 one number, a list along an axis, or lists with the rank of the tensor."""
    fields, kind = encoding.fields, encoding.kind
    if encoding.version == LISTS:
        wanted = dict.fromkeys(("scale", "offset"), 1)
    elif kind is Kind.LPBQ and "per_block_int_scale" not in fields:
        wanted = {"y_scale.x": 2, "y_scale.x_scale": 1}
    elif kind is Kind.LPBQ:
        wanted = {"per_block_int_scale": 2, "per_channel_float_scale": 2}
    else:
        wanted = {"y_scale": {Kind.TENSOR: 0, Kind.CHANNEL: 1}.get(kind, 2)}
    arrays = encoding.arrays()
    for field, rank in wanted.items():
        found = min(depth(arrays.get(field)), 2)
        if found != rank:
            forms = ("one number", "a list", "nested lists")
            raise EncodingsError(
                f"`{name}` is quantized per {kind}, and its {field} is {forms[found]}", hint=f"expected {forms[rank]}"
            )


def _check_lengths(name: str, encoding: TensorEncoding) -> None:
    """Fields of one shape must be equally long; the one scale of a tensor stands alone."""
    if encoding.version not in (LEGACY, LISTS):
        scale, zero = encoding.fields.get("y_scale"), encoding.fields.get("y_zero_point")
        pairs = {} if zero is None or isinstance(scale, dict) else {"y_scale": scale, "y_zero_point": zero}
        lengths = {field: len(list(leaves([value]))) for field, value in pairs.items()}
    else:
        arrays = encoding.arrays()
        lengths = {field: len(values) for field, values in arrays.items() if field != "per_block_int_scale"}
        if encoding.version == LISTS and encoding.kind is Kind.TENSOR:
            lengths["PER_TENSOR"] = 1
    if len(set(lengths.values())) > 1:
        raise EncodingsError(
            f"`{name}` has {', '.join(f'{count} of {field}' for field, count in lengths.items())}",
            hint="all of them are as many as there are scales",
        )
