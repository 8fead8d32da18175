"""What the mha2sha stage leaves: SHA weights and ranges, and the simulation made of both."""

from dataclasses import dataclass
from pathlib import Path

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.io.files import read_json
from sdconvert.mha2sha.forms import rewrite_to_sha
from sdconvert.mha2sha.name_map import NAME
from sdconvert.quantize.artifact import QuantizerSettings, Simulation, load_simulation

HEAD_RANGES = "head_ranges.json"
AGREEMENT = "sha_vs_mha.json"


@dataclass(frozen=True)
class Mha2ShaArtifact:
    """The stage's folder."""

    folder: Path

    def graph_folder(self, graph: str) -> Path:
        """Holds `state_dict_sha.safetensors`, `parameters_sha.encodings` and `<graph>.encodings`."""
        return self.folder / graph

    def graphs(self) -> list[str]:
        """Names of the graphs that have attention, which is per head now."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{NAME}"))

    def head_ranges(self, graph: str) -> dict[str, dict[str, float]]:
        """SQNR per attention layer and at the output, with inherited and with own ranges; empty if none were taken."""
        path = self.graph_folder(graph) / HEAD_RANGES
        figures: dict[str, dict[str, float]] = read_json(path) if path.is_file() else {}
        return figures

    def simulation(
        self, graph: str, adapter: ModelAdapter, example: Tensors, settings: QuantizerSettings
    ) -> Simulation:
        """Build the quantized SHA graph of a model, whose attention is rewritten in place.

        Raises:
            CheckpointError: The SHA weights do not fit the rewritten model exactly.
        """
        rewrite_to_sha(adapter, self.graph_folder(graph))
        return load_simulation(self.graph_folder(graph) / f"{graph}.encodings", adapter, example, settings)
