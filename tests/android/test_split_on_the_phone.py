"""A UNet in two parts behind adb: five graphs of the road on small latents, packaged, drawn on the rig's phone, scored.

What has to come back was computed without `sdconvert.android`: the pipeline's own sampling over `qnn`'s chain. Six
minutes of one core, half of it for the UNet's export.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import ModelProto
from small_loop import NAMES, SMALL
from torch import Tensor

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.android.bundle import Sample, write_bundle
from sdconvert.android.loop_files import Loop, LoopStep
from sdconvert.android.manifest import ChainRecord
from sdconvert.android.run import scheduler_record
from sdconvert.assets import asset_path
from sdconvert.export.blocks import cut_into_blocks
from sdconvert.export.compiler_graph import graph_for_compiler
from sdconvert.export.parts import Part, cut_into_parts, part_answers
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.rewrites import apply_rewrites
from sdconvert.pipelines.backend import graph_adapters, swap_backends
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.response import predicted_noise
from sdconvert.qnn.chain import Chain, Runner
from sdconvert.qnn.context import Context, compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

ROOT = Path(__file__).parents[2]
SOC = find_soc("SM8650")
ARGUMENTS = SMALL | {"num_inference_steps": 2, "guidance_scale": 1.0}


class Calls:
    """What a pipeline asked of each graph."""

    def __init__(self, adapters: dict[str, ModelAdapter]) -> None:
        self._adapters, self.of = adapters, dict[str, list[Tensors]]()

    def record(self, component: str, inputs: dict[str, Any], **_: Any) -> None:
        self.of.setdefault(component, []).append(self._adapters[component].pack(inputs))


@dataclass
class Road:
    """Graphs, quantized, compiled and simulated, as the stages do it; the UNet in two parts."""

    folder: Path
    contexts: list[Context] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    runners: dict[str, Runner] = field(default_factory=dict)
    parts: list[Part] = field(default_factory=list)

    def take(self, graph: str, adapter: ModelAdapter, calls: list[Tensors]) -> None:
        fp32 = adapter.run(calls[0])
        SHAAttentionPatch.wrap_model("sha", adapter.model).fuse()
        apply_rewrites(adapter.model)
        simulation = Simulation(adapter, calls[0], load_settings({SOC.arch}))
        simulation.calibrate(calls)
        model = graph_for_compiler(simulation, calls[0])
        if graph != "unet":
            self.runners[graph] = self._compile(graph, model, calls[0], fp32)
            return
        blocks = cut_into_blocks(model, adapter.block_paths())
        cuts = cut_into_parts(model, graph, blocks, ["up_blocks.1"])
        self.parts = [part for part, _ in cuts]
        leaving = simulation.boundary_tensors(calls[0], [key for part in self.parts for key in part.outputs.values()])
        given = {part.name: part_answers(part, calls[0], leaving) for part in self.parts}
        runners = {part.name: self._compile(part.name, cut, *given[part.name][:2]) for part, cut in cuts}
        self.runners[graph] = Chain(self.parts, runners, list(fp32))

    def _compile(self, name: str, model: ModelProto, inputs: Tensors, fp32: Tensors) -> Simulator:
        path = self.folder / f"{name}.onnx"
        onnx.save(model, str(path))
        self.contexts.append(compile_context(path, self.folder / SOC.name, SOC))
        simulator = Simulator(self.contexts[-1].ctx_onnx)
        self.samples.append(Sample(f"{name}-0", name, inputs, fp32, {SOC.name: simulator(inputs)}))
        return simulator


@torch.no_grad()
def write_split_bundle(folder: Path) -> Path:
    pipe = PASDPipeline.from_pretrained(asset_path("pasd_tiny"))
    adapters = graph_adapters(pipe, ARGUMENTS["conditioning_scale"])
    calls, road = Calls(adapters), Road(folder)
    pictures: dict[str, dict[str, Tensor]] = {}
    for index, name in enumerate(NAMES):
        low = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(index))
        pictures[name] = {"low_resolution": low, "fp32": pipe(low, **ARGUMENTS, observer=calls)}
    first = calls.of["controlnet"][: ARGUMENTS["num_inference_steps"]]
    fp32 = {graph: adapters[graph].run for graph in ("controlnet", "unet")}
    noise = [predicted_noise(fp32, call) for call in first]
    for graph, adapter in adapters.items():
        road.take(graph, adapter, calls.of[graph])
    swap_backends(pipe, adapters, road.runners)
    for picture in pictures.values():
        picture["simulator"] = pipe(picture["low_resolution"], **ARGUMENTS)
    steps = [
        LoopStep(step, call, one, predicted_noise(road.runners, call))
        for step, (call, one) in enumerate(zip(first, noise, strict=True))
    ]
    write_bundle(
        folder / "bundle",
        model="split-test",
        contexts=road.contexts,
        samples=road.samples,
        chains=[ChainRecord(name="unet", parts=tuple(part.name for part in road.parts), outputs=("out_sample",))],
        scheduler=scheduler_record(pipe.scheduler, ARGUMENTS["num_inference_steps"]),
        metrics={},
        loop=Loop(asset_path("pasd_tiny"), ARGUMENTS, SOC.name, pictures, {NAMES[0]: steps}),
    )
    return folder / "bundle"


@pytest.mark.slow
def test_a_split_unet_draws_behind_adb_what_the_simulator_draws(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/bench_sim.py", str(write_split_bundle(tmp_path))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/android'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr
    graphs = "text_encoder 1, vae_encoder 1, controlnet 2, unet_1 2, unet_2 2, vae_decoder 1"
    assert f"Starts of the runner: {graphs}." in done.stdout
    compared = done.stdout.splitlines()[-1]
    assert compared.startswith("bit-equal to what was recorded when the bundle was written: ")
    wanted = ("unet_1:", "unet_2:out_sample", *(f"picture {name}" for name in NAMES), "step 0, step 1")
    assert [part for part in wanted if part not in compared] == []
