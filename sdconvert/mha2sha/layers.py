"""MHA against SHA, attention layer by attention layer: the same inputs of the model, what each layer returns."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.metrics import max_abs, sqnr_db
from sdconvert.models.attention_steps import as_tokens
from sdconvert.plugins.capture import capturing
from sdconvert.quantize.artifact import Simulation

Outputs = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Forward:
    """What one form of a model computes on some inputs: the graph's outputs, and each attention layer's."""

    graph: Outputs
    layers: Outputs


def run_fp32(adapter: ModelAdapter, layers: Sequence[str], inputs: Sequence[Tensors]) -> Forward:
    """Run the fp32 model.

    Args:
        adapter: Covers it.
        layers: Paths of its attention layers, in either form.
        inputs: Of the graph.
    """
    graph, of_layers = [], []
    for one in inputs:
        with capturing({path: adapter.model.get_submodule(path) for path in layers}) as outputs:
            graph.append(adapter.run(one))
        of_layers.append(outputs)
    return Forward(graph, of_layers)


def run_quantized(simulation: Simulation, layers: Sequence[str], inputs: Sequence[Tensors]) -> Forward:
    """Run the simulation; a layer's output is the last tensor that it or its children store."""
    graph, of_layers = [], []
    for one in inputs:
        with simulation.capturing_last(layers) as outputs:
            graph.append(simulation(one))
        of_layers.append(outputs)
    return Forward(graph, of_layers)


def relative_errors(reference: Forward, value: Forward) -> dict[str, float]:
    """Largest error by layer and by graph output, over its reference's largest magnitude, worst input each."""
    found: dict[str, float] = {}
    for first, second in _pairs(reference, value):
        for name, tensor in first.items():
            error = max_abs(as_tokens(tensor), as_tokens(second[name])) / float(tensor.abs().max())
            # NaN is no small error, and `max` may pass over it.
            found[name] = max(found.get(name, 0.0), error) if error == error else error
    return found


def agreements_db(reference: Forward, value: Forward) -> dict[str, float]:
    """SQNR in dB by layer and by graph output, worst input each."""
    found: dict[str, float] = {}
    for first, second in _pairs(reference, value):
        for name, tensor in first.items():
            figure = sqnr_db(as_tokens(tensor), as_tokens(second[name]))
            found[name] = min(found.get(name, figure), figure)
    return found


def _pairs(reference: Forward, value: Forward) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return [
        *zip(reference.layers, value.layers, strict=True),
        *zip(reference.graph, value.graph, strict=True),
    ]
