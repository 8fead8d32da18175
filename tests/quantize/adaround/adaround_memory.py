"""AdaRound in processes of their own: python adaround_memory.py RUNS SHAPES FOLDER, RUNS as [[budget, samples], …].

Everything is loaded and traced, and calibration data lie on the disk, before a process is forked for each run. Each
first rounds a small graph, for pages of libraries count in the process that touches them, and prints a line: the most
memory that it took, how much that was more than before, and what came out.
"""

import json
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import torch
from adaround_graphs import BlockAdapter, block_graph, block_samples, int4_grids
from torch import Tensor, nn
from torch.fx import GraphModule

from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.memory import PeakMemory, return_freed_memory
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.run import AdaRoundSettings, adaround
from sdconvert.quantize.adaround.solve import SolverSettings

# Channels and side of a 3x3 convolution's input, and tokens and width of two linear layers'.
SHAPES = {
    "small": (256, 16, (16, 1024), (1, 5000)),
    "large": (384, 16, (96, 10240), (1, 9000)),
}
DISTINCT = 64


class Wide(nn.Module):
    """Layers with many inputs per output; positional inputs as `inputs` makes them."""

    def __init__(self, shapes: str) -> None:
        super().__init__()
        channels, _, *widths = SHAPES[shapes]
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, 32, 3, padding=1)
        self.many, self.few = (nn.Linear(width, 32) for _, width in widths)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Three outputs."""
        return self.out(torch.nn.functional.silu(self.conv(x)) + x), self.many(y), self.few(z)


def inputs(shapes: str, seed: int) -> dict[str, Tensor]:
    """A sample with columns that depend on each other."""
    channels, side, *widths = SHAPES[shapes]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, channels, side, side, generator=generator)
    tokens = [torch.randn(*size, generator=generator) for size in widths]
    y, z = (one + one.roll(1, 1) for one in tokens)
    return {"x": x + x.roll(1, 1), "y": y, "z": z}


class Samples:
    """Read from the disk one at a time."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (load_tensors(self.folder / f"{index % DISTINCT}.safetensors") for index in range(self.count))


def main() -> None:
    """Run all."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    runs, shapes, folder = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    folder.joinpath("samples").mkdir()
    for index in range(min(DISTINCT, max(count for _, count in runs))):
        save_tensors(inputs(shapes, index), folder / "samples" / f"{index}.safetensors")
    traced = graph.trace(BlockAdapter(Wide(shapes).eval()), inputs(shapes, 0))
    for budget, count in runs:
        process = get_context("fork").Process(target=run, args=(traced, folder, budget, count))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)


def settings(budget: int) -> AdaRoundSettings:
    """Small effort."""
    return AdaRoundSettings(solver=SolverSettings(damping=(0.1,)), budget_bytes=budget)


def run(traced: GraphModule, folder: Path, budget: int, count: int) -> None:
    """Run once."""
    small, out = block_graph(), folder / f"{budget}-{count}"
    adaround(small, block_samples(4), int4_grids(small), settings(1 << 30), out / "small")
    return_freed_memory()
    memory = PeakMemory()
    before = memory.peak_bytes()
    result = adaround(traced, Samples(folder / "samples", count), int4_grids(traced), settings(budget), out / "wide")
    peak = memory.peak_bytes()
    report = {
        "planned": result.plan.peak_bytes,
        "modes": [group.moments.mode for group in result.plan.groups],
        "held_out_modes": [group.held_out.mode for group in result.plan.groups if group.held_out],
        "levels": [figures.sqnr_db for figures in result.figures.values()],
        "output": result.output_sqnr_db,
        "peak": peak,
        "taken": peak - before,
    }
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
