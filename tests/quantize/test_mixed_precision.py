"""The choice of bit-widths: sizes and qualities along the frontier, targets, and the recipe that comes of it."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconvert.config import dump_recipe, load_recipe
from sdconvert.errors import PreconditionError, UsageError
from sdconvert.quantize.mixed_precision import choose, frontier, read_sensitivity, with_choice

LAYERS = st.lists(
    st.tuples(st.integers(1, 5000), st.floats(5, 40), st.floats(0.5, 30), st.floats(0.5, 30)), min_size=1, max_size=7
)


def graphs_of(layers: list[tuple[int, float, float, float]]) -> dict[str, Any]:
    """Figures of layers by number of weights, dB at 4 bits, and what 8 and 16 bits add."""
    found = {
        f"layer.{index}.weight": {
            "weights": weights,
            "output_db": {"4": 1.0, "8": 2.0, "16": 3.0},
            "picture_db": {"4": low, "8": low + more, "16": low + more + most},
        }
        for index, (weights, low, more, most) in enumerate(layers)
    }
    half = len(found) // 2
    return {
        "unet": {"layers": dict(list(found.items())[half:]), "cumulative": {}},
        "controlnet": {"layers": dict(list(found.items())[:half]), "cumulative": {}},
    }


@given(LAYERS)
def test_along_the_frontier_the_model_shrinks_and_loses(layers: list[tuple[int, float, float, float]]) -> None:
    choices = frontier(graphs_of(layers))
    assert len(choices) == 2 * len(layers) + 1
    for larger, smaller in itertools.pairwise(choices):
        assert smaller.weight_bytes <= larger.weight_bytes
        assert smaller.bits_per_weight < larger.bits_per_weight
        assert smaller.predicted_db <= larger.predicted_db + 1e-9
    assert (choices[0].bits_per_weight, choices[-1].bits_per_weight) == (16, 4)
    noise = sum(10 ** (-low / 10) for _, low, _, _ in layers)
    assert choices[-1].predicted_db == pytest.approx(-10 * math.log10(noise))


@given(LAYERS, st.floats(4, 16))
@settings(deadline=None)
def test_no_choice_of_the_same_layers_beats_the_frontier_s_own_points(
    layers: list[tuple[int, float, float, float]], target: float
) -> None:
    """A greedy choice is the best of its exact size where cost per bit falls from step to step, as here with two."""
    graphs = graphs_of(layers)
    for found in graphs.values():
        for layer in found["layers"].values():
            del layer["picture_db"]["16"]
    keys = [(graph, name) for graph, found in graphs.items() for name in found["layers"]]
    best = choose(frontier(graphs), target_bits=max(target / 2, 4))
    for bits in itertools.product((4, 8), repeat=len(keys)):
        size = sum(
            width * graphs[graph]["layers"][name]["weights"] for (graph, name), width in zip(keys, bits, strict=True)
        )
        if size == sum(width * graphs[graph]["layers"][name]["weights"] for (graph, name), width in best.bits.items()):
            noise = sum(
                10 ** (-graphs[graph]["layers"][name]["picture_db"][str(width)] / 10)
                for (graph, name), width in zip(keys, bits, strict=True)
            )
            assert -10 * math.log10(noise) <= best.predicted_db + 1e-6


def test_targets() -> None:
    choices = frontier(graphs_of([(1000, 20.0, 20.0, 20.0), (1000, 30.0, 20.0, 20.0)]))
    assert choose(choices, target_bits=6).bits == {("controlnet", "layer.0.weight"): 8, ("unet", "layer.1.weight"): 4}
    assert choose(choices, target_bytes=1500) == choose(choices, target_bits=6)
    assert choose(choices, target_db=29) == choose(choices, target_bits=6)
    for targets, message in (({}, "one target"), ({"target_bits": 6, "target_db": 3}, "one target")):
        with pytest.raises(UsageError, match=message):
            choose(choices, **targets)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no choice of bit-widths reaches the target") as error:
        choose(choices, target_bits=3.9)
    assert "4.00 bits, 1000 bytes" in error.value.hint


def test_one_bit_width_is_no_choice() -> None:
    graphs = graphs_of([(10, 20.0, 1.0, 1.0), (10, 20.0, 1.0, 1.0)])
    del graphs["unet"]["layers"]["layer.1.weight"]["picture_db"]["8"]
    with pytest.raises(UsageError, match="two bit-widths"):
        frontier(graphs)


def test_the_choice_becomes_a_recipe_that_is_read_again(tmp_path: Path) -> None:
    choice = choose(frontier(graphs_of([(1000, 20.0, 20.0, 20.0), (1000, 30.0, 20.0, 20.0)])), target_bits=6)
    recipe = with_choice(load_recipe("pasd_tiny"), choice, "mixed", tmp_path / "sensitivity.json")
    (tmp_path / "mixed.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "mixed.yaml")
    assert again == recipe
    assert {key: one.weight_bitwidth for key, one in again.quantize.layers.items()} == {"unet:layer.1": 4}
    assert again.report.sensitivity == str(tmp_path / "sensitivity.json")


def test_figures_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PreconditionError, match="holds no sensitivity figures"):
        read_sensitivity(tmp_path / "sensitivity.json")
