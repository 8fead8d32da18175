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

from sdconvert.io.encodings.entries import entry_text
from sdconvert.io.encodings.tensor import LEGACY, TensorEncoding
from sdconvert.io.files import atomic_file

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
        return "".join(self._pieces())

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(self._pieces())

    def _pieces(self) -> Iterator[str]:
        if self.flat:
            yield from _enclosed(_legacy_lines(self.params), "{}")
        else:
            separator = "{\n"
            for key, value in self.header.items():
                yield f"{separator}{json.dumps(key)}: "
                yield from self._section(key, value)
                separator = ",\n"
            yield "\n}"
        yield "\n"

    def _section(self, key: str, value: Any) -> Iterator[str]:
        if key == FUNCTIONAL or (key == ACTIVATIONS and key not in self.tensors):
            section = self.functional if key == FUNCTIONAL else self.modules
            return _enclosed(
                (f"{json.dumps(k)}: {json.dumps(v, separators=_COMPACT)}" for k, v in section.items()), "{}"
            )
        if key not in self.tensors:
            return iter([json.dumps(value)])
        if self.version == LEGACY:
            return _enclosed(_legacy_lines(self.tensors[key]), "{}")
        return _enclosed(map(entry_text, self.tensors[key].values()), "[]")


def _legacy_lines(section: Mapping[str, TensorEncoding]) -> Iterator[str]:
    return (f"{json.dumps(name)}: {entry_text(encoding)}" for name, encoding in section.items())


def _enclosed(lines: Iterator[str], brackets: str) -> Iterator[str]:
    """Lines in brackets, one after the other: the text of a large file is never in memory whole."""
    separator = f"{brackets[0]}\n"
    for line in lines:
        yield f"{separator}{line}"
        separator = ",\n"
    yield brackets if separator != ",\n" else f"\n{brackets[1]}"
