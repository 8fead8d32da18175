"""AIMET's quantizers on the traced graph. The only file of this package that imports AIMET."""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.encoding_analyzer import PercentileEncodingAnalyzer, SqnrEncodingAnalyzer, _Histogram
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sdconvert.config import RangeEstimator
from sdconvert.errors import EncodingsError, UsageError
from sdconvert.io.encodings import Encoding
from sdconvert.quantize import graph
from sdconvert.quantize.estimators import estimator_of
from sdconvert.quantize.observer import HistogramBlock, ObserverBlock
from sdconvert.quantize.settings import Grid, QuantizerSettings
from sdconvert.quantize.weight_grids import LAYER_OPS, planned_grids, recorded_grids

_PREFIX = "quantizer_"
_FINE_BITWIDTH = 16
_SECOND_KIND = "matmul_second_operand"
_BINS = 2048
# What a mask hides must stay this far below the least score: exp(-20) is no step of a 16-bit softmax. A range as wide
# as the mask's -100 would waste 10 dB, and one from data that hides nothing would clip what a later mask hides.
_HIDDEN_BELOW = 20.0


class QuantizerSet:
    """The quantizers of a graph by key: activations and second operands by tensor key, parameters by name."""

    def __init__(self) -> None:
        self.activations: dict[str, QuantizeDequantize] = {}
        self.parameters: dict[str, QuantizeDequantize] = {}
        self.sources: dict[str, str] = {}
        self.layers: list[str] = []
        self.kinds: dict[str, str] = {}
        self.fixed_ranges: dict[str, tuple[float, float]] = {}
        self.masked_scores: dict[str, str] = {}


def insert_quantizers(
    graph_module: GraphModule,
    settings: QuantizerSettings,
    graph_name: str,
    encodings: Mapping[str, Sequence[Encoding]] | None = None,
) -> QuantizerSet:
    """Put a quantizer behind every stored tensor, every weight and every second operand of MatMul.

    Biases stay floating-point: the compiler makes them int32, with the product of input and weight scale.

    Args:
        graph_module: Without quantizers.
        settings: Of all tensors.
        graph_name: What patterns of the settings call the graph.
        encodings: Of weights, to be loaded later; their grids count, not those of the settings.

    Raises:
        UnsupportedModelError: A weight enters an op whose weights have no grid.
        UsageError: Blocks of a layer do not divide its input channels.
        EncodingsError: Encodings do not fit a weight's shape.
    """
    quantizers = QuantizerSet()
    stored = graph.values(graph_module)
    weights = [parameter for parameter in graph.parameters(graph_module) if not parameter.is_bias]
    seconds = graph.operands(graph_module)
    grids = planned_grids(weights, settings, graph_name) | recorded_grids(weights, encodings or {})
    quantizers.layers = [weight.layer for weight in weights if weight.op in LAYER_OPS]
    quantizers.masked_scores = graph.masked_scores(graph_module)
    for value in stored:
        quantizers.activations[value.key] = _insert(graph_module, value.node, settings.activations)
        quantizers.kinds[value.key] = value.op
        if value.op in settings.fixed_ranges:
            quantizers.fixed_ranges[value.key] = settings.fixed_ranges[value.op]
    for weight in weights:
        quantizers.parameters[weight.name] = _insert(graph_module, weight.node, grids[weight.name])
        quantizers.sources[weight.name] = str(weight.node.target)
    for operand in seconds:
        # The operand's source has its own quantizer by now: this one comes after it, on this edge alone.
        source = operand.matmul.args[1]
        assert isinstance(source, Node)  # for the type checker
        quantizers.kinds[operand.key] = _SECOND_KIND
        quantizers.activations[operand.key] = _insert(
            graph_module, source, settings.matmul_second_operand, only=operand.matmul
        )
    graph_module.recompile()
    return quantizers


def calibrate(
    graph_module: GraphModule,
    quantizers: QuantizerSet,
    batches: Sequence[tuple[Tensor, ...]],
    settings: QuantizerSettings,
) -> None:
    """Take the range of every quantizer from the data, then set the ranges that the op itself fixes.

    Activations are observed in the graph with quantized weights, unquantized themselves: so a range depends on each
    sample alone, and extremes and counts of parts of the data are those of the whole. Where an estimator needs counts,
    the data is run twice: the first time tells where the bins must lie.

    Args:
        graph_module: With the quantizers inserted.
        quantizers: Of the graph.
        batches: Inputs of the graph, by position.
        settings: Say by which part min-max ranges of 16 bits are widened beyond the data, and which ranges are taken
            otherwise.

    Raises:
        UsageError: A tensor takes values that are not finite.
    """
    with torch.no_grad():
        for name, quantizer in quantizers.parameters.items():
            _calibrate_one(quantizer, graph_module.get_parameter(quantizers.sources[name]))
    calibrate_activations(graph_module, quantizers, batches, settings)


