"""Encodings files of every version that AIMET writes, read and written without losing anything.

    0.6.1   {"activation_encodings": {…}, "param_encodings": {"conv.weight": […]}}, or the latter's body alone (flat)
    1.0.0   {"activation_encodings": [{"name": …}], "param_encodings": [{"name": …}]}
    2.0.0   {"encodings": [{"name": …}]}, parameters and activations together; 2.1.0 likewise

Activations are keyed by tensors of an ONNX graph, or in form 0.6.1 by modules: {"conv": {"output": {"0": {…}}}}. Our
own `functional_encodings` name a module's tensor by op and position: {"attn": {"matmul.0": {…}}}.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdconvert.artifacts import write_text_atomic
from sdconvert.io.encodings.entries import entry_text
from sdconvert.io.encodings.tensor import LEGACY, TensorEncoding

PARAMS, ACTIVATIONS, FUNCTIONAL, MIXED = (
    "param_encodings",
    "activation_encodings",
    "functional_encodings",
    "encodings",
)
_COMPACT = (",", ":")


@dataclass(frozen=True)
class EncodingsFile:
    """The content of a file.

    Args:
        version: Of the form; `0.6.1` where the file does not say.
        header: Top-level keys in the file's order; those of the sections below hold None.
        tensors: By section (`param_encodings`, `activation_encodings`, `encodings`), then by name.
        modules: `activation_encodings` keyed by module, as they are in the file.
        functional: `functional_encodings`, as they are in the file.
        flat: Whether the file is the body of `param_encodings` alone.
    """

    version: str
    header: dict[str, Any]
    tensors: dict[str, dict[str, TensorEncoding]]
    modules: dict[str, Any] = field(default_factory=dict)
    functional: dict[str, Any] = field(default_factory=dict)
    flat: bool = False

    @property
    def params(self) -> dict[str, TensorEncoding]:
        """Of parameters; empty in form 2, which does not tell them from activations."""
        return self.tensors.get(PARAMS, {})

    @property
    def activations(self) -> dict[str, TensorEncoding]:
        """By tensor of an ONNX graph; empty in form 2, which does not tell them from parameters."""
        return self.tensors.get(ACTIVATIONS, {})

    @property
    def mixed(self) -> dict[str, TensorEncoding]:
        """The one list of form 2."""
        return self.tensors.get(MIXED, {})

    def every_tensor(self) -> Iterator[tuple[str, TensorEncoding]]:
        """Name and entry of every tensor that is not keyed by module."""
        for section in self.tensors.values():
            yield from section.items()

    def dumps(self) -> str:
        """The text of the file: one line per tensor or module, in order."""
        if self.flat:
            return _object(_legacy_lines(self.params)) + "\n"
        parts = []
        for key, value in self.header.items():
            parts.append(f"{json.dumps(key)}: {self._section_text(key) or json.dumps(value)}")
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_text_atomic(self.dumps(), path)

    def _section_text(self, key: str) -> str | None:
        if key == FUNCTIONAL or (key == ACTIVATIONS and key not in self.tensors):
            section = self.functional if key == FUNCTIONAL else self.modules
            return _object(f"{json.dumps(k)}: {json.dumps(v, separators=_COMPACT)}" for k, v in section.items())
        if key not in self.tensors:
            return None
        if self.version == LEGACY:
            return _object(_legacy_lines(self.tensors[key]))
        lines = [entry_text(encoding) for encoding in self.tensors[key].values()]
        return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"


def _legacy_lines(section: Mapping[str, TensorEncoding]) -> Iterator[str]:
    return (f"{json.dumps(name)}: {entry_text(encoding)}" for name, encoding in section.items())


def _object(lines: Iterator[str]) -> str:
    text = ",\n".join(lines)
    return "{\n" + text + "\n}" if text else "{}"
