"""The five graphs of the embedded model as its road exports them, quantized for a generation of the NPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.assets import asset_path
from sdconvert.export.compiler_graph import graph_for_compiler
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.rewrites import apply_rewrites
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation

LATENT = 32  # of the recipe


@dataclass(frozen=True)
class Exported:
    """A graph's file, an input of it, and what the quantized model answers."""

    onnx: Path
    inputs: Tensors
    simulated: Tensors


class PasdTiny:
    """The model with attention per head, and one input of each of its graphs, drawn in one step."""

    def __init__(self) -> None:
        pipe = PASDPipeline.from_pretrained(asset_path("pasd_tiny"))
        self._adapters: Mapping[str, ModelAdapter] = graph_adapters(pipe, 1.0)
        self._inputs: dict[str, Tensors] = {}
        side = LATENT * pipe.vae_scale_factor // 4
        image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
        pipe(image, prompt="a cat", num_inference_steps=1, latent_tile=LATENT, latent_overlap=8, observer=self)
        for adapter in self._adapters.values():
            SHAAttentionPatch.wrap_model("sha", adapter.model).fuse()
            apply_rewrites(adapter.model)

    def record(self, component: str, inputs: dict[str, Any], **_: Any) -> None:
        """Observe the pipeline."""
        self._inputs[component] = self._adapters[component].pack(inputs)

    def export(self, arch: int, folder: Path) -> dict[str, Exported]:
        """Write every graph as v`arch` gets it, into a folder; ranges are of the one input."""
        found = {}
        for graph, adapter in self._adapters.items():
            inputs, path = self._inputs[graph], folder / f"{graph}.onnx"
            simulation = Simulation(adapter, inputs, load_settings({arch}))
            simulation.calibrate([inputs])
            onnx.save(graph_for_compiler(simulation, inputs), str(path))
            found[graph] = Exported(path, inputs, simulation(inputs))
        return found
