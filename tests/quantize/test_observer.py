"""Ranges as a plugin sees them: over all calls, whatever the order, and refused where no range can hold them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from static_graphs import module_case
from torch import nn

from sdconvert.errors import UsageError
from sdconvert.quantize.observer import HistogramBlock, ObserverBlock
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

values = st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=5), min_size=1, max_size=6)


@given(values, st.randoms())
@settings(deadline=None)
def test_extremes_are_those_of_all_calls(batches: list[list[float]], random: object) -> None:
    layer = nn.Identity()
    observer = ObserverBlock("range", layer)
    assert observer.extremes is None
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for batch in shuffled:
        tensor = torch.tensor(batch)
        assert layer(tensor) is tensor
    every = [value for batch in batches for value in batch]
    assert observer.extremes is not None
    assert observer.extremes.tolist() == [min(every), max(every)]
    observer.remove()
    assert not layer._forward_hooks


@given(values, st.randoms())
@settings(deadline=None)
def test_counts_are_those_of_all_calls_whatever_their_order(batches: list[list[float]], random: object) -> None:
    every = torch.tensor([value for batch in batches for value in batch])
    extremes = torch.stack([every.min(), every.max() + 1])
    layers = nn.Identity(), nn.Identity()
    one, other = (HistogramBlock("spread", layer, extremes, 16) for layer in layers)
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for first, second in zip(batches, shuffled, strict=True):
        layers[0](torch.tensor(first))
        layers[1](torch.tensor(second))
    assert torch.equal(one.counts, other.counts)
    assert one.counts.sum() == len(every)


def test_ranges_of_parts_of_the_data_together_are_the_range_of_all() -> None:
    """Activations are not rounded while they are observed, so a sample's range does not depend on other samples."""
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)), 1, 6, 8)

    def bounds(samples: list[dict[str, torch.Tensor]]) -> dict[str, tuple[float, float]]:
        simulation = Simulation(case.adapter, case.samples[0], load_settings({75}))
        simulation.calibrate(samples)
        return {key: (e["min"], e["max"]) for key, (e,) in simulation.encodings().activations.items()}

    whole, parts = bounds(case.samples), [bounds([sample]) for sample in case.samples]
    for key, (low, high) in whole.items():
        assert math.isclose(low, min(part[key][0] for part in parts), rel_tol=1e-3)
        assert math.isclose(high, max(part[key][1] for part in parts), rel_tol=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_without_a_range_is_an_error_that_names_the_tensor(bad: float) -> None:
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 4)), 1, 6, 8)
    simulation = Simulation(case.adapter, case.samples[0], load_settings({75}))
    damaged = [*case.samples, {"x": case.samples[0]["x"].clone().index_fill_(-1, torch.tensor([3]), bad)}]
    with pytest.raises(UsageError, match=r"4 tensors take values that are not finite, the first .* is `:x`"):
        simulation.calibrate(damaged)
    case.adapter.model[2].bias.data[0] = bad
    simulation = Simulation(case.adapter, case.samples[0], load_settings({75}))
    with pytest.raises(UsageError, match=r"1 tensors take .* is `2:linear\.0`"):
        simulation.calibrate(case.samples)
