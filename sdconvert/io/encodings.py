"""AIMET's encodings JSON, form 0.6.1, keyed by module path.

`parameters_mha.encodings` holds `{"<parameter>": [{bitwidth, dtype, is_symmetric, max, min, offset, scale}, …]}`, one
entry per tensor or one per output channel, either at top level (the flat form) or under `param_encodings`.
An activation file adds `activation_encodings: {"<module>": {"input"|"output": {"0": {…}}}}`, what AIMET sees, and
`functional_encodings: {"<module>": {"matmul.0": {…}}}`, tensors inside a module's forward, which it does not and skips.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdconvert.artifacts import write_text_atomic
from sdconvert.errors import EncodingsError

VERSION = "0.6.1"
Encoding = dict[str, Any]
ParamEncodings = dict[str, list[Encoding]]
_FIELDS = {"bitwidth", "dtype"}
_INTEGER_FIELDS = {"is_symmetric", "max", "min", "offset", "scale"}
_ONE_ENTRY = "one entry per channel or tensor"


def read_encodings(path: Path) -> dict[str, Any]:
    """Read an encodings file of any of the three shapes into one with the keys of the full shape.

    Returns:
        `param_encodings`, `activation_encodings` and `functional_encodings`; absent ones are empty.

    Raises:
        EncodingsError: The file is missing, no JSON, or an entry lacks a field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncodingsError(f"`{path}` cannot be read: {error}", hint="export the encodings again") from error
    if not isinstance(content, dict) or not content:
        raise EncodingsError(f"`{path}` holds no encodings", hint="expected a JSON object of parameter names")
    version = content.get("version", VERSION)
    if version != VERSION:
        raise EncodingsError(
            f"`{path}` has encoding version {version}; this reads {VERSION}",
            hint=f"export with encoding_version={VERSION} (environment variable AIMET_ENCODING_VERSION)",
        )
    if "param_encodings" not in content and "activation_encodings" not in content:
        content = {"param_encodings": content}
    sections = {
        name: content.get(name, {}) for name in ("param_encodings", "activation_encodings", "functional_encodings")
    }
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise EncodingsError(f"`{path}`: {name} is a {type(section).__name__}", hint="expected an object")
        for key, value in section.items():
            if name == "param_encodings" and not (isinstance(value, list) and value):
                raise EncodingsError(f"`{path}`: `{key}` is no list of encodings", hint=_ONE_ENTRY)
            for entry in _entries(value):
                _check_entry(path, key, entry)
    return sections


def write_params(path: Path, params: Mapping[str, list[Encoding]]) -> None:
    """Write parameter encodings in the flat form, by temporary name and rename."""
    write_text_atomic(_by_lines(params), path)


def write_encodings(path: Path, sections: Mapping[str, Any]) -> None:
    """Write parameter and activation encodings in one file that AIMET's `load_encodings` takes."""
    write_text_atomic(dump_encodings(sections), path)


def dump_encodings(sections: Mapping[str, Any]) -> str:
    """The text of that file: one line per parameter or module, sorted within its section."""
    head = {"version": VERSION, "producer": {"package": "sdconvert"}}
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    parts += [f"{json.dumps(name)}: {_by_lines(section).rstrip()}" for name, section in sorted(sections.items())]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _by_lines(entries: Mapping[str, Any]) -> str:
    """A checkpoint has ten thousands of entries: indented, each would take nine lines."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in sorted(entries.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _entries(value: Any) -> Iterator[Any]:
    """What should be encodings, in lists (per channel) and objects (per input, output or position) of them."""
    if isinstance(value, list):
        for item in value:
            yield from _entries(item)
    elif isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
        for item in value.values():
            yield from _entries(item)
    else:
        yield value


def _check_entry(path: Path, key: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise EncodingsError(f"`{path}`: `{key}` holds a {type(entry).__name__}, no encoding", hint=_ONE_ENTRY)
    needed = _FIELDS | (_INTEGER_FIELDS if entry.get("dtype") == "int" else set())
    if missing := sorted(needed - entry.keys()):
        raise EncodingsError(f"`{path}`: `{key}` lacks {', '.join(missing)}", hint="export it again")
