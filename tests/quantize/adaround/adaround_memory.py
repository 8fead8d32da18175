"""AdaRound of layers as wide as Stable Diffusion's, in a process of its own: python adaround_memory.py BUDGET FOLDER.

Prints how much the process grew, and what was planned, for few samples and for many.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from adaround_graphs import BlockAdapter, int4_grids
from torch import Tensor, nn

from sdconvert.memory import PeakMemory, return_freed_memory
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.run import AdaRoundSettings, adaround
from sdconvert.quantize.adaround.solve import SolverSettings


class Wide(nn.Module):
    """A 3x3 convolution of 2,304 inputs per output, and a linear layer of 5,000 that sees one row per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 32, 3, padding=1)
        self.linear = nn.Linear(5000, 32)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Two outputs."""
        return self.conv(x), self.linear(y)


class Samples:
    """Made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            x = torch.randn(1, 256, 16, 16, generator=generator)
            yield {"x": x, "y": torch.randn(1, 5000, generator=generator)}


def main() -> None:
    """Run for 8 and for 64 samples."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget, folder = int(sys.argv[1]), Path(sys.argv[2])
    traced = graph.trace(BlockAdapter(Wide().eval()), next(iter(Samples(1))))
    solver = SolverSettings(damping=(0.1,), sweeps=1)
    report: dict[str, object] = {}
    for count in (4, 8, 64):
        return_freed_memory()
        memory = PeakMemory()
        before = memory.peak_bytes()
        settings = AdaRoundSettings(solver=solver, budget_bytes=budget)
        result = adaround(traced, Samples(count), int4_grids(traced), settings, folder / str(count))
        report[str(count)] = {
            "peak": memory.peak_bytes(),
            "grown": memory.peak_bytes() - before,
            "planned": result.plan.peak_bytes,
            "modes": [group.moments.mode for group in result.plan.groups],
            "losses": [figures.loss for figures in result.figures.values()],
        }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()
