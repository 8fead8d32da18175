"""AdaRound of PASD's UNet at the size of Stable Diffusion 1.5: does the budget hold, and how long does it take.

python benchmarks/adaround_fullsize.py [--samples 1] [--budget-mib 1024] [--threads 2] [--layers up_blocks.]
    [--weights FOLDER] [--scratch FOLDER]

Latents of 64x64, weights of `scripts/make_fullsize.py` (4.4 GB, written to a temporary folder unless there is one).
The whole UNet is the graph, and the layers whose names begin with `--layers` are rounded to 4 bits per channel. Weights
are mapped from their file: what the system counts as the process's own (`RssAnon`) is all the rest, and another
process watches it, from behind a first forward. Time grows by one constant per sample; solving does not depend on
their number. With `--scratch` a run that was stopped goes on behind the groups that it had finished; its time is then
that of the rest.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from sdconvert.adapters import GraphSize, Tensors
from sdconvert.adapters.unet_2d_condition import UNet2DConditionModelAdapter
from sdconvert.io.tensors import load_tensors
from sdconvert.memory import return_freed_memory
from sdconvert.models.config_json import read_config
from sdconvert.models.pasd import build_pasd
from sdconvert.quantize import graph
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.run import AdaRoundSettings, adaround

BITWIDTH = 4
SIZE = GraphSize(64, 64)
MIB = 1 << 20
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Samples:
    """Graph inputs, made one at a time."""

    def __init__(self, adapter: UNet2DConditionModelAdapter, count: int) -> None:
        self._adapter, self._count, self._spec = adapter, count, adapter.io_spec(SIZE)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensors]:
        return (self._adapter.dummy_inputs(self._spec, seed) for seed in range(self._count))


def grid(weight: Tensor) -> CodeGrid:
    """Symmetric, one scale per output channel, up to the largest weight."""
    return CodeGrid.symmetric_blocks(
        weight.flatten(1).abs().amax(1, keepdim=True) / (2 ** (BITWIDTH - 1) - 1), BITWIDTH
    )


def own_mib(process: str = "self") -> float:
    """Memory of a process that is no part of a file."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) / 1024


def one(folder: Path, scratch: Path, samples: int, budget_mib: int, layers: str) -> dict[str, Any]:
    """Round, and say what it took; a line when it begins."""
    unet, _ = build_on_meta(folder)
    weights = load_tensors(folder / WEIGHTS)
    unet.load_state_dict(weights, assign=True)
    adapter = UNet2DConditionModelAdapter(unet)
    data = Samples(adapter, samples)
    traced = graph.trace(adapter, next(iter(data)))
    entered = {parameter.name for parameter in graph.parameters(traced) if parameter.op in ("conv2d", "linear")}
    grids = {
        name: grid(weight)
        for name, weight in weights.items()
        if name.startswith(layers) and weight.dim() > 1 and name in entered
    }
    weights_mib = sum(weight.nbytes for weight in weights.values()) / MIB
    rounded = sum(weights[name].numel() for name in grids)
    del weights
    run_once(traced, next(iter(data)))
    return_freed_memory()
    before = own_mib()
    print("begin", flush=True)
    start, cpu = time.perf_counter(), time.process_time()

    def report(done: int, total: int, note: str) -> None:
        print(f"{time.process_time() - cpu:8.1f} CPU s, {done} of {total} groups, {note}", flush=True)

    settings = AdaRoundSettings(budget_bytes=budget_mib * MIB)
    result = adaround(traced, data, grids, settings, scratch, report=report)
    return {
        "plan": result.plan.describe(),
        "layers": len(grids),
        "rounded": rounded,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "weights_mib": weights_mib,
        "before_mib": before,
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "parts": dict(result.cpu_seconds),
        "forwards": result.forwards,
        "resumed": result.resumed,
        "sqnr_db": result.output_sqnr_db,
        "fell_back": sum(figures.fell_back for figures in result.figures.values()),
    }


@torch.no_grad()
def run_once(traced: GraphModule, inputs: Tensors) -> None:
    """What torch and its libraries keep from their first run on is the runtime's, not AdaRound's."""
    traced(*(inputs[node.name] for node in traced.graph.find_nodes(op="placeholder")))


def build_on_meta(folder: Path) -> Any:
    """The UNet, without values."""
    config = read_config(folder / "config.json")
    with torch.device("meta"):
        return build_pasd(config, {})


def watch(command: list[str]) -> tuple[dict[str, Any], float, str]:
    """Run a process; return what it printed last, the most memory of its own after it began, and its line before that.

    Lines are passed on with the most memory until the next one.
    """
    lines: list[str] = []
    most, before, where = 0.0, 0.0, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        reader = threading.Thread(target=lines.extend, args=(process.stdout,))
        reader.start()
        said = 0
        while process.poll() is None:
            time.sleep(0.02)
            if len(lines) > said:
                print(f"{lines[said].rstrip()}; at most {before:.0f} MiB until here", file=sys.stderr, flush=True)
                said, before = said + 1, 0.0
            with suppress(OSError, StopIteration):  # it has ended meanwhile
                before = max(before, own_mib(str(process.pid)))
            if before > most:
                most, where = before, lines[said - 1].split(", ")[-1].strip() if said else "the beginning"
        reader.join()
    if process.returncode:
        raise SystemExit(process.returncode)
    return json.loads(lines[-1]), most, where


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="AdaRound at the size of Stable Diffusion 1.5.")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--budget-mib", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=Path, help="folder of scripts/make_fullsize.py with its unet/")
    parser.add_argument("--layers", default="up_blocks.", help="names of the weights begin so (default: up_blocks.)")
    parser.add_argument("--scratch", type=Path, help="folder that keeps finished groups")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.one:
        folder, scratch = map(Path, given.one)
        print(json.dumps(one(folder, scratch, given.samples, given.budget_mib, given.layers)))
        return
    print(
        f"{platform.machine()}, {given.threads} of {os.cpu_count()} cores, Python {platform.python_version()}, ", end=""
    )
    print(f"torch {version('torch')}, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.weights or Path(temporary) / "fullsize"
        if not (folder / "unet" / WEIGHTS).exists():
            script = Path(__file__).parents[1] / "scripts" / "make_fullsize.py"
            subprocess.run([sys.executable, str(script), str(folder), "--graph", "unet"], check=True)
        numbers = ("--samples", given.samples, "--budget-mib", given.budget_mib, "--threads", given.threads)
        command = [sys.executable, __file__, *map(str, numbers), "--layers", given.layers, "--one"]
        found, most, where = watch([*command, str(folder / "unet"), str(given.scratch or Path(temporary) / "scratch")])
    print(found["plan"])
    print(
        f"memory: budget {given.budget_mib} MiB, taken {most - found['before_mib']:.0f} MiB (at `{where}`); "
        f"before it began {found['before_mib']:.0f} MiB; weights, mapped, {found['weights_mib']:.0f} MiB"
    )
    print(f"time: {found['cpu_s']:.0f} CPU s, {found['wall_s']:.0f} s; CPU s by part: ", end="")
    print(", ".join(f"{name} {seconds:.0f}" for name, seconds in found["parts"].items()))
    print(
        f"{found['resumed']} groups were there; {found['layers']} layers, "
        f"{found['rounded'] / 1e6:.0f} of {found['parameters'] / 1e6:.0f} million parameters"
        f", {found['forwards']:.1f} forwards, {found['fell_back']} layers as nearest, "
        f"output SQNR {found['sqnr_db']:.2f} dB, load at the end {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
