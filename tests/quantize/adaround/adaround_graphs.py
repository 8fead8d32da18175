"""A graph with everything that a UNet has, in small: convolutions, a skip, attention, shared inputs, two outputs."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from static_graphs import ModuleAdapter
from torch import Tensor, nn
from torch.fx import GraphModule

from sdconvert.adapters import Tensors
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.simplify import attribute


class Block(nn.Module):
    """Positional inputs `x` (1, 3, 8, 8) and `text` (1, 5, 12)."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(12, channels, bias=False)
        self.value = nn.Linear(12, channels, bias=False)
        self.proj = nn.Linear(channels, 2 * channels)
        self.down = nn.Conv2d(2 * channels, channels, 3, stride=2, padding=1)
        self.conv_out = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Two outputs."""
        hidden = self.conv_in(x)
        skip = F.silu(self.grouped(F.silu(hidden)))
        tokens = skip.flatten(2).transpose(1, 2)
        scores = torch.matmul(self.query(tokens), self.key(text).transpose(1, 2)) * 0.4
        attended = torch.matmul(scores.softmax(-1), self.value(text))
        kept, gate = self.proj(attended + tokens).chunk(2, -1)
        mixed = torch.cat([kept * F.gelu(gate), tokens], -1).transpose(1, 2).reshape(1, -1, *x.shape[2:])
        down = self.down(mixed)
        return hidden, self.conv_out(F.interpolate(down, scale_factor=2.0) + skip)


class BlockAdapter(ModuleAdapter):
    """Two outputs."""

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.model(*inputs)
        return outputs

    def output_names(self, count: int) -> tuple[str, ...]:
        return ("hidden", "y")


def block_samples(count: int, seed: int = 0) -> list[Tensors]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(9))
    return [
        {
            "x": torch.einsum("bchw,cd->bdhw", torch.randn(1, 3, 8, 8, generator=generator), mixing),
            "text": torch.randn(1, 5, 12, generator=generator),
        }
        for _ in range(count)
    ]


def block_adapter() -> BlockAdapter:
    torch.manual_seed(0)
    return BlockAdapter(Block().eval())


def block_graph() -> GraphModule:
    return graph.trace(block_adapter(), block_samples(1)[0])


def rounded_weights(graph_module: GraphModule) -> dict[str, Tensor]:
    """Weights of convolutions and linear layers by name."""
    return {
        parameter.name: attribute(graph_module, parameter.node).detach()
        for parameter in graph.parameters(graph_module)
        if parameter.op in ("conv2d", "linear") and not parameter.is_bias
    }


def int4_grids(graph_module: GraphModule) -> dict[str, CodeGrid]:
    return {
        name: CodeGrid.symmetric_blocks(weight.flatten(1).abs().amax(1, keepdim=True) / 7.5, 4)
        for name, weight in rounded_weights(graph_module).items()
    }


@cache
def block_grids() -> dict[str, CodeGrid]:
    """Those of `block_graph`, without another trace."""
    return int4_grids(block_graph())


def nearest_weights(graph_module: GraphModule, grids: dict[str, CodeGrid]) -> dict[str, Tensor]:
    weights = rounded_weights(graph_module)
    return {
        name: grid.dequantize(grid.nearest(weights[name].flatten(1))).reshape(weights[name].shape)
        for name, grid in grids.items()
    }


@torch.no_grad()
def output_sqnr_db(graph_module: GraphModule, weights: dict[str, Tensor], samples: list[Tensors]) -> float:
    """SQNR in dB of the last output with other weights, over all samples; the graph's own weights stay."""
    own = {parameter.name: parameter.node for parameter in graph.parameters(graph_module)}
    kept = {name: attribute(graph_module, own[name]).clone() for name in weights}

    def run(values: dict[str, Tensor]) -> Tensor:
        for name, value in values.items():
            attribute(graph_module, own[name]).copy_(value)
        return torch.stack([graph_module(*sample.values())[-1] for sample in samples]).double()

    reference: Any = run(kept)
    noise = run(weights) - reference
    run(kept)
    return float(10 * torch.log10(reference.square().sum() / noise.square().sum()))
