"""Where the parts of diffusers' `Transformer2DModel` are, told by names alone; nothing here needs torch.

<transformer>.norm  .proj_in  .transformer_blocks.<i>.{norm1,attn1,norm2,attn2,norm3,ff}  .proj_out
"""

import re
from collections.abc import Iterable

_PROJECTIONS = r"proj_in|proj_out|proj_in_plus"
_IN_BLOCK = r"attn\w+\.to_out\.0|ff\.net\.2|ff\.net\.0\.proj"
_LINEAR = re.compile(rf"(?P<transformer>.+?)\.(?:{_PROJECTIONS}|transformer_blocks\.\d+\.(?:{_IN_BLOCK}))")
_NORM = re.compile(r"(?P<transformer>.+?)\.transformer_blocks\.\d+\.norm\w+")
_FEED_FORWARD = re.compile(r"(?P<transformer>.+?)\.transformer_blocks\.\d+\.ff\.net\.0")
_BLOCK = re.compile(r"(?P<transformer>.+?)\.transformer_blocks\.\d+\.(?P<child>\w+)")
_GROUP_NORM = ".norm"


def transformer_paths(paths: Iterable[str]) -> list[str]:
    """Paths of the transformers over images among the paths of a model's modules, in their order.

    A transformer over tokens (PixArt) has blocks, but no `norm` and `proj_in` beside them.
    """
    every = dict.fromkeys(paths)
    blocks = dict.fromkeys(match["transformer"] for path in every if (match := _BLOCK.fullmatch(path)))
    return [path for path in blocks if f"{path}{_GROUP_NORM}" in every and f"{path}.proj_in" in every]


def is_linear(path: str, transformers: Iterable[str]) -> bool:
    """Whether a path is that of a projection of one of the transformers; those to q, k and v are attention's affair."""
    return _is_in(_LINEAR, path, transformers)


def is_layer_norm(path: str, transformers: Iterable[str]) -> bool:
    """Whether a path is that of a norm in a block of one of the transformers."""
    return _is_in(_NORM, path, transformers)


def is_feed_forward_entry(path: str, transformers: Iterable[str]) -> bool:
    """Whether a path is that of the first layer of a feed-forward: a projection and its activation."""
    return _is_in(_FEED_FORWARD, path, transformers)


def _is_in(pattern: re.Pattern[str], path: str, transformers: Iterable[str]) -> bool:
    match = pattern.fullmatch(path)
    return match is not None and match["transformer"] in transformers
