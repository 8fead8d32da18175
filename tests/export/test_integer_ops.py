"""Ops that would be computed in floating point between integers: none is left where the HTP has an integer form."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto
from static_graphs import Case, ModuleAdapter, module_case
from torch import nn

from sdconvert.export.aimet import to_onnx
from sdconvert.export.integer_ops import quantize_layer_norm_biases, quantize_silu
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.convolutions import PointwiseConv2d
from sdconvert.models.layer_norm import ChannelLayerNorm
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.nodes import read_nodes
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import Grid, load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc


def simulate(case: Case, layer_norm: Grid | None = None) -> Simulation:
    settings = load_settings({75})
    if layer_norm:
        settings = settings.model_copy(update={"parameters": settings.parameters | {"layer_norm": layer_norm}})
    simulation = Simulation(case.adapter, case.samples[0], settings)
    simulation.calibrate(case.samples)
    return simulation


def on_htp(model: ModelProto, path: Path, case: Case) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Nodes by type, and what the simulator computes."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    context = compile_context(path, path.parent, find_soc("SM8650"))
    return read_nodes(context.bin), Simulator(context.ctx_onnx)(case.samples[0])


def test_silu_is_computed_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1)), 1, 3, 6, 6)
    simulation = simulate(case)
    model = to_onnx(simulation, case.samples[0], opset=21)
    before, floating = on_htp(model, tmp_path / "before.onnx", case)
    assert quantize_silu(model) == 1
    after, integers = on_htp(model, tmp_path / "after.onnx", case)
    # The graph's output is dequantized, and its input quantized.
    assert (before["Dequantize"], before["Quantize"]) == (3, 2)
    assert (after["Dequantize"], after["Quantize"]) == (1, 1)
    assert worst_sqnr_db(simulation(case.samples[0]), integers) >= 60
    assert worst_sqnr_db(floating, integers) >= 60
    assert worst_sqnr_db(simulation(case.samples[0]), OnnxRunner(tmp_path / "after.onnx")(case.samples[0])) >= 60
    assert quantize_silu(model) == 0


def test_layer_norm_is_computed_on_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(PointwiseConv2d(8, 32, 1), ChannelLayerNorm(32), PointwiseConv2d(32, 4, 1))
    for parameter in module[1].parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    case = module_case(module, 1, 8, 1, 24)
    simulation = simulate(case, Grid(bitwidth=16, symmetric=True))
    model = to_onnx(simulation, case.samples[0], opset=21)
    before, floating = on_htp(model, tmp_path / "before.onnx", case)
    assert quantize_layer_norm_biases(model) == 1
    after, integers = on_htp(model, tmp_path / "after.onnx", case)
    assert (before["Dequantize"], before["Quantize"]) == (3, 2)
    assert (after["Dequantize"], after["Quantize"]) == (1, 1)
    assert worst_sqnr_db(simulation(case.samples[0]), integers) >= 60
    assert worst_sqnr_db(floating, integers) >= 60
    assert quantize_layer_norm_biases(model) == 0


@pytest.mark.parametrize("grid", [Grid(bitwidth=16, symmetric=False), Grid(bitwidth=8, symmetric=True)])
def test_other_weights_keep_their_bias_in_floating_point(grid: Grid) -> None:
    """The compiler refuses an int32 bias beside them."""
    case = module_case(nn.LayerNorm(8), 1, 5, 8)
    model = to_onnx(simulate(case, grid), case.samples[0], opset=21)
    before = model.SerializeToString()
    assert quantize_layer_norm_biases(model) == 0
    assert model.SerializeToString() == before


def test_a_sigmoid_that_others_read_is_left_alone() -> None:
    class Gate(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sigmoid(x) * x

    case = module_case(Gate(), 1, 4)
    assert isinstance(case.adapter, ModuleAdapter)
    # The model itself calls sigmoid here: it is a tensor of the graph, and has its own pair.
    model = to_onnx(simulate(case), case.samples[0], opset=21)
    assert quantize_silu(model) == 0
