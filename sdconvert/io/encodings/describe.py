"""What an encodings file holds, in numbers."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from sdconvert.io.encodings.document import ACTIVATIONS, FUNCTIONAL, EncodingsFile
from sdconvert.io.encodings.entries import from_legacy
from sdconvert.io.encodings.tensor import Kind, TensorEncoding


def describe(file: EncodingsFile) -> dict[str, Any]:
    """Version, form, and by section the number of entries and of each kind of grid, `int8 channel`."""
    sections: dict[str, tuple[int, Iterable[TensorEncoding]]] = {
        name: (len(entries), entries.values()) for name, entries in file.tensors.items()
    }
    for name, places in ((ACTIVATIONS, file.modules), (FUNCTIONAL, file.functional)):
        if places:
            sections[name] = (len(places), leaf_entries(places))
    return {
        "version": file.version,
        "flat": file.flat,
        "activations_by": "module" if file.modules else "tensor",
        "sections": {
            name: {"entries": count, "grids": dict(Counter(map(_grid, entries)).most_common())}
            for name, (count, entries) in sections.items()
        },
    }


def leaf_entries(places: Any, path: str = "") -> Iterator[TensorEncoding]:
    """Every encoding in objects by module, by input or output, and by position."""
    if isinstance(places, dict) and places and all(isinstance(item, dict) for item in places.values()):
        for key, item in places.items():
            yield from leaf_entries(item, path or key)
    else:
        yield from_legacy(path, [places])


def _grid(encoding: TensorEncoding) -> str:
    kind = encoding.kind
    if kind is Kind.FLOAT:
        return f"float{encoding.bitwidth}"
    if "output_dtype" in encoding.fields:
        return f"{encoding.fields['output_dtype']} {kind}"
    symmetric = encoding.fields.get("is_sym", encoding.fields.get("is_symmetric")) in (True, "True")
    bits = encoding.fields.get("compressed_bw", encoding.bitwidth)
    return f"{'' if symmetric else 'u'}int{bits} {kind}"
