"""One entry between JSON and columns, in each version."""

import json
from itertools import repeat
from typing import Any

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings.tensor import LEGACY, TensorEncoding

_ONE_ENTRY = "one entry per channel or tensor"
_COMPACT = (",", ":")
_COLUMNS = ("max", "min", "offset", "scale", "zero_point_shift")


def from_legacy(name: str, value: Any) -> TensorEncoding:
    """Columns of a list of encodings of form 0.6.1.

    Raises:
        EncodingsError: It is no such list, or its entries differ in more than numbers.
    """
    if not isinstance(value, list) or not value:
        raise EncodingsError(f"`{name}` is no list of encodings", hint=_ONE_ENTRY)
    if odd := set(map(type, value)) - {dict}:
        raise EncodingsError(f"`{name}` holds a {odd.pop().__name__}, no encoding", hint=_ONE_ENTRY)
    if len({len(item) for item in value}) > 1:
        raise _different(name, "fields")
    fields: dict[str, Any] = {}
    for key in value[0]:
        try:
            column = [item[key] for item in value]
        except KeyError as error:
            raise _different(name, "fields") from error
        if key not in _COLUMNS and column.count(column[0]) != len(column):
            raise _different(name, key)
        fields[key] = column if key in _COLUMNS else column[0]
    return TensorEncoding(LEGACY, fields, len(value))


def _different(name: str, what: str) -> EncodingsError:
    return EncodingsError(f"the entries of `{name}` have different {what}", hint="one tensor has one kind of grid")


def to_legacy(encoding: TensorEncoding) -> list[dict[str, Any]]:
    """The list of encodings of form 0.6.1 that `from_legacy` takes."""
    columns = [
        encoding.fields[key] if key in _COLUMNS else repeat(encoding.fields[key], encoding.count)
        for key in encoding.fields
    ]
    return [dict(zip(encoding.fields, row, strict=True)) for row in zip(*columns, strict=True)]


def from_json(version: str, name: str, value: Any) -> TensorEncoding:
    """An entry of a version, as JSON has it.

    Raises:
        EncodingsError: It is no entry of that version.
    """
    return from_legacy(name, value) if version == LEGACY else TensorEncoding(version, value)


def to_json(encoding: TensorEncoding) -> Any:
    """The inverse of `from_json`."""
    return to_legacy(encoding) if encoding.version == LEGACY else encoding.fields


def entry_text(encoding: TensorEncoding) -> str:
    """The entry as JSON on one line, without a name in form 0.6.1."""
    if encoding.version != LEGACY:
        return json.dumps(encoding.fields, separators=_COMPACT)
    # A template is twice as fast as encoding dictionaries; `repr` of a number is its JSON.
    parts, columns = [], []
    for key, value in encoding.fields.items():
        if key in _COLUMNS:
            parts.append(f"{_literal(key)}:%r")
            columns.append(value)
        else:
            parts.append(f"{_literal(key)}:{_literal(value)}")
    template = "{" + ",".join(parts) + "}"
    rows = zip(*columns, strict=True) if columns else repeat((), encoding.count)
    return "[" + ",".join([template % row for row in rows]) + "]"


def _literal(value: Any) -> str:
    return json.dumps(value, separators=_COMPACT).replace("%", "%%")
