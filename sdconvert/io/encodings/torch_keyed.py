"""The form that the stages exchange: AIMET's 0.6.1, keyed by module path.

`parameters_mha.encodings` holds `{"<parameter>": [{bitwidth, dtype, is_symmetric, max, min, offset, scale}, …]}`, one
entry per tensor or one per output channel, either at top level (the flat form) or under `param_encodings`.
An activation file adds `activation_encodings: {"<module>": {"input"|"output": {"0": {…}}}}`, what AIMET sees, and
`functional_encodings: {"<module>": {"matmul.0": {…}}}`, tensors inside a module's forward, which it does not and skips.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings.entries import to_legacy
from sdconvert.io.encodings.reading import read_encodings_file
from sdconvert.io.files import write_text_atomic

VERSION = "0.6.1"
Encoding = dict[str, Any]
ParamEncodings = dict[str, list[Encoding]]


def read_encodings(path: Path) -> dict[str, Any]:
    """Read a file of form 0.6.1 into one with the keys of the full shape.

    Returns:
        `param_encodings`, `activation_encodings` and `functional_encodings`; absent ones are empty.

    Raises:
        EncodingsError: As `read_encodings_file`, or the file has another version.
    """
    file = read_encodings_file(path)
    if file.version != VERSION:
        raise EncodingsError(
            f"`{path}` has encoding version {file.version}; this reads {VERSION}",
            hint=f"`sdconvert encodings convert {path} --to {VERSION}`",
        )
    by_tensor = {name: to_legacy(encoding) for name, encoding in file.activations.items()}
    return {
        "param_encodings": {name: to_legacy(encoding) for name, encoding in file.params.items()},
        "activation_encodings": file.modules or by_tensor,
        "functional_encodings": file.functional,
    }


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
