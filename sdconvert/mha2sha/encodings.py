"""Cut encodings per head: weights by rows, activations by the rule `inherit` (each head gets its parent's range).

Tensors of the attention's forward, per layer, by the names of `quantize/graph.py`:

    MHA   mul.0 (q·scale)   matmul.0 (·k)   softmax.0   matmul.1 (·v)                 (all heads in one tensor)
    SHA   mul.i             matmul.2i       softmax.i   matmul.2i+1   then cat.0      (head i)
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import Encoding, ParamEncodings
from sdconvert.mha2sha.heads import PROJECTIONS
from sdconvert.mha2sha.row_split import RowSplit

_MHA_POSITIONS = {"matmul.0", "matmul.0.second", "mul.0", "softmax.0", "matmul.1", "matmul.1.second"}


def split_parameters(params: ParamEncodings, splits: Sequence[RowSplit], keys: Sequence[str]) -> ParamEncodings:
    """Replace each parent's encodings by its heads'.

    A list of one entry (per tensor) goes to every head; one of as many entries as rows (per channel) is sliced.

    Args:
        params: By parameter.
        splits: From `head_splits`.
        keys: All parameters of the MHA form.

    Raises:
        EncodingsError: An entry is for no parameter, or its number of entries fits neither rule.
    """
    if unknown := sorted(params.keys() - set(keys)):
        near = difflib.get_close_matches(unknown[0], keys, n=1, cutoff=0)
        raise EncodingsError(
            f"{len(unknown)} encodings are for no parameter of the weights, the first `{unknown[0]}`",
            hint=f"nearest parameter: `{near[0]}`" if near else "",
        )
    by_parent = {split.parent: split for split in splits}
    result: ParamEncodings = {}
    for key, entries in params.items():
        split = by_parent.get(key)
        if split is None:
            result[key] = entries
        elif len(entries) == 1:
            result |= {part.name: entries for part in split}
        elif len(entries) == split.rows:
            result |= {part.name: entries[part.rows] for part in split}
        else:
            raise EncodingsError(
                f"`{key}` has {len(entries)} encodings: neither 1 (per tensor) nor {split.rows} (per row)",
                hint="block-wise encodings are not split yet; quantize per tensor or per channel",
            )
    return result


def split_activations(sections: Mapping[str, Any], splits: Sequence[RowSplit]) -> dict[str, Any]:
    """Give every head the ranges of its parent's tensors.

    Args:
        sections: `activation_encodings` and `functional_encodings`.
        splits: From `head_splits`.

    Raises:
        EncodingsError: An attention layer's forward has other tensors than plain attention.
    """
    heads = {split.layer: len(split.parts) for split in splits}
    activations: dict[str, Any] = {}
    for path, places in sections["activation_encodings"].items():
        layer, _, name = path.rpartition(".")
        if layer in heads and name in PROJECTIONS:
            activations |= {f"{layer}.{name}_convs.{head}": places for head in range(heads[layer])}
        else:
            activations[path] = places
    functional = {
        path: _per_head(path, positions, heads[path]) if path in heads else positions
        for path, positions in sections["functional_encodings"].items()
    }
    return {"activation_encodings": activations, "functional_encodings": functional}


def _per_head(path: str, positions: Mapping[str, Encoding], heads: int) -> dict[str, Encoding]:
    if positions.keys() != _MHA_POSITIONS:
        odd = ", ".join(sorted(positions.keys() ^ _MHA_POSITIONS))
        raise EncodingsError(
            f"attention `{path}` is not scale, matmul, softmax, matmul: {odd}", hint="quantize it with sdconvert"
        )
    result: dict[str, Encoding] = {}
    for head in range(heads):
        for name, target in (("matmul.0", f"matmul.{2 * head}"), ("matmul.1", f"matmul.{2 * head + 1}")):
            result[target] = positions[name]
            result[f"{target}.second"] = positions[f"{name}.second"]
        result[f"mul.{head}"] = positions["mul.0"]
        result[f"softmax.{head}"] = positions["softmax.0"]
    return result | {"cat.0": positions["matmul.1"]}
