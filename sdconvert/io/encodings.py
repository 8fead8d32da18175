"""AIMET's encodings JSON, form 0.6.1, keyed by module path.

`parameters_mha.encodings` holds `{"<parameter>": [{bitwidth, dtype, is_symmetric, max, min, offset, scale}, …]}`, one
entry per tensor or one per output channel, either at top level (the flat form) or under `param_encodings`.
An activation file adds `activation_encodings: {"<module>": {"input"|"output": {"0": {…}}}}`, what AIMET sees, and
`functional_encodings: {"<module>": {"matmul.0": {…}}}`, tensors inside a module's forward, which it does not and skips.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdconvert.artifacts import write_json_atomic
from sdconvert.errors import EncodingsError

VERSION = "0.6.1"
Encoding = dict[str, Any]
ParamEncodings = dict[str, list[Encoding]]
_FIELDS = {"bitwidth", "dtype"}
_INTEGER_FIELDS = {"is_symmetric", "max", "min", "offset", "scale"}


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
    _check_params(path, sections["param_encodings"])
    return sections


def write_params(path: Path, params: Mapping[str, list[Encoding]]) -> None:
    """Write parameter encodings in the flat form, by temporary name and rename."""
    write_json_atomic(dict(params), path)


def write_encodings(path: Path, sections: Mapping[str, Any]) -> None:
    """Write parameter and activation encodings in one file that AIMET's `load_encodings` takes."""
    write_json_atomic({"version": VERSION, "producer": {"package": "sdconvert"}, **sections}, path)


def _check_params(path: Path, params: Any) -> None:
    if not isinstance(params, dict):
        raise EncodingsError(f"`{path}`: param_encodings is a {type(params).__name__}", hint="expected an object")
    for name, entries in params.items():
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise EncodingsError(f"`{path}`: `{name}` is no list of encodings", hint="one entry per channel or tensor")
        for entry in entries:
            needed = _FIELDS | (_INTEGER_FIELDS if entry.get("dtype") == "int" else set())
            if missing := sorted(needed - entry.keys()):
                raise EncodingsError(f"`{path}`: `{name}` lacks {', '.join(missing)}", hint="export it again")
