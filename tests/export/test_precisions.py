"""What the HTP compiler takes of weights, by op, bits, scales, bits of activations and generation, and how exact it is.

`weight_precisions` in the quantizer settings says the same; each case compiles, without the CPU, or is refused.
"""

from itertools import product
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto
from static_graphs import Case, module_case, small_case
from torch import nn

from sdconvert.config import LayerPrecision
from sdconvert.errors import CompileError
from sdconvert.export.block_biases import adapt_block_biases
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

CHANNELS, BLOCKS = 64, 4
# AIMET's exporter cannot write blocks of 16-bit weights.
GRIDS = [grid for grid in product((4, 8, 16), ("tensor", "channel", "block"), (16, 8)) if grid[:2] != (16, "block")]
# All of one generation; of the others what could differ.
CASES = [("conv1x1", *grid, "SM8650") for grid in GRIDS]
# A linear layer may have 4 bits per tensor, but convolutions are made of most of them, and refuse it.
CASES += [("linear", *grid, "SM8650") for grid in GRIDS if grid[:2] != (4, "tensor")]
CASES += [("conv3x3", *grid, "SM8650") for grid in GRIDS if grid[1] == "channel" or grid == (4, "block", 16)]
CASES += [("gemm", 4, "block", 16, "SM8650")]
CASES += [("conv1x1", *grid, soc) for grid in GRIDS if grid[1] != "tensor" for soc in ("SM8450", "SM8550", "SM8750")]
CASES += [("linear", *grid, "SM8450") for grid in GRIDS if grid[1] != "tensor"]
QUICK = [
    ("conv1x1", 4, "channel", 16, "SM8650"),
    ("conv1x1", 4, "block", 16, "SM8650"),
    ("conv1x1", 4, "tensor", 16, "SM8650"),
    ("conv3x3", 4, "block", 16, "SM8650"),
    ("linear", 4, "block", 16, "SM8650"),
    ("conv1x1", 16, "channel", 16, "SM8450"),
]


def layer(op: str) -> Case:
    torch.manual_seed(0)
    if op.startswith("conv"):
        kernel = int(op[-1])
        return module_case(nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2)), 1, CHANNELS, 8, 8)
    shape = (1, 24, CHANNELS) if op == "linear" else (1, CHANNELS)
    return module_case(nn.Sequential(nn.Linear(CHANNELS, CHANNELS)), *shape)


def simulated(case: Case, bits: int, scales: str, activation: int, arch: int) -> Simulation:
    """With any grid, taken as from a file: what the settings say is not asked."""
    settings = load_settings({arch}).with_bitwidths(weight=8, activation=activation, per_channel=True)
    count = {"tensor": 1, "channel": CHANNELS, "block": CHANNELS * BLOCKS}[scales]
    entries = [{"dtype": "int", "bitwidth": bits, "is_symmetric": "True"}] * count
    simulation = Simulation(case.adapter, case.samples[0], settings, {"0.weight": entries})
    simulation.calibrate(case.samples)
    return simulation


@pytest.mark.parametrize(
    ("op", "bits", "scales", "activation", "soc"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_the_compiler_takes_what_the_settings_say(
    tmp_path: Path, op: str, bits: int, scales: str, activation: int, soc: str
) -> None:
    case, target = layer(op), find_soc(soc)
    simulation = simulated(case, bits, scales, activation, target.arch)
    model = to_onnx(simulation, case.samples[0], opset=21)
    adapt_block_biases(model)
    onnx.save(model, str(tmp_path / "layer.onnx"))
    accepted = dict(simulation.settings.weight_precisions[activation])
    if bits not in accepted[scales] or (op == "conv3x3" and scales == "block"):  # type: ignore[index]
        with pytest.raises(CompileError):
            compile_context(tmp_path / "layer.onnx", tmp_path, target)
        return
    context = compile_context(tmp_path / "layer.onnx", tmp_path, target)
    assert context.cpu_nodes == 0
    expected = simulation(case.samples[0])
    at_least = 38 if activation == 8 else 50 if target.arch < 73 else 57
    assert worst_sqnr_db(expected, Simulator(context.ctx_onnx)(case.samples[0])) >= at_least
    if not (op == "conv3x3" and scales == "block"):
        assert worst_sqnr_db(expected, OnnxRunner(tmp_path / "layer.onnx")(case.samples[0])) >= 65


@pytest.mark.parametrize("scales", ["channel", "block"])
def test_weights_of_4_bits_are_stored_as_such(scales: str) -> None:
    case = layer("conv1x1")
    model = to_onnx(simulated(case, 4, scales, 16, 75), case.samples[0], opset=21)
    adapt_block_biases(model)
    (weight,) = (tensor for tensor in model.graph.initializer if list(tensor.dims) == [CHANNELS, CHANNELS, 1, 1])
    assert weight.data_type == TensorProto.INT4
    assert len(weight.raw_data) == CHANNELS * CHANNELS // 2
    biases = [tensor.data_type for tensor in model.graph.initializer if tensor.name.startswith("model.0.bias")]
    assert (TensorProto.INT32 in biases) == (scales == "block")


@pytest.mark.slow
def test_a_unet_with_4_bit_blocks_compiles_whole(tmp_path: Path) -> None:
    """Attention and feed-forward in blocks of 8, all other weights in 4 bits per channel."""
    case = small_case()
    blocks = LayerPrecision(weight_bitwidth=4, block_size=8)
    layers = {"*": LayerPrecision(weight_bitwidth=4), "*.attn1.to_*": blocks, "*.ff.net.*": blocks}
    settings = load_settings({75}).model_copy(update={"layers": layers})
    simulation = Simulation(case.adapter, case.samples[0], settings)
    simulation.calibrate(case.samples)
    model = to_onnx(simulation, case.samples[0], opset=21)
    adapt_block_biases(model)
    assert sum(attribute.name == "block_size" for node in model.graph.node for attribute in node.attribute) > 20
    onnx.save(model, str(tmp_path / "unet.onnx"))
    onnx.checker.check_model(str(tmp_path / "unet.onnx"), full_check=True)
    expected = simulation(case.samples[0])
    assert worst_sqnr_db(expected, OnnxRunner(tmp_path / "unet.onnx")(case.samples[0])) > 50
    context = compile_context(tmp_path / "unet.onnx", tmp_path, find_soc("SM8650"))
    assert context.cpu_nodes == 0
    assert worst_sqnr_db(expected, Simulator(context.ctx_onnx)(case.samples[0])) > 40
