"""Which grid each weight has: by its op, by the recipe's patterns, or as a file of encodings says."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from sdconvert.config import LayerPrecision
from sdconvert.errors import EncodingsError, UnsupportedModelError, UsageError
from sdconvert.io.encodings import Encoding
from sdconvert.patterns import matches_pattern
from sdconvert.quantize.graph import Parameter
from sdconvert.quantize.settings import Grid, QuantizerSettings

LAYER_OPS = ("conv2d", "linear")
"""Ops whose weights a recipe gives bits to; norms and tables keep those of the settings."""

# Of 4-bit weights, blocks of 8, 16, 24, 32 and 64 compile, and those of 4, 6 and 12 do not.
_BLOCK_BITS = 32


def planned_grids(weights: Iterable[Parameter], settings: QuantizerSettings, graph: str) -> dict[str, Grid]:
    """The grid of every weight of a graph, by name, as settings and their patterns say.

    Raises:
        UnsupportedModelError: A weight enters an op whose weights have no grid.
        UsageError: Blocks do not divide the input channels of a layer, or the compiler takes no such weights.
    """
    grids = {}
    for weight in weights:
        if weight.op not in settings.parameters:
            raise UnsupportedModelError(
                f"`{weight.name}` enters {weight.op or 'a move'}, for which {settings.name} has no grid",
                hint=f"{settings.name} has grids for weights of {', '.join(settings.parameters)}",
            )
        grid = settings.parameters[weight.op]
        pattern = deciding_pattern(settings.layers, graph, weight.layer) if weight.op in LAYER_OPS else None
        if pattern is not None:
            grid = _changed(grid, settings.layers[pattern], weight, f"{graph}:{weight.layer}")
        if weight.op in LAYER_OPS:
            _require_compilable(grid, weight, settings, f"{graph}:{weight.layer}")
        grids[weight.name] = grid
    return grids


def recorded_grids(weights: Iterable[Parameter], encodings: Mapping[str, Sequence[Encoding]]) -> dict[str, Grid]:
    """The grids of those weights of a graph that encodings of form 0.6.1 name.

    One entry is a grid of the whole weight, one per output channel a grid per channel. More are blocks of input
    channels, row after row; how many channels a block has follows from the weight's shape.

    Raises:
        EncodingsError: The number of entries is none of these.
    """
    return {
        weight.name: _recorded(encodings[weight.name], weight)
        for weight in weights
        if encodings.get(weight.name) and encodings[weight.name][0]["dtype"] == "int"
    }


def deciding_pattern(layers: Iterable[str], graph: str, layer: str) -> str | None:
    """The last pattern that fits a layer of a graph; None if there is none."""
    return next((one for one in reversed(list(layers)) if _fits(one, graph, layer)), None)


def require_effect(layers: Mapping[str, LayerPrecision], weights: Mapping[str, Iterable[str]]) -> None:
    """Check that every pattern decides on a weight of some graph.

    Args:
        layers: Of the recipe.
        weights: Paths of the convolutions and linear layers of every graph.

    Raises:
        UsageError: A pattern fits none, or later ones fit all that it fits.
    """
    every = [(graph, layer) for graph, paths in weights.items() for layer in paths]
    deciding = {deciding_pattern(layers, graph, layer) for graph, layer in every}
    for pattern in layers:
        if pattern in deciding:
            continue
        if covered := [f"{graph}:{layer}" for graph, layer in every if _fits(pattern, graph, layer)]:
            later = deciding_pattern(layers, *covered[0].split(":", 1))
            raise UsageError(
                f"quantize.layers: `{pattern}` has no effect: later patterns decide on all {len(covered)} layers that "
                f"it fits, `{later}` on `{covered[0]}`",
                hint="the last pattern that fits counts: put the general ones first",
            )
        wanted = re.sub(r"[*?\[\]]", "", pattern)
        labels = [f"{graph}:{layer}" if ":" in pattern else layer for graph, layer in every]
        near = difflib.get_close_matches(wanted, dict.fromkeys(labels), 3, cutoff=0)
        raise UsageError(
            f"quantize.layers: `{pattern}` fits no convolution or linear layer of {', '.join(weights)}",
            hint=f"nearest: {', '.join(f'`{name}`' for name in near)}; `*` stands for any part of a path",
        )


def _fits(pattern: str, graph: str, layer: str) -> bool:
    of_graph, colon, path = pattern.rpartition(":")
    return (not colon or of_graph == graph) and matches_pattern(path, layer)


def _changed(grid: Grid, precision: LayerPrecision, weight: Parameter, label: str) -> Grid:
    changes: dict[str, Any] = {"bitwidth": precision.weight_bitwidth}
    if (size := precision.block_size) is not None:
        columns = weight.shape[1]
        if columns % size:
            raise UsageError(
                f"`{label}` has {columns} input channels, which blocks of {size} do not divide",
                hint="choose a divisor, or give this layer a pattern without block_size after that one",
            )
        # One block is a scale per channel, and so it stands in files.
        changes |= {"per_channel": True, "block_size": size if size < columns else None}
    return grid.model_copy(update=changes)


def _require_compilable(grid: Grid, weight: Parameter, settings: QuantizerSettings, label: str) -> None:
    """Refuse before an hour's work what the compiler refuses after it."""
    scales: Literal["tensor", "channel", "block"] = (
        "tensor" if not grid.per_channel else "channel" if grid.block_size is None else "block"
    )
    activations = settings.activations.bitwidth
    accepted = settings.weight_precisions[activations]
    targets = f"{', '.join(f'v{arch}' for arch in settings.architectures)} with {activations}-bit activations"
    if grid.bitwidth not in accepted[scales]:
        offers = [f"{'/'.join(map(str, bits))} bits per {one}" for one, bits in accepted.items() if bits]
        raise UsageError(
            f"`{label}`: HTP takes no weights of {grid.bitwidth} bits with a scale per {scales} on {targets}",
            hint=f"it takes {', '.join(offers)}",
        )
    if grid.block_size is not None and grid.block_size * grid.bitwidth % _BLOCK_BITS:
        raise UsageError(
            f"`{label}`: HTP takes no blocks of {grid.block_size} weights of {grid.bitwidth} bits",
            hint=f"take a multiple of {_BLOCK_BITS // grid.bitwidth}",
        )
    if grid.block_size is not None and any(size != 1 for size in weight.shape[2:]):
        raise UsageError(
            f"`{label}` is a convolution of {'x'.join(map(str, weight.shape[2:]))}, for which HTP takes no blocks "
            f"({targets})",
            hint="after the pattern that fits it, give it one without block_size",
        )


def _recorded(entries: Sequence[Encoding], weight: Parameter) -> Grid:
    first, channels = entries[0], weight.shape[0]
    grid = Grid(bitwidth=first["bitwidth"], symmetric=first["is_symmetric"] == "True", per_channel=len(entries) > 1)
    if len(entries) in (1, channels):
        return grid
    blocks, rest = divmod(len(entries), channels)
    if rest or not blocks or len(weight.shape) < 2 or weight.shape[1] % blocks:
        raise EncodingsError(
            f"`{weight.name}` has {len(entries)} encodings, and its shape is {weight.shape}",
            hint=f"expected 1, {channels}, or {channels} times a divisor of {weight.shape[-1:]}",
        )
    return grid.model_copy(update={"block_size": weight.shape[1] // blocks})
