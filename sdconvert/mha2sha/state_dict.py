"""Cut a state dict per head: bit-equal slices, as weights of 1x1 convolutions."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from sdconvert.mha2sha.heads import HeadSplit


def split_state_dict(state_dict: Mapping[str, Tensor], splits: Sequence[HeadSplit]) -> dict[str, Tensor]:
    """Replace each parent by its heads' parts, at the parent's place in the order.

    Args:
        state_dict: In MHA form; it is not changed, and the result's tensors share its memory.
        splits: From `head_splits` on its shapes.

    Returns:
        State dict in SHA form: weights (d, C, 1, 1), biases (d,).
    """
    by_parent = {split.parent: split for split in splits}
    result: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key not in by_parent:
            result[key] = tensor
            continue
        for name, rows in by_parent[key].parts():
            part = tensor[rows]
            result[name] = part[:, :, None, None] if by_parent[key].kind == "weight" else part
    return result