@torch.no_grad()
def calibrate_activations(
    graph_module: GraphModule,
    quantizers: QuantizerSet,
    batches: Sequence[tuple[Tensor, ...]],
    settings: QuantizerSettings,
    keys: Collection[str] | None = None,
) -> None:
    """As `calibrate`, weights as they are, for the tensors in `keys` or for all.

    Raises:
        UsageError: As `calibrate`.
    """
    floating = without_quantizers(graph_module, quantizers.activations)
    names = child_names(graph_module, quantizers.activations)
    if keys is not None:
        wanted = {quantizers.masked_scores.get(key, key) for key in keys}
        names = {key: name for key, name in names.items() if key in wanted}
    ranges = _extremes(floating, names, batches)
    estimators = {key: estimator_of(settings.estimators, quantizers.kinds[key]) for key in ranges}
    counted = [
        key
        for key, (low, high) in ranges.items()
        if estimators[key].estimator != "min_max" and low < high and key not in quantizers.fixed_ranges
    ]
    blocks = [HistogramBlock("spread", floating.get_submodule(names[key]), ranges[key], _BINS) for key in counted]
    for batch in batches if blocks else ():
        floating(*batch)
    for key, block in zip(counted, blocks, strict=True):
        ranges[key] = _analyzed(block, estimators[key], quantizers.activations[key])
    for key, scores in quantizers.masked_scores.items():
        if scores in ranges:
            ranges[key] = ranges[scores] - torch.tensor([_HIDDEN_BELOW, 0.0])
            estimators[key] = estimators[scores]
    for key in ranges if keys is None else keys & ranges.keys():
        quantizer = quantizers.activations[key]
        _calibrate_one(quantizer, ranges[key])
        if quantizer.bitwidth == _FINE_BITWIDTH and estimators[key].estimator == "min_max":
            factor = 1 + settings.range_margin
            quantizer.set_range(*(bound * factor for bound in (quantizer.get_min(), quantizer.get_max())))
    for key, (lowest, highest) in quantizers.fixed_ranges.items():
        if keys is None or key in keys:
            quantizers.activations[key].set_range(torch.tensor(lowest), torch.tensor(highest))


