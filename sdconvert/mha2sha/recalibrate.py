"""A range per head instead of the parent's, and what that gains."""

from collections.abc import Iterable, Sequence

from sdconvert.adapters import Tensors
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.attention import SHAAttention
from sdconvert.quantize.artifact import Simulation

OUTPUT = "output"


def recalibrate_heads(
    simulation: Simulation, samples: Iterable[Tensors], held_out: Sequence[Tensors]
) -> dict[str, dict[str, float]]:
    """Take the ranges inside attention from each head's own values.

    Args:
        simulation: Of the SHA form, with inherited ranges; it is changed.
        samples: Graph inputs to take the ranges from.
        held_out: Graph inputs to judge them on.

    Returns:
        For every attention layer, and for the graph's `output`: SQNR in dB against fp32 with the parents' ranges
        (`inherit`) and with the heads' own (`recalibrate`). A layer's is that of its heads' outputs on the first
        held-out input, the output's that of the worst output on the worst input.
    """
    model = simulation.adapter.model
    layers = [path for path, module in model.named_modules() if isinstance(module, SHAAttention)]
    fp32 = [simulation.adapter.run(inputs) for inputs in held_out]
    before = _figures(simulation, layers, held_out, fp32)
    simulation.recalibrate(samples, layers)
    after = _figures(simulation, layers, held_out, fp32)
    return {place: {"inherit": before[place], "recalibrate": after[place]} for place in before}


def _figures(
    simulation: Simulation, layers: Sequence[str], held_out: Sequence[Tensors], fp32: Sequence[Tensors]
) -> dict[str, float]:
    tensors = simulation.layer_sqnr_db(held_out[0])
    figures = {layer: tensors[f"{layer}:cat.0"] for layer in layers if f"{layer}:cat.0" in tensors}
    return figures | {OUTPUT: min(map(worst_sqnr_db, fp32, map(simulation, held_out)))}
