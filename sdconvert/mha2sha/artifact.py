"""What the mha2sha stage leaves: SHA weights and ranges, and the simulation made of both."""

from dataclasses import dataclass
from pathlib import Path

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.artifacts import read_json
from sdconvert.errors import CheckpointError
from sdconvert.io.tensors import load_tensors
from sdconvert.mha2sha.name_map import NameMap
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.rewrites import apply_rewrites
from sdconvert.quantize.artifact import QuantizerSettings, Simulation, load_simulation

GRAPHS = ("controlnet", "unet")
HEAD_RANGES = "head_ranges.json"
AGREEMENT = "sha_vs_mha.json"


@dataclass(frozen=True)
class Mha2ShaArtifact:
    """The stage's folder."""

    folder: Path

    def graph_folder(self, graph: str) -> Path:
        """Holds `state_dict_sha.safetensors`, `parameters_sha.encodings` and `<graph>.encodings`."""
        return self.folder / graph

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
        self.rewrite(graph, adapter)
        return load_simulation(self.graph_folder(graph) / f"{graph}.encodings", adapter, example, settings)

    def rewrite(self, graph: str, adapter: ModelAdapter) -> None:
        """Turn a model's attention into SHA, do the graph's other rewrites, and load the stage's weights, strictly.

        Raises:
            CheckpointError: As `simulation`; the model keeps its own weights.
        """
        name_map = NameMap.load(self.graph_folder(graph))
        SHAAttentionPatch.wrap_model("sha", adapter.model, fold_scale=bool(name_map.folded)).fuse()
        apply_rewrites(adapter.model, name_map.rewrites)
        weights = load_tensors(self.graph_folder(graph) / "state_dict_sha.safetensors")
        expected, found = (
            {(name, tensor.shape) for name, tensor in state.items()} for state in (adapter.model.state_dict(), weights)
        )
        if odd := sorted({name for name, _ in expected ^ found}):
            raise CheckpointError(
                f"the SHA weights of {graph} do not fit the rewritten model: {len(odd)} tensors, {', '.join(odd[:5])}",
                hint="convert the folder again, with the heads of this model",
            )
        adapter.model.load_state_dict(weights)
