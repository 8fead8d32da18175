"""Norms on chips that have no floating point, and on v68, which has no GroupNorm."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import ModelProto
from static_graphs import Case, module_case, simulate, small_case, vae_case
from torch import nn

from sdconvert.errors import CompileError
from sdconvert.export.compiler_graph import graph_for_compiler
from sdconvert.export.integer_norms import write_norms_on_integers
from sdconvert.export.integer_ops import quantize_silu
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.nodes import read_nodes
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc


class Norms(nn.Module):
    """A convolution, GroupNorm, SiLU, a convolution, and LayerNorm of its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv_in, self.group_norm = nn.Conv2d(4, 16, 3), nn.GroupNorm(4, 16)
        self.conv_out, self.layer_norm = nn.Conv2d(16, 8, 3), nn.LayerNorm(8)
        for parameter in (*self.group_norm.parameters(), *self.layer_norm.parameters()):
            parameter.data += 0.3 * torch.randn_like(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_out(nn.functional.silu(self.group_norm(self.conv_in(x))))
        return self.layer_norm(x.flatten(2).transpose(1, 2))


@pytest.fixture(scope="module")
def norms() -> tuple[Case, Simulation, ModelProto]:
    case = module_case(Norms(), 1, 4, 14, 14)
    simulation = simulate(case, 69)
    assert simulation.settings.integers_only
    return case, simulation, to_onnx(simulation, case.samples[0], opset=21)


def copied(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


@pytest.mark.parametrize(
    ("soc", "said"),
    [
        ("SM8350", "Failed to finalize"),  # no GroupNorm
        ("QCS6490", "LayerNormalization.*|GroupNormalization.*"),  # no floating point
    ],
)
def test_norms_as_they_are_do_not_compile(
    norms: tuple[Case, Simulation, ModelProto], tmp_path: Path, soc: str, said: str
) -> None:
    """When one of these compiles, the compiler has learned it, and the rewrite may go."""
    onnx.save(norms[2], str(tmp_path / "norms.onnx"))
    with pytest.raises(CompileError, match=said):
        compile_context(tmp_path / "norms.onnx", tmp_path, find_soc(soc))


def test_norms_on_integers_compile_and_are_right(norms: tuple[Case, Simulation, ModelProto], tmp_path: Path) -> None:
    case, simulation, model = norms[0], norms[1], copied(norms[2])
    assert (write_norms_on_integers(model), quantize_silu(model)) == (2, 1)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(tmp_path / "norms.onnx"))
    expected = simulation(case.samples[0])
    assert worst_sqnr_db(expected, OnnxRunner(tmp_path / "norms.onnx")(case.samples[0])) >= 60
    for soc in ("SM8350", "QCS6490"):
        context = compile_context(tmp_path / "norms.onnx", tmp_path / soc, find_soc(soc))
        assert context.cpu_nodes == 0
        nodes = read_nodes(context.bin)
        assert (nodes["Dequantize"], nodes["Quantize"], nodes["LayerNorm"]) == (1, 1, 2)
        assert worst_sqnr_db(expected, Simulator(context.ctx_onnx)(case.samples[0])) >= 50


@pytest.mark.parametrize("shape", [(1, 64, 8, 8), (1, 64, 64)], ids=["image", "sequence"])
def test_group_norm_and_silu_together_are_right(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """With Mul and Add in place of the convolution per channel, the compiler makes garbage of the first (0 dB)."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(32, 64)
    norm.weight.data += 0.3 * torch.randn(64)
    # A channel that is its bias: int32 has no room for it beside a scale that follows the weight.
    norm.weight.data[0], norm.bias.data[0] = 1e-9, 1.5
    case = module_case(nn.Sequential(norm, nn.SiLU()), *shape)
    simulation = simulate(case, 69)
    model = to_onnx(simulation, case.samples[0], opset=21)
    assert (write_norms_on_integers(model), quantize_silu(model)) == (1, 1)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(tmp_path / "norm.onnx"))
    context = compile_context(tmp_path / "norm.onnx", tmp_path, find_soc("QCS6490"))
    assert worst_sqnr_db(simulation(case.samples[0]), Simulator(context.ctx_onnx)(case.samples[0])) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_case, vae_case], ids=["unet", "vae_decoder"])
def test_whole_models_compile_and_are_right(tmp_path: Path, make: Callable[[], Case]) -> None:
    case = make()
    simulation = simulate(case, 68)
    onnx.save(graph_for_compiler(simulation, case.samples[0]), str(tmp_path / "model.onnx"))
    context = compile_context(tmp_path / "model.onnx", tmp_path, find_soc("SM8350"))
    assert context.cpu_nodes == 0
    assert worst_sqnr_db(simulation(case.samples[0]), Simulator(context.ctx_onnx)(case.samples[0])) >= 45


def test_the_parameters_that_were_rewritten_go(norms: tuple[Case, Simulation, ModelProto]) -> None:
    model = copied(norms[2])
    assert any("norm.weight" in tensor.name for tensor in model.graph.initializer)
    write_norms_on_integers(model)
    names = [one.name for one in (*model.graph.initializer, *model.graph.node)]
    assert not [name for name in names if "norm.weight" in name or "norm.bias" in name]
