"""Cut encodings as weights are cut, and put them together again.

Parameters go by rows (`encodings_parameters.py`), activations by the rule `inherit`: each head gets its parent's range,
keyed by module (`encodings_modules.py`) or by tensor of an ONNX graph (`encodings_onnx.py`).
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import EncodingsFile, TensorEncoding
from sdconvert.io.encodings.document import ACTIVATIONS, FUNCTIONAL, MIXED, PARAMS
from sdconvert.io.encodings.entries import from_json, to_json
from sdconvert.mha2sha.encodings_graphs import MatchedGraphs
from sdconvert.mha2sha.encodings_modules import (
    ModuleMap,
    join_functional,
    join_modules,
    split_functional,
    split_modules,
)
from sdconvert.mha2sha.encodings_onnx import LeftOut, TensorNames, module_of
from sdconvert.mha2sha.encodings_parameters import cut, find_parameter, join, renamed
from sdconvert.mha2sha.encodings_verify import verify_dequantized_weights, verify_parameter_encodings
from sdconvert.mha2sha.row_split import RowSplit

__all__ = [
    "LeftOut",
    "SplitEncodings",
    "merge_encodings",
    "split_encodings",
    "verify_dequantized_weights",
    "verify_parameter_encodings",
]

_NORM = "layer_norm.0"
_HALVES = {"encoder", "decoder"}
_SHA_HINT = "name the file with the MHA form"
_LIKE_A_PARAMETER = re.compile(r"[^/].*\.(weight|bias)(_\d+)?")


@dataclass(frozen=True)
class SplitEncodings:
    """What becomes of a file.

    Attributes:
        file: In SHA form.
        left_out: Activations that have no counterpart there.
        record: What `merge_encodings` needs beside the splits; JSON.
    """

    file: EncodingsFile
    left_out: tuple[LeftOut, ...]
    record: dict[str, Any]


def split_encodings(
    file: EncodingsFile,
    splits: Sequence[RowSplit],
    keys: Collection[str],
    inputs: Collection[str] = (),
    *,
    graphs: tuple[Path, Path] | None = None,
    keep_ranges: bool = False,
) -> SplitEncodings:
    """Cut all that a file says about a model.

    Args:
        file: Of the MHA form, any version.
        splits: Of the parameters.
        keys: All parameters of the MHA form.
        inputs: Names of the graph's inputs, where activations are keyed by tensor.
        graphs: ONNX files of the MHA and of the SHA form, which place tensors that their names do not.
        keep_ranges: Whether the record holds all ranges of rewritten layers, because the result's will be changed.

    Raises:
        EncodingsError: The file is in SHA form already, names a parameter that is not there, lacks one of a layer
            whose others it has, or an entry does not fit its rows.
    """
    module_map = ModuleMap(splits)
    _require_mha(file, splits, module_map)
    every = [name for name, _ in file.every_tensor()]
    names = MatchedGraphs(module_map, *graphs) if graphs else TensorNames(module_map, every, keys, inputs)
    splitter = _Splitter(splits, frozenset(keys), names)
    tensors = {section: splitter.split(section, entries) for section, entries in file.tensors.items()}
    _require_whole_layers(file, splits, splitter.found)
    record = splitter.record()
    modules, functional = dict(file.modules), dict(file.functional)
    # AIMET has one range for a module however often it is called; our graph has one for each call.
    norms = {path: at for at, path in enumerate(modules) if FUNCTIONAL in file.header and module_map.calls(path) > 1}
    functional |= {path: {_NORM: modules.pop(path)["output"]["0"]} for path in norms}
    order = {path: list(names) for path, names in functional.items() if module_map.many(path)}
    record |= {name: part for name, part in (("norms", norms), ("functional", order)) if part}
    if keep_ranges:
        record["ranges"] = {
            "modules": {path: places for path, places in file.modules.items() if module_map.changes(path)},
            "functional": {path: places for path, places in file.functional.items() if module_map.changes(path)},
        }
    split = replace(
        file,
        tensors=tensors,
        modules=split_modules(modules, module_map),
        functional=split_functional(functional, module_map),
    )
    return SplitEncodings(split, tuple(splitter.left_out), record)


def merge_encodings(file: EncodingsFile, splits: Sequence[RowSplit], record: Mapping[str, Any]) -> EncodingsFile:
    """The inverse of `split_encodings`.

    Args:
        file: In SHA form.
        splits: Of the parameters.
        record: As `split_encodings` gave it.

    Raises:
        EncodingsError: Parts are missing, or parts of one scale differ.
    """
    module_map = ModuleMap(splits)
    tensors = {section: _joined(section, file, splits, record) for section, entries in file.tensors.items()}
    functional = join_functional(file.functional, record.get("functional", {}), module_map)
    kept = record.get("ranges", {"modules": {}, "functional": {}})
    functional |= kept["functional"]
    modules = list((join_modules(file.modules, module_map) | kept["modules"]).items())
    for path, at in record.get("norms", {}).items():
        modules.insert(at, (path, {"output": {"0": functional.pop(path)[_NORM]}}))
    return replace(file, tensors=tensors, modules=dict(modules), functional=functional)


class _Splitter:
    """Splits sections, and remembers what the reverse needs."""

    def __init__(self, splits: Sequence[RowSplit], keys: frozenset[str], names: TensorNames | MatchedGraphs) -> None:
        self._by_parent = {split.parent: split for split in splits}
        self._keys = keys
        self._names = names
        self.left_out: list[LeftOut] = []
        self.found: set[str] = set()
        self.notes: dict[str, Any] = {}
        self.renamed: dict[str, dict[str, list[str]]] = {}
        self.dropped: dict[str, list[list[Any]]] = {}

    def split(self, section: str, entries: Mapping[str, TensorEncoding]) -> dict[str, TensorEncoding]:
        """One section of the SHA form."""
        result: dict[str, TensorEncoding] = {}
        unknown = []
        for index, (name, encoding) in enumerate(entries.items()):
            named = None if section == ACTIVATIONS else find_parameter(name, encoding, self._keys)
            if named is not None:
                self.found.add(named.key)
                split = self._by_parent.get(named.key)
                parts = [(name, encoding)]
                if split is not None:
                    parts, note = cut(named, encoding, split)
                    self.notes |= {named.key: note} if note else {}
            elif section == PARAMS or (section == MIXED and _LIKE_A_PARAMETER.fullmatch(name)):
                unknown.append(name)
                continue
            else:
                parts = self._activation(section, index, name, encoding)
            for child, part in parts:
                if child in result or (named is not None and child != name and child in entries):
                    raise EncodingsError(f"`{child}`, a part of `{name}`, is in the file already", hint=_SHA_HINT)
                result[child] = part
        if unknown:
            _refuse_unknown(unknown, self._keys)
        return result

    def record(self) -> dict[str, Any]:
        """What the reverse needs; empty parts are left away."""
        parts = {"parameters": self.notes, "renamed": self.renamed, "left_out": self.dropped}
        return {name: part for name, part in parts.items() if part}

    def _activation(
        self, section: str, index: int, name: str, encoding: TensorEncoding
    ) -> list[tuple[str, TensorEncoding]]:
        children = self._names.children(name)
        if isinstance(children, LeftOut):
            self.left_out.append(children)
            self.dropped.setdefault(section, []).append([index, name, to_json(encoding)])
            return []
        if children != (name,):
            self.renamed.setdefault(section, {})[name] = list(children)
        return [(child, renamed(encoding, child)) for child in children]


def _joined(
    section: str, file: EncodingsFile, splits: Sequence[RowSplit], record: Mapping[str, Any]
) -> dict[str, TensorEncoding]:
    entries = file.tensors[section]
    notes = record.get("parameters", {})
    children = (
        {}
        if section == ACTIVATIONS
        else {part.name + _suffix(split, notes): split for split in splits for part in split}
    )
    parents = {child: parent for parent, names in record.get("renamed", {}).get(section, {}).items() for child in names}
    found: dict[str, TensorEncoding] = {}
    for name, encoding in entries.items():
        if name in parents:
            found.setdefault(parents[name], renamed(encoding, parents[name]))
        elif name not in children:
            found[name] = encoding
        else:
            split = children[name]
            note = notes.get(split.parent, {})
            parent = note.get("name", split.parent)
            if parent not in found:
                wanted = [part.name + _suffix(split, notes) for part in split]
                if missing := [one for one in wanted if one not in entries]:
                    raise EncodingsError(
                        f"`{missing[0]}` and {len(missing) - 1} more parts of `{parent}` have no encoding",
                        hint="use the files as `sdconvert mha2sha` wrote them",
                    )
                found[parent] = join(split, [entries[one] for one in wanted], note)[1]
    items = list(found.items())
    for index, name, value in record.get("left_out", {}).get(section, []):
        items.insert(index, (name, from_json(file.version, name, value)))
    return dict(items)


def _suffix(split: RowSplit, notes: Mapping[str, Any]) -> str:
    if split.to_convolution:
        return ""
    return str(notes.get(split.parent, {}).get("name", split.parent)).removeprefix(split.parent)


def _refuse_unknown(unknown: Sequence[str], keys: Collection[str]) -> None:
    near = difflib.get_close_matches(unknown[0], keys, n=1, cutoff=0)
    raise EncodingsError(
        f"{len(unknown)} encodings are for no parameter of the weights, the first `{unknown[0]}`",
        hint=f"nearest parameter: `{near[0]}`" if near else "",
    )


def _require_mha(file: EncodingsFile, splits: Sequence[RowSplit], module_map: ModuleMap) -> None:
    parts = {part.name for split in splits for part in split if part.name != split.parent}
    modules = {child for children in module_map.children.values() for child in children}
    found = [name for name, _ in file.every_tensor() if name in parts or module_of(name) in modules]
    found += [path for path in (*file.modules, *file.functional) if path in modules]
    if found:
        raise EncodingsError(
            f"the encodings are in SHA form already: `{found[0]}` and {len(found) - 1} more", hint=_SHA_HINT
        )


def _in_other_half(layer: str, found: Collection[str]) -> bool:
    half = layer.partition(".")[0]
    if half not in _HALVES:
        return False
    return {key.partition(".")[0] for key in found} & _HALVES == _HALVES - {half}


def _require_whole_layers(file: EncodingsFile, splits: Sequence[RowSplit], found: Collection[str]) -> None:
    """Entries of one projection and none of another are a damaged file; form 2 leaves float tensors out, by layer.

    The graph of an autoencoder is one half of it: a file with entries of that half has none of the other.
    """
    excluded = set(file.header.get("excluded_layers") or ())
    heads = ModuleMap(splits).heads
    wanted: dict[tuple[str, str], list[str]] = {}
    for split in splits:
        module, _, kind = split.parent.rpartition(".")
        if split.layer in heads and module not in excluded and not _in_other_half(split.layer, found):
            whole = split.layer if kind == "bias" or MIXED in file.tensors else ""
            wanted.setdefault((whole, kind), []).append(split.parent)
    for parents in wanted.values():
        missing = [parent for parent in parents if parent not in found]
        if missing and len(missing) < len(parents):
            there = next(parent for parent in parents if parent in found)
            raise EncodingsError(
                f"there are encodings for `{there}`, and none for `{missing[0]}` ({len(missing)} are missing)",
                hint="export them again, or list the layer in excluded_layers",
            )
