"""The rename map of attention: which rows of which projection become which head's convolution.

to_q.weight (heads * d, C)             ->  to_q_convs.0.weight (d, C, 1, 1) …
to_k.weight (kv heads * d, C')         ->  to_k_convs.0.weight (d, C', 1, 1) …        kv heads: heads, or fewer
to_qkv.weight (3 * heads * d, C)       ->  to_q_convs.0.weight … to_k_convs.0.weight … to_v_convs.0.weight …
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdconvert.errors import CheckpointError
from sdconvert.mha2sha.row_split import RowSplit, even_split

PROJECTIONS = ("to_q", "to_k", "to_v")
CUT_INTO: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in (*PROJECTIONS, "add_k_proj", "add_v_proj", "q_proj", "k_proj", "v_proj")},
    "to_qkv": PROJECTIONS,
    "to_kv": ("to_k", "to_v"),
}
"""Every projection, and the projections whose heads its rows are, in order; `q_proj` and so on are CLIP's."""

_WHOLE = (
    {"to_q", "to_k", "to_v"},
    {"to_qkv"},
    {"to_q", "to_kv"},
    {"to_q", "add_k_proj", "add_v_proj"},
    {"to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"},
    {"q_proj", "k_proj", "v_proj"},
)
_QUERIES = ("to_q", "q_proj")
_PARAMETER = re.compile(rf"^(?P<layer>.+)\.(?P<projection>{'|'.join(CUT_INTO)})\.(?P<kind>weight|bias)$")
_HEAD = re.compile(rf"^(?P<layer>.+)\.(?P<projection>{'|'.join(CUT_INTO)})_convs\.\d+\.(?P<kind>weight|bias)$")
_JOINT = ("add_q_proj.weight", "to_added_qkv.weight")
_CHECK_HEADS = "check num_attention_heads (or attention_head_dim) in config.json, or --num-heads"

Shapes = Mapping[str, tuple[int, ...]]
Problems = list[tuple[str, str]]
"""What stands against cutting a layer, and what to do about it."""


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer.

    Attributes:
        query: Number of heads.
        key_value: Number of heads that have keys and values of their own; the others share them.
        dim_head: Channels of a head.
    """

    query: int
    key_value: int
    dim_head: int


def head_splits(shapes: Shapes, heads: Mapping[str, int]) -> list[RowSplit]:
    """Plan the cuts of a state dict.

    Args:
        shapes: Of every parameter.
        heads: Head count of every attention layer, by path.

    Raises:
        CheckpointError: There is no attention, it is split already, a layer has no head count or lacks a projection,
            or rows do not divide; all such layers are named.
    """
    found, problems = _judge(shapes, heads)
    _refuse(problems)
    return _cuts(shapes, heads, found)


def plan_splits(shapes: Shapes, heads: Mapping[str, int]) -> tuple[list[RowSplit], dict[str, str]]:
    """Plan the cuts of those layers that can be cut.

    Args:
        shapes: As of `head_splits`.
        heads: As of `head_splits`.

    Returns:
        The cuts, and why each of the other layers is left alone, by path.

    Raises:
        CheckpointError: There is no attention, it is split already, or no layer can be cut.
    """
    found, problems = _judge(shapes, heads)
    if problems.keys() == found.keys():
        _refuse(problems)
    rest = {layer: rows for layer, rows in found.items() if layer not in problems}
    return _cuts(shapes, heads, rest), {layer: "; ".join(text for text, _ in some) for layer, some in problems.items()}


def _judge(shapes: Shapes, heads: Mapping[str, int]) -> tuple[dict[str, dict[str, int]], dict[str, Problems]]:
    """Rows of every attention layer's projections, and what stands against cutting some of the layers."""
    if done := [key for key in shapes if _HEAD.search(key)]:
        raise CheckpointError(
            f"the weights are in SHA form already: `{done[0]}` and {len(done) - 1} more",
            hint="name the folder with the MHA form",
        )
    found = _projections(shapes)
    if not found:
        raise CheckpointError("the weights hold no attention (no key ends in .to_q.weight)", hint=_hint_without(shapes))
    judged = {layer: list(_problems(layer, rows, heads, shapes)) for layer, rows in found.items()}
    problems = {layer: some for layer, some in judged.items() if some}
    if lost := sorted(heads.keys() - found.keys()):
        _refuse(problems)
        raise CheckpointError(f"head counts for layers that do not exist: {', '.join(lost[:5])}", hint="same model?")
    return found, problems


