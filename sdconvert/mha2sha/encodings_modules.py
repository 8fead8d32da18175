"""Activations keyed by module, by the rule `inherit`: each head gets its parent's range."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sdconvert.mha2sha.encodings_positions import Position, split_positions
from sdconvert.mha2sha.heads import layer_heads
from sdconvert.mha2sha.row_split import RowSplit

_NORMS = ("norm_q", "norm_k")


class ModuleMap:
    """Which modules of the SHA form stand for which of the MHA form.

    Args:
        splits: Of the parameters; a module goes where its weight goes.

    Attributes:
        heads: Of each attention that is cut.
        children: Parts of each module that goes by other names.
        convolutions: Parts of each module that becomes convolutions, which may keep its name.
    """

    def __init__(self, splits: Sequence[RowSplit]) -> None:
        self.heads = layer_heads(splits)
        self.children: dict[str, tuple[str, ...]] = {}
        self.convolutions: dict[str, tuple[str, ...]] = {}
        for split in splits:
            parent, _, kind = split.parent.rpartition(".")
            children = tuple(part.name.removesuffix(f".{kind}") for part in split)
            if children != (parent,):
                self.children[parent] = children
            if split.to_convolution:
                self.convolutions[parent] = children

    def calls(self, path: str) -> int:
        """How often a module of the MHA form is called in the SHA form: norms of queries and keys once per head."""
        layer, _, name = path.rpartition(".")
        heads = self.heads.get(layer)
        if heads is None or name not in _NORMS:
            return 1
        return heads.query if name == "norm_q" else heads.key_value

    def changes(self, path: str) -> bool:
        """Whether a module of the MHA form goes by other names, or is an attention that is cut, or a part of one."""
        parents = itertools.accumulate(path.split("."), "{}.{}".format)
        return path in self.children or any(parent in self.heads for parent in parents)

    def many(self, path: str) -> bool:
        """Whether a module's forward has several tensors in the SHA form for one of the MHA form."""
        return path in self.heads or self.calls(path) > 1


def split_modules(modules: Mapping[str, Any], module_map: ModuleMap) -> dict[str, Any]:
    """`activation_encodings` of the SHA form: every part of a module gets its range."""
    return {child: places for path, places in modules.items() for child in module_map.children.get(path, (path,))}


def join_modules(modules: Mapping[str, Any], module_map: ModuleMap) -> dict[str, Any]:
    """The inverse of `split_modules`: a module's range is that of its first part."""
    parents = {child: parent for parent, children in module_map.children.items() for child in children}
    found: dict[str, Any] = {}
    for path, places in modules.items():
        found.setdefault(parents.get(path, path), places)
    return found


def split_functional(functional: Mapping[str, Any], module_map: ModuleMap) -> dict[str, dict[str, Any]]:
    """`functional_encodings` of the SHA form.

    Raises:
        EncodingsError: An attention's forward has other tensors than attention written out.
    """
    found = {}
    for path, positions in functional.items():
        if module_map.many(path):
            where = _positions(path, list(positions), module_map)
            found[path] = {child: positions[one.name] for one in where for child in one.children}
        else:
            found[path] = positions
    return found


def join_functional(
    functional: Mapping[str, Any], order: Mapping[str, Sequence[str]], module_map: ModuleMap
) -> dict[str, dict[str, Any]]:
    """The inverse of `split_functional`.

    Args:
        functional: Of the SHA form.
        order: Names of each rewritten layer's tensors in the MHA form.
        module_map: As there.
    """
    found = {}
    for path, positions in functional.items():
        if path in order:
            where = _positions(path, order[path], module_map)
            found[path] = {one.name: positions[one.children[0]] for one in where}
        else:
            found[path] = positions
    return found


def _positions(path: str, names: Sequence[str], module_map: ModuleMap) -> list[Position]:
    if path in module_map.heads:
        return split_positions(path, names, module_map.heads[path])
    ops = [name.partition(".")[0] for name in names]
    found = []
    for name, op in zip(names, ops, strict=True):
        first, each = int(name.partition(".")[2]), ops.count(op)
        found.append(Position(name, tuple(f"{op}.{first + call * each}" for call in range(module_map.calls(path)))))
    return found
