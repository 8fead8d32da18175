"""How many heads each attention layer has: from a diffusers or transformers config, or from a file of the user's."""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdconvert.errors import CheckpointError, UsageError
from sdconvert.patterns import matches_pattern

_ONE_HEAD = ("AutoencoderKL", "AutoencoderKLEncoder", "VQModel")
_SHOWN = 5


def heads_from_config(
    config: Mapping[str, Any], layers: Iterable[str], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, int]:
    """Head count of every layer of a model.

    A diffusers UNet or ControlNet: `attention_head_dim` is the number of heads there (a misnomer that diffusers keeps
    for old checkpoints), one for the model or one per block; up blocks take the list backwards, the mid block its last.
    In blocks without a transformer it is what it says, channels per head, and up blocks take the list forwards.
    Transformers and text encoders have no such blocks, and one true `num_attention_heads`; autoencoders one head.

    Args:
        config: As in `config.json`.
        layers: Paths of the attention layers.
        shapes: Of every parameter, for layers of which the config names the channels per head.

    Raises:
        UsageError: The config names no heads.
        CheckpointError: A layer is in none of the blocks, or blocks and head counts differ in number.
    """
    name, counts = config.get("_class_name", "model"), config.get("num_attention_heads")
    if name in _ONE_HEAD:
        return dict.fromkeys(layers, 1)
    blocks = len(config.get("down_block_types") or ())
    if not blocks and isinstance(counts, int):
        return dict.fromkeys(layers, counts)
    widths, only_widths = config.get("attention_head_dim"), name == "UNet2DModel"
    counts = counts or widths
    if (counts is None and not only_widths) or not blocks:
        raise UsageError(
            f"config.json of a {name} names no heads per block",
            hint="give the number of heads with --num-heads, and take config.json out of the folder",
        )
    heads, dims = _per_block(counts, blocks), _per_block(widths, blocks)
    found = {}
    for layer in layers:
        kind, index = _block(config, layer, blocks)
        if only_widths or ("Attn" in kind and not kind.startswith(("CrossAttn", "UNetMidBlock2DCrossAttn"))):
            found[layer] = _heads_of_width(layer, dims[index], shapes or {})
        else:
            found[layer] = heads[::-1][index] if layer.startswith("up_blocks.") else heads[index]
    return found


def _per_block(counts: Any, blocks: int) -> list[Any]:
    per_block = list(counts) if isinstance(counts, list | tuple) else [counts] * blocks
    if odd := [one for one in per_block if one is not None and (type(one) is not int or one < 1)]:
        raise CheckpointError(
            f"config.json names {odd[0]!r} heads, or channels of a head", hint="copy it again from the checkpoint"
        )
    if len(per_block) != blocks:
        raise CheckpointError(
            f"config.json names the heads of {len(per_block)} blocks, {per_block}, but {blocks} blocks",
            hint="attention_head_dim takes one number, or one per entry of down_block_types",
        )
    return per_block


def _block(config: Mapping[str, Any], layer: str, blocks: int) -> tuple[str, int]:
    """Class and index of the block that a layer is in; the mid block comes last."""
    part, _, rest = layer.partition(".")
    index = rest.partition(".")[0]
    if part == "mid_block":
        return config.get("mid_block_type") or "UNetMidBlock2DCrossAttn", blocks - 1
    if part in ("down_blocks", "up_blocks") and index.isdigit() and int(index) < blocks:
        kinds = config.get(f"{part.removesuffix('s')}_types") or ()
        return str(kinds[int(index)]) if int(index) < len(kinds) else "", int(index)
    raise CheckpointError(
        f"attention layer `{layer}` is in no block of the config", hint="config and weights must belong together"
    )


def _heads_of_width(layer: str, width: int | None, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if width is None:
        return 1
    rows = shapes.get(f"{layer}.to_q.weight", (0,))[0]
    if not rows or rows % width:
        raise CheckpointError(
            f"config.json gives attention layer `{layer}` heads of {width} channels, and its to_q has {rows or 'no'} "
            "rows",
            hint="config and weights must belong together; or name the heads with --num-heads-file",
        )
    return rows // width


def read_heads_file(path: Path, layers: Iterable[str]) -> dict[str, int]:
    """Head count of every layer from a JSON file: `{"<path or pattern>": heads}`.

    Patterns are those of a shell (`*` also stands for dots). A path goes before patterns, and patterns that match the
    same layer must agree.

    Args:
        path: The file.
        layers: Paths of the attention layers.

    Raises:
        UsageError: The file is no such object, a path or pattern is no layer's, patterns disagree, or layers are left
            without a count.
    """
    counts, known = _read_counts(path), list(layers)
    matches = {one: [layer for layer in known if matches_pattern(one, layer)] for one in counts}
    if lost := [one for one, found in matches.items() if not found]:
        near = difflib.get_close_matches(lost[0], known, n=1, cutoff=0)
        raise UsageError(
            f"`{path}` names attention layers that the weights do not have: {_some(lost)}",
            hint=f"nearest layer: `{near[0]}`" if near else "the weights hold no attention",
        )
    heads: dict[str, int] = {}
    for layer in known:
        names = [layer] if layer in counts else [one for one, found in matches.items() if layer in found]
        if len({counts[one] for one in names}) > 1:
            raise UsageError(
                f"`{path}` gives `{layer}` several head counts: "
                + ", ".join(f"{counts[one]} by `{one}`" for one in names),
                hint="narrow the patterns, or name the layer itself",
            )
        if names:
            heads[layer] = counts[names[0]]
    if missing := [layer for layer in known if layer not in heads]:
        raise UsageError(
            f"`{path}` gives {len(missing)} of {len(known)} attention layers no head count: {_some(missing)}",
            hint='name them; `"*"` stands for all that are not named',
        )
    return heads


def _read_counts(path: Path) -> dict[str, int]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"`{path}` names {_some(twice)} more than once", hint="keep one of them")
        return dict(pairs)

    try:
        counts: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"`{path}` cannot be read as JSON: {error}", hint='write {"<layer>": heads, …}') from error
    if not isinstance(counts, dict) or not counts:
        raise UsageError(f"`{path}` holds no object with head counts", hint='write {"<layer>": heads, …}')
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise UsageError(f"`{path}` gives `{name}` {count!r} heads", hint="give a whole number of 1 or more")
    return counts


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:_SHOWN]) + more
