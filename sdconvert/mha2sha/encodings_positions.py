"""Tensors inside attention, before and after the split, by op and position (see `quantize/graph.py`).

                MHA (all heads at once)                    SHA (head i of n, keys and values j of m)
    keys        cat.0        values   cat.1                cat.2j     cat.2j+1      only with added keys and values
    mul.0       q · scale                                  mul.i
    matmul.0    · k                                        matmul.2i
    add.0       + mask                                     add.i
    softmax.0                                              softmax.i
    matmul.1    · v                                        matmul.2i+1   and the heads together: cat.0, or cat.2m
    add, div    what follows                               the same, counted behind those of the heads

The order of a layer's positions is that of execution: it tells a mask's `add.0` from a residual connection's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sdconvert.errors import EncodingsError
from sdconvert.mha2sha.heads import LayerHeads

SECOND = ".second"
_NEEDED = ("matmul.0", "softmax.0", "matmul.1")
_BETWEEN = {
    "matmul.0": ("cat.0", "cat.1", "mul.0"),
    "softmax.0": ("add.0",),
    "matmul.1": (),
}
_PLAIN = {"mul.0", *_NEEDED}
_HINT = "quantize it with sdconvert"


@dataclass(frozen=True)
class Position:
    """A tensor of the MHA form by name, and those of the SHA form that stand for it."""

    name: str
    children: tuple[str, ...]


def split_positions(layer: str, names: Sequence[str], heads: LayerHeads) -> list[Position]:
    """Where each tensor of an attention's forward goes.

    Args:
        layer: Path of the attention.
        names: Of its tensors, in order of execution; second operands of MatMul may stand anywhere.
        heads: Of the layer.

    Raises:
        EncodingsError: Its forward has other tensors than attention written out.
    """
    constants = {name for name in names if name.startswith("constant.")}
    values = [name for name in names if not name.endswith(SECOND) and name not in constants]
    seconds = [name for name in names if name.endswith(SECOND)]
    inside = _inside(layer, values)
    if odd := [name for name in seconds if name.removesuffix(SECOND) not in ("matmul.0", "matmul.1")]:
        raise _odd(layer, odd)
    per_head = {
        "cat.0": [f"cat.{2 * one}" for one in range(heads.key_value)],
        "cat.1": [f"cat.{2 * one + 1}" for one in range(heads.key_value)],
        "matmul.0": [f"matmul.{2 * one}" for one in range(heads.query)],
        "matmul.1": [f"matmul.{2 * one + 1}" for one in range(heads.query)],
        **{f"{op}.0": [f"{op}.{one}" for one in range(heads.query)] for op in ("mul", "add", "softmax")},
    }
    together = f"cat.{2 * heads.key_value if 'cat.0' in inside else 0}"
    found = {name: [name] for name in constants}
    for name in values:
        children = per_head[name] if name in inside else [_behind(name, inside, heads)]
        found[name] = [*children, together] if name == "matmul.1" else children
    for name in seconds:
        found[name] = [f"{child}{SECOND}" for child in per_head[name.removesuffix(SECOND)]]
    return [Position(name, tuple(found[name])) for name in names]


def _inside(layer: str, values: Sequence[str]) -> set[str]:
    """The positions up to the product with the values; each is of one of the steps, in their order."""
    if missing := [name for name in _NEEDED if name not in values]:
        raise _odd(layer, missing)
    executed = values.index("matmul.0") < values.index("softmax.0") < values.index("matmul.1")
    if not executed and set(values) <= _PLAIN:
        return set(values)  # a tool has sorted the keys, and there is nothing to tell apart
    at = 0
    inside = set()
    for step, before in _BETWEEN.items():
        end = values.index(step)
        if end < at or (odd := [name for name in values[at:end] if name not in before]):
            raise _odd(layer, values[at:end] if end >= at and odd else [step])
        inside |= {*values[at:end], step}
        at = end + 1
    if ("cat.0" in inside) != ("cat.1" in inside):
        raise _odd(layer, ["cat.0"])
    return inside


def _behind(name: str, inside: set[str], heads: LayerHeads) -> str:
    """A later position of the same op, counted behind those of the heads."""
    op, _, number = name.partition(".")
    before = [one for one in inside if one.partition(".")[0] == op]
    each = heads.key_value if op == "cat" else heads.query
    together = op == "cat"  # the heads' own concatenation stands before it
    return f"{op}.{int(number) - len(before) + len(before) * each + together}"


def _odd(layer: str, names: Sequence[str]) -> EncodingsError:
    return EncodingsError(
        f"attention `{layer}` is not scale, matmul, softmax, matmul: {', '.join(sorted(names))}", hint=_HINT
    )
