"""A module of blocks with a skip connection, and its quantized graph."""

import copy
from functools import cache

import torch
from onnx import ModelProto
from static_graphs import Case, module_case, simulate
from torch import Tensor, nn

from sdconvert.export.onnx_graph import to_onnx
from sdconvert.quantize.simulation import Simulation

PATHS = ("conv_in", "down", "up", "conv_out")


class Skipping(nn.Module):
    """Four blocks; the last but one takes what the first made too, and a factor stands behind the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.up = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.SiLU())
        self.conv_out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_in(x)
        return self.conv_out(self.up(torch.cat([self.down(first), first], dim=1))) * 0.5


@cache
def skipping_case() -> tuple[Case, Simulation]:
    """The case and its simulation, made once per process."""
    torch.manual_seed(0)
    case = module_case(Skipping(), 1, 4, 12, 12)
    return case, simulate(case)


def skipping_onnx() -> ModelProto:
    """The file of the simulation: exported once per process, a copy for everybody."""
    return copy.deepcopy(_exported())


@cache
def _exported() -> ModelProto:
    case, simulation = skipping_case()
    return to_onnx(simulation, case.samples[0], opset=21)
