"""Biases that would not fit into int32: what the compiler makes of them, and what a wider grid makes of them."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from static_graphs import Case, module_case, simulate
from torch import nn

from sdconvert.export.bias_range import make_room_for_biases
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.metrics import worst_sqnr_db
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

SOC = find_soc("SM8650")


@pytest.fixture(scope="module", params=["conv", "linear"])
def constant_channels(request: pytest.FixtureRequest) -> tuple[Case, Simulation, ModelProto]:
    """A layer two of whose channels are their bias: of zero weights, and of weights a millionth of the others'."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Conv2d(16, 8, 1) if request.param == "conv" else nn.Linear(16, 8)
    weight, bias = layer.weight, layer.bias
    weight.data[2:4] *= torch.tensor([0.0, 1e-6]).reshape(2, *[1] * (weight.ndim - 1))
    bias.data[2:4] = -7.0
    case = module_case(nn.Sequential(layer), *((1, 16, 8, 8) if request.param == "conv" else (1, 16)))
    simulation = simulate(case)
    return case, simulation, to_onnx(simulation, case.samples[0], opset=21)


def on_the_htp(model: ModelProto, case: Case, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    onnx.save(model, str(folder / "layer.onnx"))
    return Simulator(compile_context(folder / "layer.onnx", folder, SOC).ctx_onnx)(case.samples[0])


def test_a_bias_that_does_not_fit_is_garbage_and_a_wider_grid_gives_it_room(
    constant_channels: tuple[Case, Simulation, ModelProto], tmp_path: Path
) -> None:
    case, simulation, model = *constant_channels[:2], copy.deepcopy(constant_channels[2])
    expected = simulation(case.samples[0])
    assert worst_sqnr_db(expected, on_the_htp(model, case, tmp_path / "before")) < 10
    assert len(make_room_for_biases(model)) == 1
    assert worst_sqnr_db(expected, on_the_htp(model, case, tmp_path / "after")) > 60
    assert make_room_for_biases(model) == []


def test_only_the_channels_in_need_are_changed(constant_channels: tuple[Case, Simulation, ModelProto]) -> None:
    model = copy.deepcopy(constant_channels[2])
    before = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (weight,) = make_room_for_biases(model)
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, value in before.items():
        assert (
            (value[[0, 1, 4, 5, 6, 7]] == after[name][[0, 1, 4, 5, 6, 7]]).all() if value.ndim else value == after[name]
        )
    assert (after[weight][2:4] == 0).all()
    assert sum((before[name] != after[name]).any() for name in before) == 2  # codes and scales of one weight
