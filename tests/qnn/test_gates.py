"""Each SoC is judged by the gates of its generation, each figure by its own."""

import math
from typing import Any

import pytest

from sdconvert.config import GatesSection
from sdconvert.qnn.gates import missed_gates
from sdconvert.soc import soc_table

GATES = GatesSection()


def figures(vs_fp32: float = 36, vs_quantized: float = 46, block: float = 51, ratio: float = 1.0) -> dict[str, Any]:
    """Figures of one graph on a SoC before v73 and on one after."""
    socs = ("SM8450", "SM8650")
    scores = {"simulator_vs_fp32_db": vs_fp32, "simulator_vs_quantized_db": vs_quantized}
    rows = [{"block": "conv_in", "simulator_vs_quantized_db": 90.0}]
    return {
        "graphs": {"unet": dict.fromkeys(socs, scores)},
        "fidelity": {
            "unet": {soc: [*rows, {"block": "mid_block", "simulator_vs_quantized_db": block}] for soc in socs}
        },
        "responses": {"text": [{"ratio": 1.0}, {"ratio": ratio}]},
    }


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"vs_quantized": 44.9}, ["unet on SM8650: simulator_vs_quantized_db 44.9 dB, gate 45.0"]),
        (
            {"vs_quantized": 39.9},
            [
                "unet on SM8450: simulator_vs_quantized_db 39.9 dB, gate 40.0",
                "unet on SM8650: simulator_vs_quantized_db 39.9 dB, gate 45.0",
            ],
        ),
        ({"block": 49.9}, ["unet on SM8650: block mid_block 49.9 dB, gate 50.0"]),
        (
            {"block": math.nan},
            [
                "unet on SM8450: block mid_block nan dB, gate 38.0",
                "unet on SM8650: block mid_block nan dB, gate 50.0",
            ],
        ),
        ({"ratio": 0.94}, ["the answer to the text is 0.940 times fp32's, gate 1 ± 0.05"]),
        ({"ratio": math.nan}, ["the answer to the text is nan times fp32's, gate 1 ± 0.05"]),
    ],
)
def test_a_figure_misses_the_gate_of_its_own_generation(changes: dict[str, float], missed: list[str]) -> None:
    assert missed_gates(GATES, figures(**changes)) == missed


def test_the_gate_against_fp32_is_one_for_all() -> None:
    found = missed_gates(GATES, figures(vs_fp32=34.9))
    assert [text.partition(":")[0] for text in found] == ["unet on SM8450", "unet on SM8650"]


def test_generations_before_v73_are_v68_and_v69() -> None:
    measure = "simulator_vs_quantized_db"
    older = {soc.arch for soc in soc_table().values() if GATES.key_of(measure, soc.arch) != measure}
    assert older >= {68, 69}
    assert max(older) < 73


def test_ops_that_were_found_are_named_with_their_block() -> None:
    found = figures(block=30.0)
    found["fidelity"]["unet"]["SM8650"][1]["worst_ops"] = [
        {"tensor": "mid_block:matmul.1"},
        {"tensor": "mid_block:add.0"},
    ]
    *_, text = missed_gates(GATES, found)
    assert text.startswith(
        "unet on SM8650: block mid_block (most of it lost in mid_block:matmul.1, mid_block:add.0) 30.0 dB"
    )
