"""The proof that nothing changed: every part's grid is that of its rows, and so are the dequantized weights."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sdconvert.errors import QualityGateError
from sdconvert.io.encodings import EncodingsFile
from sdconvert.io.encodings.document import ACTIVATIONS
from sdconvert.io.encodings.grid import Grid, grid_of
from sdconvert.mha2sha.encodings_parameters import find_parameter
from sdconvert.mha2sha.row_split import Part, RowSplit

ReadRows = Callable[[str, int, int], NDArray[np.float32]]
"""Reads rows start … stop of a parameter."""

_VALUES_AT_ONCE = 2**22
_HINT = "the conversion is wrong for this file; please report it"


def verify_parameter_encodings(mha: EncodingsFile, sha: EncodingsFile, splits: Sequence[RowSplit]) -> int:
    """Compare the grid of every part with that of its rows: scale, offset, bits, row by row, to the last bit.

    Equal weights on equal grids are equal when dequantized.

    Returns:
        Number of parts that were compared.

    Raises:
        QualityGateError: A grid is missing or another.
    """
    return sum(1 for _ in _compared(mha, sha, splits))


def verify_dequantized_weights(
    mha: EncodingsFile,
    sha: EncodingsFile,
    splits: Sequence[RowSplit],
    read_mha: ReadRows,
    read_sha: ReadRows,
    sample: int = 16,
) -> int:
    """Dequantize some parts in both forms, and compare the values.

    Args:
        mha: Encodings of the MHA form.
        sha: Encodings of the SHA form.
        splits: Of the parameters.
        read_mha: Reads rows of a parameter of the MHA form.
        read_sha: Likewise of the SHA form; (rows, C) or (rows, C, 1, 1).
        sample: Number of parts, taken at equal distances.

    Returns:
        Number of values that were compared.

    Raises:
        QualityGateError: A value is another.
    """
    parts = [one for one in _compared(mha, sha, splits) if one[0].parent.endswith("weight")]
    compared = 0
    for split, part, whole, grid in parts[:: max(1, len(parts) // sample)]:
        at_once = max(1, _VALUES_AT_ONCE // max(1, read_mha(split.parent, part.start, part.start + 1).size))
        for start in range(part.start, part.stop, at_once):
            stop = min(start + at_once, part.stop)
            own = start - part.start, stop - part.start
            expected = _dequantized(read_mha(split.parent, start, stop), whole.rows(start, stop))
            found = _dequantized(read_sha(part.name, *own), grid.rows(*own))
            if not np.array_equal(expected, found):
                raise QualityGateError(
                    f"`{part.name}` dequantizes to other values than rows {start} to {stop} of `{split.parent}`",
                    hint=_HINT,
                )
            compared += found.size
    return compared


def _dequantized(rows: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    return grid.dequantized(np.asarray(rows, dtype=np.float32).reshape(rows.shape[0], -1))


def _compared(
    mha: EncodingsFile, sha: EncodingsFile, splits: Sequence[RowSplit]
) -> Iterator[tuple[RowSplit, Part, Grid, Grid]]:
    """Every part with the grid of its parent and its own, once they were found equal."""
    by_parent = {split.parent: split for split in splits}
    for section, entries in mha.tensors.items():
        if section == ACTIVATIONS:
            continue
        for name, encoding in entries.items():
            named = find_parameter(name, encoding, by_parent)
            if named is None:
                continue
            split = by_parent[named.key]
            whole = grid_of(name, encoding, split.rows, transposed=named.transposed)
            suffix = "" if split.to_convolution else name.removeprefix(named.key)
            for part in split:
                child = part.name + suffix
                entry = sha.tensors.get(section, {}).get(child)
                stays = named.transposed and not split.to_convolution
                grid = None if entry is None else grid_of(child, entry, part.stop - part.start, transposed=stays)
                if grid is None or not whole.rows(part.start, part.stop).equals(grid):
                    raise QualityGateError(
                        f"the grid of `{child}` is not that of rows {part.start} to {part.stop} of `{name}`", hint=_HINT
                    )
                yield split, part, whole, grid
