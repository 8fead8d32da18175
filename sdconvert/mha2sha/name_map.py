"""`heads.json`: for every tensor of the SHA form, which rows of which tensor of the MHA form it is.

{"version": 1, "heads": {"<layer>": 8}, "left_alone": {"<layer>": "why"},
"splits": [{"layer": …, "parent": …, "to_convolution": true, "parts": [["<name>", 0, 40], …]}],
"weights": {…}, "encodings": {"<file of the SHA form>": {…}}, "rewrites": ["<name>"], "folded": {"<name>": 0.125}}

`weights` and `encodings` hold what the reverse needs beside the splits: names, order, and form of the MHA files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdconvert.errors import CheckpointError
from sdconvert.io.files import write_text_atomic
from sdconvert.mha2sha.row_split import Part, RowSplit

NAME = "heads.json"
_VERSION = 1
_HINT = "it is written by `sdconvert mha2sha`; convert the MHA form again"


@dataclass(frozen=True)
class NameMap:
    """All that ties a SHA folder to the MHA form it came from.

    Attributes:
        splits: In the order of the MHA form's weights.
        heads: Of every layer that was rewritten.
        left_alone: Attention layers that were not, and why.
        weights: Layout of the MHA form's weights files.
        encodings: By name in the SHA folder: what the MHA form's file was.
        rewrites: Beside attention per head, by name.
        folded: Factor of every tensor of the SHA form that the scores' scale was multiplied into.
    """

    splits: tuple[RowSplit, ...]
    heads: Mapping[str, int]
    left_alone: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    encodings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rewrites: tuple[str, ...] = ()
    folded: Mapping[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `heads.json`, one line per parent."""
        lines = [
            json.dumps(
                {
                    "layer": split.layer,
                    "parent": split.parent,
                    "to_convolution": split.to_convolution,
                    "parts": [[part.name, part.start, part.stop] for part in split],
                }
            )
            for split in self.splits
        ]
        content = {
            "version": _VERSION,
            "heads": self.heads,
            "left_alone": self.left_alone,
            "weights": self.weights,
            "encodings": self.encodings,
            "rewrites": self.rewrites,
            "folded": self.folded,
        }
        entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        splits = '"splits": [\n' + ",\n".join(lines) + "\n]"
        write_text_atomic("{\n" + ",\n".join([*entries, splits]) + "\n}\n", folder / NAME)

    @classmethod
    def load(cls, folder: Path) -> "NameMap":
        """Read `heads.json`.

        Raises:
            CheckpointError: It is missing, damaged, or its parts do not cover their parents.
        """
        path = folder / NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["version"] != _VERSION:
                raise CheckpointError(f"`{path}` has version {content['version']}, not {_VERSION}", hint=_HINT)
            splits = tuple(_split(path, entry) for entry in content["splits"])
            rest = {key: dict(content[key]) for key in ("heads", "left_alone", "weights", "encodings", "folded")}
            if odd := [name for name in rest["encodings"] if Path(name).name != name]:
                raise CheckpointError(f"`{path}`: `{odd[0]}` is no name of a file in the folder", hint=_HINT)
            return cls(splits, **rest, rewrites=tuple(map(str, content["rewrites"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"`{path}` is no name map: {error!r}", hint=_HINT) from error


def _split(path: Path, entry: Mapping[str, Any]) -> RowSplit:
    parts = tuple(Part(str(name), int(start), int(stop)) for name, start, stop in entry["parts"])
    if not parts or not _covers(parts):
        raise CheckpointError(f"`{path}`: the parts of `{entry['parent']}` do not cover it", hint=_HINT)
    return RowSplit(str(entry["layer"]), str(entry["parent"]), parts, bool(entry["to_convolution"]))


def _covers(parts: Sequence[Part]) -> bool:
    starts = [0, *(part.stop for part in parts[:-1])]
    return all(part.start == start and part.stop > start for part, start in zip(parts, starts, strict=True))
