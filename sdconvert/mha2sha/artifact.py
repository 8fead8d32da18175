"""What the mha2sha stage leaves: SHA weights and ranges, and the simulation made of both."""

from dataclasses import dataclass
from pathlib import Path

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.io.tensors import load_tensors
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.quantize.artifact import Simulation, load_simulation
from sdconvert.quantize.settings import QuantizerSettings

GRAPHS = ("controlnet", "unet")


@dataclass(frozen=True)
class Mha2ShaArtifact:
    """The stage's folder."""

    folder: Path

    def graph_folder(self, graph: str) -> Path:
        """Holds `state_dict_sha.safetensors`, `parameters_sha.encodings` and `<graph>.encodings`."""
        return self.folder / graph

    def simulation(
        self, graph: str, adapter: ModelAdapter, example: Tensors, settings: QuantizerSettings
    ) -> Simulation:
        """Build the quantized SHA graph of a model, whose attention is rewritten in place.

        Raises:
            CheckpointError: The SHA weights do not fit the rewritten model exactly.
        """
        self.rewrite(graph, adapter)
        return load_simulation(self.graph_folder(graph) / f"{graph}.encodings", adapter, example, settings)

    def rewrite(self, graph: str, adapter: ModelAdapter) -> None:
        """Turn a model's attention into SHA and load the stage's weights, strictly."""
        for patch in SHAAttentionPatch.wrap_model("sha", adapter.model).values():
            patch.fuse()
        adapter.model.load_state_dict(load_tensors(self.graph_folder(graph) / "state_dict_sha.safetensors"))
