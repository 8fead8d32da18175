"""What the quantize stage leaves: per graph, weights, ranges and the simulation made of both."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.io.encodings import read_encodings, write_encodings
from sdconvert.io.files import read_json
from sdconvert.io.tensors import load_tensors
from sdconvert.quantize.files import from_sections, to_sections
from sdconvert.quantize.graph import SECOND
from sdconvert.quantize.grid import WeightGrid
from sdconvert.quantize.mixed_precision import Choice, frontier, read_sensitivity
from sdconvert.quantize.settings import QuantizerSettings, settings_of
from sdconvert.quantize.simulation import BoundaryTensor, Encodings, Simulation

__all__ = [
    "SECOND",
    "BoundaryTensor",
    "Choice",
    "Encodings",
    "QuantizeArtifact",
    "QuantizerSettings",
    "Simulation",
    "WeightGrid",
    "load_simulation",
    "save_simulation",
    "size_against_quality",
]

ADAROUND = "adaround.json"
_WEIGHTS = "state_dict_mha.safetensors"


@dataclass(frozen=True)
class QuantizeArtifact:
    """The stage's folder."""

    folder: Path

    def graph_folder(self, graph: str) -> Path:
        """Holds `state_dict_mha.safetensors`, `parameters_mha.encodings`, `<graph>.encodings` and `config.json`."""
        return self.folder / graph

    def settings(self) -> QuantizerSettings:
        """Bit-widths and symmetry that the ranges were taken with."""
        return QuantizerSettings.model_validate_json((self.folder / "settings.json").read_text(encoding="utf-8"))

    def weight_bytes(self) -> dict[str, int]:
        """Size of every graph's weights, in floating point."""
        return {path.parent.name: path.stat().st_size for path in self.folder.glob(f"*/{_WEIGHTS}")}

    def load_weights(self, graph: str, adapter: ModelAdapter) -> None:
        """Put the stage's weights, which AdaRound may have rounded, into a model."""
        adapter.model.load_state_dict(load_tensors(self.graph_folder(graph) / _WEIGHTS))

    def layer_sqnr_db(self, graph: str) -> dict[str, float]:
        """SQNR of every stored tensor against fp32, by key in execution order."""
        figures: dict[str, float] = read_json(self.graph_folder(graph) / "layer_sqnr_db.json")
        return figures

    def adaround(self, graph: str) -> dict[str, Any]:
        """What AdaRound did to a graph's layers; empty where weights were rounded to nearest."""
        path = self.graph_folder(graph) / ADAROUND
        content: dict[str, Any] = read_json(path) if path.is_file() else {}
        return content

    def pictures(self) -> dict[str, dict[str, Tensor]]:
        """Every held-out crop by name, (3, H, W) in [0, 1]: `quantized`, and before AdaRound `nearest`."""
        return {path.stem: load_tensors(path) for path in sorted((self.folder / "pictures").glob("*.safetensors"))}

    def simulation(self, graph: str, adapter: ModelAdapter, example: Tensors) -> Simulation:
        """Build the quantized MHA graph of a model, which gets the stage's weights, with the stage's ranges."""
        self.load_weights(graph, adapter)
        return load_simulation(self.graph_folder(graph) / f"{graph}.encodings", adapter, example, self.settings())


def size_against_quality(sensitivity: Path) -> list[Choice]:
    """Every choice of bit-widths that figures of `sdconvert quantize sensitivity` allow, from the largest model on.

    Raises:
        PreconditionError: There are no figures.
        UsageError: They are of one bit-width only.
    """
    return frontier(read_sensitivity(sensitivity))


def load_simulation(
    encodings: Path, adapter: ModelAdapter, example: Tensors, settings: QuantizerSettings | None = None
) -> Simulation:
    """Trace a model and set its quantizers from a file, which also says how many bits and which blocks weights have.

    Args:
        encodings: The file.
        adapter: Covers the model.
        example: One set of graph inputs.
        settings: That the ranges were taken with; None: what the file's grids tell of them.

    Raises:
        EncodingsError: The file does not fit the graph exactly.
    """
    sections: dict[str, Any] = read_encodings(encodings)
    parameters = sections["param_encodings"]
    simulation = Simulation(adapter, example, settings or settings_of(parameters), parameters)
    simulation.load(from_sections(sections, simulation))
    return simulation


def save_simulation(simulation: Simulation, encodings: Path) -> None:
    """Write the ranges of a simulation as the file that `load_simulation` reads."""
    write_encodings(encodings, to_sections(simulation))