def _extremes(
    floating: GraphModule, names: Mapping[str, str], batches: Sequence[tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """Lowest and highest value of tensors, (2,) each, by key."""
    observers = {key: ObserverBlock("range", floating.get_submodule(name)) for key, name in names.items()}
    for batch in batches:
        floating(*batch)
    for observer in observers.values():
        observer.remove()
    found = {key: observer.extremes for key, observer in observers.items() if observer.extremes is not None}
    if broken := [key for key, extremes in found.items() if not extremes.isfinite().all()]:
        raise UsageError(
            f"{len(broken)} tensors take values that are not finite, the first in execution order is `{broken[0]}`",
            hint="check the model and the calibration data in fp32: no range holds infinity or NaN",
        )
    return found


def _analyzed(block: HistogramBlock, estimator: RangeEstimator, quantizer: QuantizeDequantize) -> Tensor:
    """The range, (2,), that AIMET's analyzer gives a quantizer for the values that a block has counted."""
    low, high = block.extremes
    edges = low + (high - low) * torch.arange(_BINS + 1) / _BINS
    analyzer: PercentileEncodingAnalyzer | SqnrEncodingAnalyzer
    if estimator.percentile is not None:
        analyzer = PercentileEncodingAnalyzer((), _BINS, estimator.percentile)
    else:
        # AIMET weighs clipping three times by default; with 1 the sum is the mean squared error.
        analyzer = SqnrEncodingAnalyzer((), _BINS, gamma=1.0)
    histogram = _Histogram(block.counts.float(), edges, low, high)
    steps = quantizer.qmax - quantizer.qmin
    return torch.stack(analyzer.compute_encodings_from_stats([histogram], steps, quantizer.symmetric))


def _calibrate_one(quantizer: QuantizeDequantize, data: Tensor) -> None:
    """Have AIMET make a grid of data; of a tensor's extremes it makes the same grid as of the whole tensor."""
    with quantizer.compute_encodings():
        quantizer(data)


@torch.no_grad()
def weight_encodings(weight: Tensor, grid: Grid) -> list[Encoding]:
    """Encodings that AIMET gives a weight from its smallest and largest values."""
    shape = (weight.shape[0], *[1] * (weight.dim() - 1)) if grid.per_channel else ()
    quantizer = QuantizeDequantize(shape=shape, bitwidth=grid.bitwidth, symmetric=grid.symmetric)
    _calibrate_one(quantizer, weight.detach())
    entries: list[Encoding] = quantizer.get_legacy_encodings()
    return entries


def child_names(graph_module: GraphModule, quantizers: Mapping[str, QuantizeDequantize]) -> dict[str, str]:
    """Name of each quantizer among the graph's children, by key in execution order."""
    keys = {id(quantizer): key for key, quantizer in quantizers.items()}
    calls = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]
    return {keys[child]: name for name in calls if (child := id(graph_module.get_submodule(name))) in keys}


def with_quantizers_as(
    graph_module: GraphModule, quantizers: Mapping[str, QuantizeDequantize], make: Callable[[str], nn.Module]
) -> GraphModule:
    """A second module of the same graph and weights, with another module in place of each given quantizer.

    Args:
        graph_module: With the quantizers inserted.
        quantizers: By key.
        make: The module for a key.
    """
    other = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for key, name in child_names(graph_module, quantizers).items():
        setattr(other, name, make(key))
    return other


def without_quantizers(graph_module: GraphModule, quantizers: Mapping[str, QuantizeDequantize]) -> GraphModule:
    """As `with_quantizers_as`, with an `Identity` in place of each."""
    return with_quantizers_as(graph_module, quantizers, lambda _: nn.Identity())


def set_parameter(graph_module: GraphModule, source: str, parameter: nn.Parameter) -> None:
    """Give a graph another parameter; those that share the old one keep it."""
    path, _, name = source.rpartition(".")
    setattr(graph_module.get_submodule(path), name, parameter)


def read(quantizers: dict[str, QuantizeDequantize]) -> dict[str, list[Encoding]]:
    """The encodings of initialised quantizers, in AIMET's own form."""
    return {key: quantizer.get_legacy_encodings() for key, quantizer in quantizers.items()}


def require_fit(quantizers: dict[str, QuantizeDequantize], encodings: dict[str, list[Encoding]], what: str) -> None:
    """Check that encodings can be written.

    Raises:
        EncodingsError: A quantizer gets none, an entry lands nowhere or is no integer grid, or the number of channels
            differs.
    """
    missing, unexpected = sorted(quantizers.keys() - encodings.keys()), sorted(encodings.keys() - quantizers.keys())
    if missing or unexpected:
        parts = [
            f"{len(k)} {w}: {', '.join(k[:10])}" for w, k in (("missing", missing), ("unexpected", unexpected)) if k
        ]
        raise EncodingsError(f"the {what} encodings do not fit the graph: {'; '.join(parts)}", hint="same model?")
    for key, quantizer in quantizers.items():
        entries = encodings[key]
        if len(entries) != math.prod(quantizer.shape):
            raise EncodingsError(
                f"`{key}` has {len(entries)} encodings, its quantizer takes {math.prod(quantizer.shape)}",
                hint="per-channel and per-tensor settings must agree with the file",
            )
        if foreign := {entry["dtype"] for entry in entries} - {"int"}:
            raise EncodingsError(f"`{key}` is quantized as {foreign.pop()}, not int", hint="quantize it to integers")


def write(quantizers: dict[str, QuantizeDequantize], encodings: dict[str, list[Encoding]]) -> None:
    """Set every quantizer from encodings that fit."""
    for key, quantizer in quantizers.items():
        _set_exactly(quantizer, encodings[key])


@torch.no_grad()
def _set_exactly(quantizer: QuantizeDequantize, entries: list[Encoding]) -> None:
    """Set scale and offset to the file's own floats.

    `set_legacy_encodings` takes min and max and derives the scale anew, off by the last bit; two loads would differ.
    """
    quantizer.set_legacy_encodings(entries)
    quantizer._reparametrize_to_scale_offset()
    quantizer.scale.copy_(torch.tensor([entry["scale"] for entry in entries]).reshape(quantizer.shape))
    if not quantizer.symmetric:
        offsets = torch.tensor([float(entry["offset"]) for entry in entries])
        quantizer.offset.copy_(offsets.reshape(quantizer.shape) - quantizer.qmin)


def _insert(graph_module: GraphModule, node: Node, grid: Grid, only: Node | None = None) -> QuantizeDequantize:
    shape, block_size = _shape(grid, tuple(node.meta["val"].shape))
    quantizer = QuantizeDequantize(shape=shape, bitwidth=grid.bitwidth, symmetric=grid.symmetric, block_size=block_size)
    name = f"{_PREFIX}{sum(child.startswith(_PREFIX) for child, _ in graph_module.named_children())}"
    graph_module.add_submodule(name, quantizer)
    with graph_module.graph.inserting_after(node):
        call = graph_module.graph.call_module(name, (node,))
    call.meta = dict(node.meta)
    for user in [only] if only is not None else list(node.users):
        if user is not call:
            user.replace_input_with(node, call)
    return quantizer


def _shape(grid: Grid, tensor: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shape of a tensor's scales, and of the block that shares one."""
    if not grid.per_channel:
        return (), None
    channels, *rest = tensor
    if grid.block_size is None:
        return (channels, *[1] * len(rest)), None
    columns, *kernel = rest
    return (channels, columns // grid.block_size, *[1] * len(kernel)), (1, grid.block_size, *kernel)
