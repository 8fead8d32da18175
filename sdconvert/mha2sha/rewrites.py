"""What the rewrites beside attention per head do to names and shapes: a rename map, from a state dict's keys alone.

    rewrite             parent                       part
    linear_to_conv2d    ff.net.2.weight (C, 4C)      the same key, (C, 4C, 1, 1)      and proj_in, proj_out, to_out.0
    gated_conv2d        ff.net.0.proj.weight (8C, C) ff.net.0.proj_convs.0.weight (4C, C, 1, 1)      hidden
                                                     ff.net.0.proj_convs.1.weight (4C, C, 1, 1)      gate

The other rewrites change neither names nor shapes.
"""

from collections.abc import Iterable, Mapping

from sdconvert.errors import CheckpointError
from sdconvert.mha2sha.row_split import RowSplit, even_split
from sdconvert.models.rewrite_names import require_rewrites
from sdconvert.models.transformer_names import is_feed_forward_entry, is_linear, transformer_paths

Shapes = Mapping[str, tuple[int, ...]]


def rewrite_splits(shapes: Shapes, rewrites: Iterable[str]) -> list[RowSplit]:
    """Plan what becomes of the parameters that rewrites change, in the order of the state dict.

    Args:
        shapes: Of every parameter of the MHA form.
        rewrites: Names of the rewrites.

    Raises:
        UsageError: As `require_rewrites`.
        CheckpointError: The rows of a gated projection do not divide by two.
    """
    asked = require_rewrites(rewrites)
    transformers = dict.fromkeys(transformer_paths(_modules(shapes)))
    splits = []
    for key, shape in shapes.items():
        path, _, kind = key.rpartition(".")
        if not is_linear(path, transformers) or kind not in ("weight", "bias"):
            continue
        if _is_gated(path, shapes, transformers):
            if "gated_conv2d" in asked:
                splits.append(_halves(key, path, kind, shape))
        elif kind == "weight" and len(shape) == 2 and "linear_to_conv2d" in asked:
            splits.append(even_split(path, key, [key], shape[0], to_convolution=True))
    return splits


def _modules(shapes: Shapes) -> list[str]:
    """Paths of all modules that hold a parameter, and of those that hold such modules."""
    paths: dict[str, None] = {}
    for key in shapes:
        names = key.split(".")[:-1]
        paths |= dict.fromkeys(".".join(names[:count]) for count in range(1, len(names) + 1))
    return list(paths)


def _is_gated(path: str, shapes: Shapes, transformers: Iterable[str]) -> bool:
    """Whether a projection makes twice what the feed-forward's second one takes: values and their gates."""
    entry, _, name = path.rpartition(".")
    if name != "proj" or not is_feed_forward_entry(entry, transformers):
        return False
    first, second = (shapes.get(f"{one}.weight") for one in (path, f"{entry.removesuffix('.0')}.2"))
    return first is not None and second is not None and first[0] == 2 * second[1]


def _halves(key: str, path: str, kind: str, shape: tuple[int, ...]) -> RowSplit:
    if shape[0] % 2:
        raise CheckpointError(f"`{key}` has {shape[0]} rows, which are no two halves", hint="is the file whole?")
    children = [f"{path}_convs.{half}.{kind}" for half in range(2)]
    return even_split(path.removesuffix(".proj"), key, children, shape[0], to_convolution=kind == "weight")
