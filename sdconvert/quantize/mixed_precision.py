"""Which layers may have fewer bits: the smallest model of a quality, or the best model of a size.

Each layer's noise is taken as its own (`sensitivity.py`), so noise and size of a choice are sums over layers. Layers
are lowered in the order of noise per bit saved, which is the greedy solution of a knapsack; HAWQ-V2 (Dong et al.,
arXiv:1911.03852) has such a sum as its objective.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.config import LayerPrecision, Recipe
from sdconvert.errors import PreconditionError, UsageError
from sdconvert.io.files import read_json

Key = tuple[str, str]
"""Graph and weight."""


@dataclass(frozen=True)
class Choice:
    """Bits of every weight, and what they are expected to cost.

    Attributes:
        bits: By graph and weight.
        bits_per_weight: On average.
        weight_bytes: Of all these weights, without scales.
        predicted_db: SQNR of the final picture; where no pictures were measured, of the graphs' outputs, as if their
            noises met in one place.
    """

    bits: Mapping[Key, int]
    bits_per_weight: float
    weight_bytes: int
    predicted_db: float


def read_sensitivity(path: Path) -> dict[str, Any]:
    """The graphs of a file that `Sensitivity` wrote.

    Raises:
        PreconditionError: There is no such file, or it has no figures.
    """
    content = read_json(path) if path.is_file() else {}
    graphs: dict[str, Any] = content.get("graphs", {})
    if not graphs:
        raise PreconditionError(
            f"`{path}` holds no sensitivity figures", hint="measure them with `sdconvert quantize sensitivity`"
        )
    return graphs


def frontier(graphs: Mapping[str, Any]) -> list[Choice]:
    """Every choice on the way from the most bits for all layers to the fewest.

    Args:
        graphs: As `read_sensitivity` gives them.

    Raises:
        UsageError: Fewer than two bit-widths were measured, or not the same ones for all layers.
    """
    layers = {(graph, name): layer for graph, found in graphs.items() for name, layer in found["layers"].items()}
    kind = "picture_db" if all(layer["picture_db"] for layer in layers.values()) else "output_db"
    noise = {key: {int(bits): _noise(db) for bits, db in layer[kind].items()} for key, layer in layers.items()}
    widths = sorted({bits for found in noise.values() for bits in found}, reverse=True)
    if len(widths) < 2 or any(len(found) != len(widths) for found in noise.values()):
        raise UsageError(
            "a choice needs two bit-widths, measured for every layer",
            hint="let `sdconvert quantize sensitivity --bits 4 --bits 8` end",
        )
    counts = {key: int(layer["weights"]) for key, layer in layers.items()}
    bits = dict.fromkeys(layers, widths[0])
    choices = [_choice(bits, counts, noise)]
    for high, low in itertools.pairwise(widths):
        cost = {key: (noise[key][low] - noise[key][high]) / (counts[key] * (high - low)) for key in layers}
        for key in sorted(layers, key=cost.__getitem__):
            bits[key] = low
            choices.append(_choice(bits, counts, noise))
    return choices


def choose(
    choices: Sequence[Choice],
    *,
    target_bits: float | None = None,
    target_bytes: int | None = None,
    target_db: float | None = None,
) -> Choice:
    """The best choice of at most a size, or the smallest of at least a quality.

    Args:
        choices: From `frontier`.
        target_bits: Bits per weight on average.
        target_bytes: Of all weights together, without scales.
        target_db: Predicted SQNR in dB.

    Raises:
        UsageError: Not exactly one target is given, or no choice reaches it; the message says what there is.
    """
    if sum(target is not None for target in (target_bits, target_bytes, target_db)) != 1:
        raise UsageError("one target is needed", hint="give one of --target-bits, --target-size and --target-sqnr")
    if target_db is not None:
        fitting = [choice for choice in choices if choice.predicted_db >= target_db]
        best = min(fitting, key=lambda choice: choice.weight_bytes, default=None)
    else:
        limit = target_bytes if target_bytes is not None else math.inf
        mean = target_bits if target_bits is not None else math.inf
        fitting = [one for one in choices if one.weight_bytes <= limit and one.bits_per_weight <= mean]
        best = max(fitting, key=lambda choice: choice.predicted_db, default=None)
    if best is None:
        first, last = choices[0], choices[-1]
        raise UsageError(
            "no choice of bit-widths reaches the target",
            hint=f"they reach from {first.bits_per_weight:.2f} bits per weight, {first.weight_bytes} bytes, "
            f"{first.predicted_db:.1f} dB to {last.bits_per_weight:.2f} bits, {last.weight_bytes} bytes, "
            f"{last.predicted_db:.1f} dB",
        )
    return best


def with_choice(recipe: Recipe, choice: Choice, name: str, sensitivity: Path) -> Recipe:
    """A recipe with a choice of bit-widths, which takes the place of the layers' precisions that it had.

    Args:
        recipe: Gives everything else.
        choice: Of bit-widths; those that are not the recipe's own are written down layer by layer.
        name: Of the new recipe, and so of its run folder.
        sensitivity: The figures that the choice rests on, for the report.
    """
    layers = {
        f"{graph}:{weight.rpartition('.')[0]}": LayerPrecision.model_validate({"weight_bitwidth": bits})
        for (graph, weight), bits in choice.bits.items()
        if bits != recipe.quantize.weight_bitwidth
    }
    return recipe.model_copy(
        update={
            "name": name,
            "quantize": recipe.quantize.model_copy(update={"layers": layers}),
            "report": recipe.report.model_copy(update={"sensitivity": str(sensitivity)}),
        }
    )


def _choice(bits: Mapping[Key, int], counts: Mapping[Key, int], noise: Mapping[Key, Mapping[int, float]]) -> Choice:
    total = sum(counts[key] * width for key, width in bits.items())
    predicted = -10 * math.log10(sum(noise[key][width] for key, width in bits.items()))
    return Choice(dict(bits), total / sum(counts.values()), -(-total // 8), predicted)


def _noise(db: float) -> float:
    """Noise over signal."""
    return 10 ** (-db / 10)
