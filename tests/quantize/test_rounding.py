"""AdaRound of a simulation: what it changes, what it leaves, and what it refuses before it begins."""

import copy
import json
from pathlib import Path

import pytest
import torch
from pydantic import ByteSize
from static_graphs import Case, module_case
from torch import nn

from sdconvert.config import AdaRoundSection
from sdconvert.errors import BudgetError, UsageError
from sdconvert.metrics import worst_sqnr_db
from sdconvert.quantize.rounding import plan_rounding, round_weights, rounded_grids, write_figures
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation


@pytest.fixture
def case() -> Case:
    """Layers whose inputs are correlated, as those of trained models are; without, nearest is the best rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.Conv2d(12, 16, 1), nn.SiLU(), nn.Conv2d(16, 4, 1)
    )
    made = module_case(model, 1, 4, 8, 8)
    mix = torch.randn(4, 2)
    samples = [
        {"x": (torch.randn(8, 8, 2) @ mix.T).permute(2, 0, 1)[None] + 0.1 * torch.randn(1, 4, 8, 8)} for _ in range(24)
    ]
    return Case(made.adapter, made.call, samples)


def simulated(case: Case, samples: int = 20) -> Simulation:
    settings = load_settings({75}).with_bitwidths(weight=4, activation=16, per_channel=True)
    simulation = Simulation(case.adapter, case.samples[0], settings)
    simulation.calibrate(case.samples[:samples])
    return simulation


def held_out_db(case: Case, simulation: Simulation) -> float:
    return min(worst_sqnr_db(case.adapter.run(one), simulation(one)) for one in case.samples[20:])


@pytest.mark.parametrize(
    "section",
    [
        AdaRoundSection(),
        AdaRoundSection(refit_scale=True),
        AdaRoundSection(quantized_activations=True, solver="adaround"),
        AdaRoundSection(inputs="fp"),
        AdaRoundSection(reconstruct="layer+activation"),
        AdaRoundSection(correct_bias=False),
    ],
    ids=["default", "refit", "adaround", "fp", "reconstruct", "biases stay"],
)
def test_outputs_of_data_that_were_not_seen_come_closer(case: Case, section: AdaRoundSection, tmp_path: Path) -> None:
    simulation = simulated(case)
    before, model = held_out_db(case, simulation), copy.deepcopy(case.adapter.model.state_dict())
    told: list[str] = []
    result = round_weights(
        simulation, case.samples[:20], section, tmp_path, lambda done, total, note: told.append(note)
    )
    assert held_out_db(case, simulation) > before + 1.5
    assert told == ["0.weight", "2.weight", "4.weight"]
    # The model is the reference of every later figure, and keeps its weights.
    assert all(torch.equal(tensor, model[name]) for name, tensor in case.adapter.model.state_dict().items())
    rounded = simulation.rounded_weights
    biases = {name: rounded.pop(name) for name in result.biases()}
    assert rounded.keys() == result.figures.keys() == rounded_grids(simulation).keys()
    assert biases.keys() == ({"0.bias", "2.bias", "4.bias"} if section.correct_bias else set())
    assert all(not torch.equal(bias, model[name]) for name, bias in biases.items())
    for name, weight in rounded.items():
        grid = rounded_grids(simulation)[name]
        again = grid.dequantize(grid.nearest(weight.flatten(1))).reshape(weight.shape)
        torch.testing.assert_close(again, weight, rtol=1e-6, atol=0)
        assert not torch.equal(weight, model[name])
    assert "1.weight" not in simulation.rounded_weights  # norms keep 16 bits


def test_layers_are_compared_with_the_model_not_with_rounded_weights(case: Case, tmp_path: Path) -> None:
    simulation = simulated(case)
    round_weights(simulation, case.samples[:20], AdaRoundSection(), tmp_path, lambda *_: None)
    worst = min(simulation.layer_sqnr_db(case.samples[20]).values())
    assert worst == pytest.approx(
        worst_sqnr_db(case.adapter.run(case.samples[20]), simulation(case.samples[20])), abs=9
    )
    assert worst < 40  # against graphs with the same rounded weights it would be that of 16-bit activations
    (only_weights,) = simulation.run_with_activations_unquantized([case.samples[20]])
    assert worst_sqnr_db(case.adapter.run(case.samples[20]), only_weights) < 40


def test_figures_are_written_with_the_plan(case: Case, tmp_path: Path) -> None:
    simulation = simulated(case)
    result = round_weights(simulation, case.samples[:20], AdaRoundSection(), tmp_path / "scratch", lambda *_: None)
    write_figures(result, tmp_path / "adaround.json")
    content = json.loads((tmp_path / "adaround.json").read_text())
    assert content["layers"].keys() == result.figures.keys()
    assert all(layer["loss"] <= layer["nearest_loss"] for layer in content["layers"].values())
    assert "3 layers in 3 groups" in content["plan"] and "20 samples, 2 of them held out" in content["plan"]
    # Twice for each sample, but for what is the same on both paths.
    assert 20 < content["forwards"] <= 40


def test_a_sample_is_called_what_calibration_calls_it(case: Case, tmp_path: Path) -> None:
    simulation, samples = simulated(case), [dict(sample) for sample in case.samples[:5]]
    samples[3] = {name: torch.full_like(tensor, float("nan")) for name, tensor in samples[3].items()}
    names = [f"coffee-{step}-cond-0" for step in range(5)]
    with pytest.raises(UsageError, match="`0.weight` is not finite in coffee-3-cond-0"):
        round_weights(simulation, samples, AdaRoundSection(), tmp_path, lambda *_: None, names.__getitem__)


def test_a_limit_that_is_too_small_is_refused_beforehand(case: Case) -> None:
    section = AdaRoundSection(memory_limit=ByteSize(1000))
    with pytest.raises(BudgetError, match=f"AdaRound of {case.adapter.graph_name}: ") as error:
        plan_rounding(simulated(case), section, 20)
    assert "quantize.adaround.memory_limit" in error.value.hint


def test_weights_that_are_none_are_refused(case: Case) -> None:
    with pytest.raises(UsageError, match="`5.weight` is no quantized weight"):
        simulated(case).set_weights({"5.weight": torch.zeros(1)})
