"""H19: what a graph is traced from has its plugins fused, or only such as are part of the graph."""

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from static_graphs import Case, module_case
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.plugins import MultiPluginBlock, SinglePluginBlock, match_layers
from sdconvert.quantize import graph
from sdconvert.quantize.grid import FakeQuantBlock, WeightGrid
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.quantize.soft_rounding import SoftRoundingBlock

ENTRY = {"bitwidth": 8, "dtype": "int", "is_symmetric": "True", "offset": -128, "scale": 0.01}


class Block(nn.Module):
    """An attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention(query_dim=8, heads=2, dim_head=4)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.attn(x))
        return output


def block_case() -> Case:
    torch.manual_seed(0)
    return module_case(Block(), 1, 6, 8)


def attach(kind: str, model: Any) -> Any:
    grid = WeightGrid.from_encodings([ENTRY], model.out.weight.shape)
    if kind == "patch":
        return SHAAttentionPatch.wrap_model("sha", model)
    return {"fake_quant": FakeQuantBlock, "adaround": SoftRoundingBlock}[kind](kind, model.out, grid)


@pytest.mark.parametrize("kind", ["patch", "fake_quant", "adaround"])
def test_h19_unfused_plugins_are_refused_and_fused_ones_traced(kind: str) -> None:
    case = block_case()
    plugin = attach(kind, case.adapter.model)
    path = "attn" if kind == "patch" else f"out.{kind}"
    for consumer in (lambda: Simulation(case.adapter, case.samples[0], load_settings({75})), lambda: trace(case)):
        with pytest.raises(PluginError, match=rf"not part of its weights yet: `{path}`\n.*fuse\(\)"):
            consumer()
    plugin.fuse()
    reference = case.adapter.run(case.samples[0])["y"]
    torch.testing.assert_close(trace(case)(*case.samples[0].values())[0], reference, rtol=0, atol=1e-6)


class Shift(SinglePluginBlock):
    """Part of the graph, not of a weight."""

    def forward(self, fea_in: tuple[Any, ...], fea_out: Tensor) -> Tensor:
        return fea_out + 3


class Carry(MultiPluginBlock):
    """Adds what enters the attention to what leaves the last layer."""

    def forward(self, feat_from: list[tuple[Tensor, ...]]) -> list[Tensor]:
        return [feat_from[0][0][..., :4]]


def test_h19_plugins_that_are_part_of_the_graph_are_accepted() -> None:
    case = block_case()
    model = case.adapter.model
    Shift("shift", model.out)
    Carry("carry", match_layers("attn", model), match_layers("out", model))
    graph_module = trace(case)
    torch.testing.assert_close(graph_module(*case.samples[0].values())[0], case.adapter.run(case.samples[0])["y"])
    adds = [value.key for value in graph.values(graph_module) if value.op == "add"]
    assert len(adds) == 2


def trace(case: Case) -> Any:
    return graph.trace(case.adapter, case.samples[0])
