"""GroupNorm in two forms on the HTP: its own op, in floating point, and LayerNorm of a group with what that takes.

Docs say which the road uses and why: docs/architecture.md, "Forms that the HTP compiler needs".
"""

from pathlib import Path

import onnx
import torch
from static_graphs import module_case
from torch import Tensor, nn

from sdconvert.export.onnx_graph import to_onnx
from sdconvert.metrics import worst_sqnr_db
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.nodes import read_nodes
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import Grid, load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

_GRIDS = {"layer_norm": Grid(bitwidth=16, symmetric=True), "mul": Grid(bitwidth=16, symmetric=False)}


class Native(nn.Module):
    """A convolution, GroupNorm, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.norm, self.conv_out = nn.Conv2d(4, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 4, 3)
        for parameter in self.norm.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.norm(self.conv_in(x)))


class Decomposed(nn.Module):
    """The same with LayerNorm over each group's values, whose weights are one, and the channels' weights after it."""

    def __init__(self, native: Native, values: int) -> None:
        super().__init__()
        self.conv_in, self.conv_out, norm = native.conv_in, native.conv_out, native.norm
        self.norm = nn.LayerNorm(values, eps=norm.eps, bias=False)
        self.weight, self.bias = (nn.Parameter(one.detach()[None, :, None, None]) for one in (norm.weight, norm.bias))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        return self.conv_out(self.norm(x.reshape(1, 4, -1)).reshape(x.shape) * self.weight + self.bias)


def on_htp(module: nn.Module, folder: Path) -> tuple[dict[str, int], float, Tensor]:
    """Nodes, SQNR against the simulation, and fp32's answer."""
    case = module_case(module, 1, 4, 14, 14)
    settings = load_settings({75})
    parameters = settings.parameters | _GRIDS
    simulation = Simulation(case.adapter, case.samples[0], settings.model_copy(update={"parameters": parameters}))
    simulation.calibrate(case.samples)
    folder.mkdir()
    onnx.save(to_onnx(simulation, case.samples[0], opset=21), str(folder / "norm.onnx"))
    context = compile_context(folder / "norm.onnx", folder, find_soc("SM8650"))
    answer = Simulator(context.ctx_onnx)(case.samples[0])
    agreement = worst_sqnr_db(simulation(case.samples[0]), answer)
    return read_nodes(context.bin), agreement, case.adapter.run(case.samples[0])["y"]


def test_both_forms_are_right_and_each_has_its_price(tmp_path: Path) -> None:
    torch.manual_seed(0)
    native = Native()
    one, native_db, expected = on_htp(native, tmp_path / "native")
    other, decomposed_db, computed = on_htp(Decomposed(native, 4 * 12 * 12), tmp_path / "decomposed")
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-5)
    assert native_db >= 60
    assert decomposed_db >= 60
    assert one["GroupNorm"] == 1
    assert (one["Dequantize"], one["Quantize"]) == (3, 2)
    assert (other["Dequantize"], other["Quantize"]) == (1, 1)
    moves = [nodes.get("Transpose", 0) + nodes.get("Reshape", 0) for nodes in (one, other)]
    assert moves == [2, 6]
