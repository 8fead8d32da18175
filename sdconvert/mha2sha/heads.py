"""How many heads each attention layer has, and so how its projections are cut."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.mha2sha.row_split import RowSplit, even_split

PROJECTIONS = ("to_q", "to_k", "to_v")
_PARAMETER = re.compile(rf"^(?P<layer>.+)\.(?P<projection>{'|'.join(PROJECTIONS)})\.(?P<kind>weight|bias)$")
_HEAD = re.compile(rf"\.(?:{'|'.join(PROJECTIONS)})_convs\.\d+\.(?:weight|bias)$")


def head_splits(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> list[RowSplit]:
    """Plan the cuts of a state dict.

    Args:
        shapes: Of every parameter.
        heads: Head count of every attention layer, by path.

    Raises:
        CheckpointError: There is no attention, it is split already, a layer has no head count, or rows do not divide.
    """
    if done := [key for key in shapes if _HEAD.search(key)]:
        raise CheckpointError(
            f"the weights are in SHA form already: `{done[0]}` and {len(done) - 1} more",
            hint="name the folder with the MHA form",
        )
    splits = []
    for key, shape in shapes.items():
        if not (match := _PARAMETER.match(key)):
            continue
        layer, count = match["layer"], heads.get(match["layer"])
        if count is None:
            near = difflib.get_close_matches(layer, heads, n=1)
            raise CheckpointError(
                f"no head count for attention layer `{layer}`", hint=f"nearest known: `{near[0]}`" if near else ""
            )
        if count < 1 or shape[0] % count:
            raise CheckpointError(
                f"`{key}` has {shape[0]} rows, which {count} heads do not divide",
                hint="check num_attention_heads (or attention_head_dim) in config.json, or --num-heads",
            )
        projection, kind = match["projection"], match["kind"]
        children = [f"{layer}.{projection}_convs.{head}.{kind}" for head in range(count)]
        splits.append(even_split(layer, key, children, shape[0], to_convolution=kind == "weight"))
    if not splits:
        raise CheckpointError(
            "the weights hold no attention (no key ends in .to_q.weight)", hint="is this a UNet or a ControlNet?"
        )
    if lost := sorted(heads.keys() - {split.layer for split in splits}):
        raise CheckpointError(f"head counts for layers that do not exist: {', '.join(lost[:5])}", hint="same model?")
    return splits


def attention_paths(keys: Iterable[str]) -> list[str]:
    """Paths of the attention layers in a state dict."""
    return [key.removesuffix(".to_q.weight") for key in keys if key.endswith(".to_q.weight")]


def heads_from_config(config: Mapping[str, Any], layers: Iterable[str]) -> dict[str, int]:
    """Head count of every layer of a diffusers UNet, ControlNet or transformer.

    `attention_head_dim` is the number of heads there (a misnomer that diffusers keeps for old checkpoints), one for
    the model or one per block; up blocks take the list backwards, the mid block its last. Transformers have no such
    blocks, and one true `num_attention_heads`.

    Raises:
        UsageError: The config names no heads.
        CheckpointError: A layer is in none of the blocks, or blocks and head counts differ in number.
    """
    counts = config.get("num_attention_heads") or config.get("attention_head_dim")
    blocks = len(config.get("down_block_types", ()))
    if not blocks and "num_layers" in config and isinstance(heads := config.get("num_attention_heads"), int):
        return dict.fromkeys(layers, heads)
    if counts is None or not blocks:
        raise UsageError(
            f"config.json of a {config.get('_class_name', 'model')} names no heads per block",
            hint="give the number of heads with --num-heads, and take config.json out of the folder",
        )
    per_block = [counts] * blocks if isinstance(counts, int) else list(counts)
    if len(per_block) != blocks:
        raise CheckpointError(
            f"config.json names the heads of {len(per_block)} blocks, {per_block}, but {blocks} blocks",
            hint="attention_head_dim takes one number, or one per entry of down_block_types",
        )
    found = {}
    for layer in layers:
        part, _, rest = layer.partition(".")
        index = rest.partition(".")[0]
        if part == "mid_block":
            found[layer] = per_block[-1]
        elif part in ("down_blocks", "up_blocks") and index.isdigit() and int(index) < blocks:
            found[layer] = (per_block if part == "down_blocks" else per_block[::-1])[int(index)]
        else:
            raise CheckpointError(
                f"attention layer `{layer}` is in no block of the config",
                hint="config and weights must belong together",
            )
    return found