def _refuse(problems: Mapping[str, Problems]) -> None:
    every = [problem for some in problems.values() for problem in some]
    if every:
        first = f"{len(every)} things of the attention layers stand against a split:\n" if len(every) > 1 else ""
        hints = dict.fromkeys(hint for _, hint in every if hint)
        raise CheckpointError(first + "\n".join(text for text, _ in every), hint="; ".join(hints))


def _cuts(shapes: Shapes, heads: Mapping[str, int], layers: Mapping[str, Mapping[str, int]]) -> list[RowSplit]:
    splits = []
    for key, shape in shapes.items():
        if (match := _PARAMETER.match(key)) and match["layer"] in layers:
            layer, projection, kind = match["layer"], match["projection"], match["kind"]
            each = shape[0] // len(CUT_INTO[projection]) // _dim_head(layers[layer], heads[layer])
            names = [f"{name}_convs.{head}" for name in CUT_INTO[projection] for head in range(each)]
            children = [f"{layer}.{name}.{kind}" for name in names]
            splits.append(even_split(layer, key, children, shape[0], to_convolution=kind == "weight"))
    return splits


def layer_heads(splits: Iterable[RowSplit]) -> dict[str, LayerHeads]:
    """The heads of every layer that splits are about, as `head_splits` gives them."""
    rows: dict[str, dict[str, list[int]]] = {}
    for split in splits:
        for part in split:
            if (match := _HEAD.match(part.name)) and match["kind"] == "weight":
                of_layer = rows.setdefault(split.layer, {})
                of_layer.setdefault(match["projection"], []).append(part.stop - part.start)
    found = {}
    for layer, by_projection in rows.items():
        queries = next(by_projection[name] for name in _QUERIES if name in by_projection)
        others = next(parts for name, parts in by_projection.items() if name not in _QUERIES)
        found[layer] = LayerHeads(len(queries), len(others), queries[0])
    return found


def query_scales(splits: Iterable[RowSplit]) -> dict[str, float]:
    """What `fold_scale` multiplies in a state dict in SHA form: 1 / sqrt(d), by parameter.

    It holds for layers whose scores have that scale, as those of all families here do, and whose queries are not
    normalized (`norm_q`), which `SHAAttentionPatch` checks where there is a model.
    """
    return {
        part.name: (part.stop - part.start) ** -0.5
        for split in splits
        for part in split
        if (match := _HEAD.match(part.name)) and match["projection"] in _QUERIES
    }


def attention_paths(keys: Iterable[str]) -> list[str]:
    """Paths of the attention layers in a state dict, in its order."""
    return list(dict.fromkeys(match["layer"] for key in keys if (match := _PARAMETER.match(key))))


def _projections(shapes: Shapes) -> dict[str, dict[str, int]]:
    """Rows of each projection's weight, by layer."""
    found: dict[str, dict[str, int]] = {}
    for key, shape in shapes.items():
        if match := _PARAMETER.match(key):
            layer = found.setdefault(match["layer"], {})
            if match["kind"] == "weight":
                layer[match["projection"]] = shape[0] if shape else 0
    return found


def _dim_head(rows: Mapping[str, int], heads: int) -> int:
    queries = next(name for name in (*_QUERIES, "to_qkv") if name in rows)
    return rows[queries] // len(CUT_INTO[queries]) // heads


