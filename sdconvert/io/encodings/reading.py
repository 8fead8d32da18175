"""Read an encodings file, whatever version and form it has."""

from pathlib import Path
from typing import Any

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings.check import check
from sdconvert.io.encodings.describe import leaf_entries
from sdconvert.io.encodings.document import ACTIVATIONS, FUNCTIONAL, MIXED, PARAMS, EncodingsFile
from sdconvert.io.encodings.entries import from_legacy
from sdconvert.io.encodings.scan import Scanner
from sdconvert.io.encodings.tensor import LEGACY, LISTS, VERSIONS, TensorEncoding

_HEADER = ("version", "producer", "excluded_layers", "quantizer_args")
_SECTIONS = (PARAMS, ACTIVATIONS, FUNCTIONAL, MIXED)


def read_encodings_file(path: Path) -> EncodingsFile:
    """Read a file of any version and form.

    Raises:
        EncodingsError: The file is missing, no JSON, of an unknown version, or an entry is no grid.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return parse_encodings(text)
    except EncodingsError as error:
        raise EncodingsError(f"`{path}`: {error.args[0]}", hint=error.hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise EncodingsError(f"`{path}` cannot be read: {error}", hint="export the encodings again") from error


def parse_encodings(text: str) -> EncodingsFile:
    """Read the text of a file.

    Raises:
        EncodingsError: As `read_encodings_file`.
        ValueError: It is no JSON.
    """
    scanner = Scanner(text)
    if scanner.peek() != "{":
        scanner.value()
        scanner.end()
        raise EncodingsError("it holds no encodings", hint="expected a JSON object")
    reader = _Reader(scanner)
    for key in scanner.members():
        reader.read(key)
    scanner.end()
    return reader.finish()


class _Reader:
    """Collects the top-level keys; the version may stand behind the sections."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._header: dict[str, Any] = {}
        self._sections: dict[str, Any] = {}
        self._flat: dict[str, TensorEncoding] = {}

    def read(self, key: str) -> None:
        """Read what stands under a top-level key."""
        known = key in _SECTIONS or key in _HEADER
        if self._flat and known:
            raise EncodingsError(f"`{key}` stands among parameters", hint="a file is flat, or has sections")
        if key in _SECTIONS:
            self._header[key] = None
            self._sections[key] = self._section(key)
        elif known or self._header:
            self._header[key] = self._scanner.value()
        else:
            self._flat[key] = from_legacy(key, self._scanner.value())

    def _section(self, key: str) -> dict[str, Any] | list[Any]:
        if self._scanner.peek() == "[":
            return [self._scanner.value() for _ in self._scanner.items()]
        if self._scanner.peek() != "{":
            raise EncodingsError(
                f"{key} is a {type(self._scanner.value()).__name__}", hint="expected an object or a list"
            )
        section: dict[str, Any] = {}
        for name in self._scanner.members():
            value = self._scanner.value()
            # At once: as a tree of dictionaries, the entries of a large model take several times the memory.
            section[name] = from_legacy(name, value) if key == PARAMS or isinstance(value, list) else value
        return section

    def finish(self) -> EncodingsFile:
        """The file, checked."""
        if self._flat:
            file = EncodingsFile(LEGACY, {}, {PARAMS: self._flat}, flat=True)
        elif not self._sections:
            raise EncodingsError("it holds no encodings", hint=f"expected {PARAMS}, {ACTIVATIONS} or {MIXED}")
        else:
            file = self._with_sections(self._header.get("version", LEGACY))
        for name, encoding in file.every_tensor():
            check(name, encoding)
        for section in (file.modules, file.functional):
            for path, places in section.items():
                for encoding in leaf_entries(places, path):
                    check(path, encoding)
        return file

    def _with_sections(self, version: Any) -> EncodingsFile:
        if version not in VERSIONS:
            raise EncodingsError(f"it has encoding version {version}", hint=f"known are {', '.join(VERSIONS)}")
        if version == LISTS and all(isinstance(section, dict) for section in self._sections.values()):
            version = LEGACY  # what AIMET calls 1.0.0 in `*_torch.encodings` has the form of 0.6.1
        forms = {LEGACY: (dict, (PARAMS, ACTIVATIONS, FUNCTIONAL)), LISTS: (list, (PARAMS, ACTIVATIONS))}
        form, names = forms.get(version, (list, (MIXED,)))
        for name, section in self._sections.items():
            if name not in names or not isinstance(section, form):
                raise EncodingsError(
                    f"{name} is {_a(section)}, and the version {version}",
                    hint=f"form {version} has {' and '.join(names)}, each {_a(form())}",
                )
        if version != LEGACY:
            tensors = {name: _by_name(version, section) for name, section in self._sections.items()}
            return EncodingsFile(version, self._header, tensors)
        activations = self._sections.get(ACTIVATIONS, {})
        modules = {key: value for key, value in activations.items() if not isinstance(value, TensorEncoding)}
        if modules and len(modules) != len(activations):
            raise EncodingsError(
                f"{ACTIVATIONS} is keyed by module (`{next(iter(modules))}`) and by tensor", hint="export it again"
            )
        tensors = {name: self._sections[name] for name in (PARAMS, ACTIVATIONS) if name in self._sections}
        if modules:
            del tensors[ACTIVATIONS]
        return EncodingsFile(LEGACY, self._header, tensors, modules, self._sections.get(FUNCTIONAL, {}))


def _a(section: Any) -> str:
    return "an object" if isinstance(section, dict) else "a list"


def _by_name(version: str, section: list[Any]) -> dict[str, TensorEncoding]:
    found: dict[str, TensorEncoding] = {}
    for item in section:
        if not isinstance(item, dict) or not isinstance(name := item.get("name"), str):
            raise EncodingsError(f"an entry has no name: {str(item)[:80]}", hint=f"form {version} names every tensor")
        if name in found:
            raise EncodingsError(f"`{name}` is there twice", hint="keep one of them")
        found[name] = TensorEncoding(version, item)
    return found
