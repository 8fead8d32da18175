"""What the export stage leaves: one ONNX file per graph."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdconvert.adapters import Tensors
from sdconvert.export.runner import OnnxRunner
from sdconvert.io.tensors import flatten, load_tensors, save_tensors, unflatten

_PARTS = ("inputs", "fp32", "simulation")


@dataclass(frozen=True)
class ExportArtifact:
    """The stage's folder."""

    folder: Path

    def onnx(self, graph: str) -> Path:
        """The Q/DQ graph."""
        return self.folder / f"{graph}.onnx"

    def graph_bytes(self, graph: str) -> int:
        """Size of the graph, weights included."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{graph}.onnx*"))

    def graphs(self) -> list[str]:
        """Names of the graphs, in the order in which a picture needs them."""
        names: list[str] = list(json.loads((self.folder / "nodes.json").read_text(encoding="utf-8")))
        return names

    def answers(self, graph: str) -> list[tuple[Tensors, Tensors, Tensors]]:
        """Held-out inputs of a graph, with fp32's and the simulation's outputs."""
        flat = unflatten(load_tensors(self.folder / f"{graph}.answers.safetensors"))
        return [(_below(one, "inputs/"), _below(one, "fp32/"), _below(one, "simulation/")) for one in flat]

    def write_answers(self, graph: str, answers: Sequence[tuple[Tensors, Tensors, Tensors]]) -> None:
        """Keep what `answers` returns."""
        named = [
            {
                f"{part}/{name}": tensor
                for part, tensors in zip(_PARTS, answer, strict=True)
                for name, tensor in tensors.items()
            }
            for answer in answers
        ]
        save_tensors(flatten(named), self.folder / f"{graph}.answers.safetensors")

    def runner(self, graph: str) -> OnnxRunner:
        """The graph in ONNX Runtime."""
        return OnnxRunner(self.onnx(graph))


def _below(flat: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in flat.items() if key.startswith(prefix)}
