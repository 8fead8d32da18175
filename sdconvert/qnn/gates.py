"""Which figures of the simulator miss the recipe's gates, each SoC judged by the gates of its generation."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from sdconvert.config import GatesSection
from sdconvert.soc import find_soc

MEASURES = ("simulator_vs_fp32_db", "simulator_vs_quantized_db")
BLOCK_MEASURE = "block_simulator_vs_quantized_db"


def missed_gates(gates: GatesSection, found: Mapping[str, Any]) -> list[str]:
    """Return a text for each figure that misses its gate.

    Args:
        gates: Of the recipe.
        found: The figures of a `QnnArtifact`.
    """
    missed = []
    for what, measure, soc, level in _levels(found):
        gate = gate_of(gates, measure, soc)
        if not level >= gate:
            missed.append(f"{what} {level:.1f} dB, gate {gate:.1f}")
    for kind, calls in found["responses"].items():
        ratio = worst_ratio(calls)
        if deviation(ratio) > gates.response_tolerance:
            missed.append(
                f"the answer to the {kind} is {ratio:.3f} times fp32's, gate 1 ± {gates.response_tolerance:g}"
            )
    return missed


def gate_of(gates: GatesSection, measure: str, soc: str) -> float:
    """Return the gate in dB of a measure on a SoC."""
    return float(getattr(gates, gates.key_of(measure, find_soc(soc).arch)))


def _levels(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """What is judged, as which measure, on which SoC, and its dB."""
    for measure in MEASURES:
        for graph, by_soc in found["graphs"].items():
            for soc, scores in by_soc.items():
                yield f"{graph} on {soc}: {measure}", measure, soc, scores[measure]
    for graph, by_soc in found["fidelity"].items():
        for soc, rows in by_soc.items():
            block, level = worst_block(rows)
            ops = [op["tensor"] for row in rows for op in row.get("worst_ops", ())]
            where = f" (most of it lost in {', '.join(ops)})" if ops else ""
            yield f"{graph} on {soc}: block {block}{where}", BLOCK_MEASURE, soc, level


def worst_block(rows: list[dict[str, Any]]) -> tuple[str, float]:
    """Return path and SQNR in dB of the block that agrees least with the quantized model; NaN is less than all."""
    levels = [(row["block"], float(row["simulator_vs_quantized_db"])) for row in rows]
    return min(levels, key=lambda one: -math.inf if math.isnan(one[1]) else one[1])


def worst_ratio(calls: list[dict[str, float]]) -> float:
    """Return the ratio to fp32's answer that is farthest from one."""
    return max((call["ratio"] for call in calls), key=deviation)


def deviation(ratio: float) -> float:
    """Return the distance from one; that of NaN is infinite."""
    return math.inf if math.isnan(ratio) else abs(ratio - 1)
