"""Cut a state dict per head: bit-equal slices, as weights of 1x1 convolutions."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sdconvert.mha2sha.row_split import RowSplit


def split_state_dict(state_dict: Mapping[str, Tensor], splits: Sequence[RowSplit]) -> dict[str, Tensor]:
    """Replace each parent by its heads' parts, at the parent's place in the order.

    Args:
        state_dict: In MHA form; it is not changed, and the result's tensors share its memory.
        splits: On its shapes.

    Returns:
        State dict in SHA form: weights (d, C, 1, 1), biases (d,).
    """
    by_parent = {split.parent: split for split in splits}
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key not in by_parent:
            result[key] = tensor
            continue
        split = by_parent[key]
        for part in split:
            result[part.name] = tensor[part.rows].reshape(split.part_shape(part, tuple(tensor.shape)))
    return result