def _problems(
    layer: str, rows: Mapping[str, int], heads: Mapping[str, int], shapes: Shapes
) -> Iterator[tuple[str, str]]:
    """Why a layer cannot be cut, and what to do; nothing for one that can."""
    count = heads.get(layer)
    if count is None:
        near = difflib.get_close_matches(layer, heads, n=1)
        yield f"no head count for attention layer `{layer}`", f"nearest known: `{near[0]}`" if near else ""
        return
    if other := next((one for one in _JOINT if f"{layer}.{one}" in shapes), None):
        yield f"`{layer}` attends over image and text jointly (it has {other}), which no rewrite covers", "leave it out"
        return
    if rows.keys() not in _WHOLE:
        yield _not_whole(layer, rows)
        return
    fused = len(CUT_INTO["to_qkv"]) if "to_qkv" in rows else 1
    queries = next(name for name in (*_QUERIES, "to_qkv") if name in rows)
    if count < 1 or rows[queries] < 1 or rows[queries] % (fused * count):
        many = f"{fused} times {count} heads" if fused > 1 else f"{count} heads"
        yield f"`{layer}.{queries}.weight` has {rows[queries]} rows, which {many} do not divide", _CHECK_HEADS
        return
    yield from _problems_of_rows(layer, rows, count, shapes)


def _problems_of_rows(layer: str, rows: Mapping[str, int], heads: int, shapes: Shapes) -> Iterator[tuple[str, str]]:
    dim_head = _dim_head(rows, heads)
    others = {name: count / len(CUT_INTO[name]) for name, count in rows.items() if name not in (*_QUERIES, "to_qkv")}
    for name, each in others.items():
        if each < 1 or each % dim_head or heads * dim_head % each:
            text = f"`{layer}.{name}.weight` has {rows[name]} rows, no fit for {heads} heads of {dim_head} rows"
            yield text, _CHECK_HEADS
    if len(set(others.values())) > 1:
        named = ", ".join(f"{name} {rows[name]}" for name in others)
        yield f"`{layer}` has keys and values of different numbers of rows: {named}", "check the weights file"
    for name, count in rows.items():
        weight, bias = (shapes.get(f"{layer}.{name}.{kind}") for kind in ("weight", "bias"))
        if weight is not None and len(weight) != 2:
            yield f"`{layer}.{name}.weight` is no matrix: it has the shape {weight}", "check the weights file"
        if bias is not None and bias != (count,):
            yield f"`{layer}.{name}.bias` has the shape {bias}, beside a weight of {count} rows", "check the file"
    for name in ("norm_q", "norm_k"):
        norm = shapes.get(f"{layer}.{name}.weight")
        if norm is not None and norm != (dim_head,):
            yield f"`{layer}` normalizes across heads (qk_norm): {name} needs all {heads} heads at once", "leave it out"
    if own := next((key for key in shapes if key.startswith(f"{layer}.processor.")), None):
        yield f"`{layer}` has a processor with weights of its own, `{own}`", "bring the model to plain form first"


def _not_whole(layer: str, rows: Mapping[str, int]) -> tuple[str, str]:
    if doubled := next((name for name in ("to_qkv", "to_kv") if name in rows and "to_k" in rows), None):
        parts = ", ".join(CUT_INTO[doubled])
        text = f"`{layer}` holds {doubled} and also {parts}, of which it is made (fuse_qkv_projections)"
        return text, f"save the model without {doubled}, or without {parts}"
    wanted = min(_WHOLE, key=lambda names: len(rows.keys() - names))
    missing: Sequence[str] = sorted(wanted - rows.keys()) or sorted(rows.keys() - wanted)
    return f"`{layer}` has no whole set of projections: look for {', '.join(missing)}", "is the weights file whole?"


def _hint_without(shapes: Shapes) -> str:
    if any(key.endswith(".proj_attn.weight") for key in shapes):
        return "its attention has the deprecated names query, key, value: load and save the model once with diffusers"
    return "is this a UNet or a ControlNet?"
