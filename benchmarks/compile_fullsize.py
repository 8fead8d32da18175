"""PASD at the size of Stable Diffusion 1.5 as a context for the HTP: does it fit, and what does it take.

python benchmarks/compile_fullsize.py [--graph unet] [--latent 64] [--soc SM8650] [--channels 320 640 1280 1280]
    [--weights FOLDER] [--out FOLDER]

Weights of `scripts/make_fullsize.py`, attention per head with all rewrites, W8A16, ranges from one random sample. Two
processes: one quantizes and exports, the other is the compiler. Each says its CPU seconds and its peak memory. Nothing
is simulated: a UNet of this size takes the simulator hours.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch

from sdconvert.adapters import GraphSize, ModelAdapter, adapter_for
from sdconvert.export.compiler_graph import graph_for_compiler
from sdconvert.io.tensors import load_tensors
from sdconvert.memory import return_freed_memory
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.config_json import read_config
from sdconvert.models.pasd import build_pasd
from sdconvert.models.rewrites import REWRITES, apply_rewrites
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.nodes import read_nodes
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

MIB = 1 << 20
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_fullsize.py"


def export(graph: str, folder: Path, latent: int, soc: str, path: Path) -> dict[str, Any]:
    """Quantize and export; return CPU seconds by step, and the peak of memory in MiB."""
    seconds: dict[str, float] = {}
    last = time.process_time()

    def step(name: str) -> None:
        nonlocal last
        now = time.process_time()
        seconds[name], last = now - last, now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{name}: {seconds[name]:.0f} CPU s, peak until now {peak:.0f} MiB", file=sys.stderr, flush=True)

    adapter = build(graph, folder)
    step("build")
    example = adapter.dummy_inputs(adapter.io_spec(GraphSize(latent, latent)), 0)
    simulation = Simulation(adapter, example, load_settings({find_soc(soc).arch}))
    step("trace")
    simulation.calibrate([example])
    return_freed_memory()
    step("ranges")
    model = graph_for_compiler(simulation, example)
    step("export")
    onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    step("save")
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def build(graph: str, folder: Path) -> ModelAdapter:
    """The model with its weights mapped from their file, per head and rewritten."""
    config = read_config(folder / "config.json")
    with torch.device("meta"):
        unet, controlnet = build_pasd(*((config, {}) if graph == "unet" else ({}, config)))
    model = unet if graph == "unet" else controlnet
    model.load_state_dict(load_tensors(folder / WEIGHTS), assign=True)
    SHAAttentionPatch.wrap_model("sha", model).fuse()
    apply_rewrites(model, REWRITES)
    return adapter_for(model.eval().requires_grad_(False))


def run_export(given: argparse.Namespace, folder: Path, path: Path) -> dict[str, Any]:
    """Do `export` in a process of its own; what an earlier run left with `--out` is taken."""
    figures = path.with_suffix(".json")
    if path.exists() and figures.exists():
        return dict(json.loads(figures.read_text()))
    arguments = [given.graph, str(folder), str(given.latent), given.soc, str(path)]
    command = [sys.executable, __file__, "--export", *arguments]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures.write_text(text)
    return dict(json.loads(text))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="A full-size graph, compiled for the HTP.")
    parser.add_argument("--graph", choices=("unet", "controlnet"), default="unet")
    parser.add_argument("--latent", type=int, default=64, help="64 for 512 pixels, 96 for 768")
    parser.add_argument("--soc", default="SM8650")
    parser.add_argument("--channels", type=int, nargs=4, default=[320, 640, 1280, 1280])
    parser.add_argument("--weights", type=Path, help="folder of scripts/make_fullsize.py with the graph's folder")
    parser.add_argument("--out", type=Path, help="folder that keeps the files")
    parser.add_argument("--export", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.export:
        graph, folder, latent, soc, path = given.export
        print(json.dumps(export(graph, Path(folder), int(latent), soc, Path(path))))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as temporary:
        weights = given.weights or Path(temporary) / "fullsize"
        if not (weights / given.graph / WEIGHTS).exists():
            channels = ["--channels", *map(str, given.channels)]
            subprocess.run([sys.executable, str(SCRIPT), str(weights), "--graph", given.graph, *channels], check=True)
        out = given.out or Path(temporary) / "out"
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{given.graph}.onnx"
        exported = run_export(given, weights / given.graph, path)
        compile_and_print(given, exported, path)


def compile_and_print(given: argparse.Namespace, exported: dict[str, Any], path: Path) -> None:
    """Compile, and say what both processes took."""
    steps = ", ".join(f"{name} {seconds:.0f}" for name, seconds in exported["seconds"].items())
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / MIB
    print(f"export: CPU s {steps}; peak {exported['peak_mib']:.0f} MiB; ONNX {size:.0f} MiB", flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    context = compile_context(path, path.parent, find_soc(given.soc))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"compile for {given.soc}: {cpu:.0f} CPU s, {context.seconds:.0f} s, peak {context.peak_rss_bytes / MIB:.0f} "
        f"MiB; context {context.bin.stat().st_size / MIB:.0f} MiB, {context.cpu_nodes} nodes on the CPU"
    )
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in context.phases.items()))
    print(", ".join(f"{count} {kind}" for kind, count in sorted(read_nodes(context.bin).items(), key=lambda x: -x[1])))


if __name__ == "__main__":
    main()
