"""What the export stage leaves: one ONNX file per graph."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdconvert.adapters import Tensors
from sdconvert.export.runner import OnnxRunner
from sdconvert.io.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class ExportArtifact:
    """The stage's folder."""

    folder: Path

    def onnx(self, graph: str) -> Path:
        """The Q/DQ graph."""
        return self.folder / f"{graph}.onnx"

    def graphs(self) -> list[str]:
        """Names of the graphs, in the order in which a picture needs them."""
        names: list[str] = list(json.loads((self.folder / "nodes.json").read_text(encoding="utf-8")))
        return names

    def answers(self, graph: str) -> list[tuple[Tensors, Tensors, Tensors]]:
        """Held-out inputs of a graph, with fp32's and the simulation's outputs."""
        flat = load_tensors(self.folder / f"{graph}.answers.safetensors")
        count = 1 + max(int(key.partition("/")[0]) for key in flat)
        parts = ("inputs", "fp32", "simulation")
        return [tuple(_below(flat, f"{index}/{part}/") for part in parts) for index in range(count)]  # type: ignore[misc]

    def write_answers(self, graph: str, answers: Sequence[tuple[Tensors, Tensors, Tensors]]) -> None:
        """Keep what `answers` returns."""
        flat = {
            f"{index}/{part}/{name}": tensor
            for index, answer in enumerate(answers)
            for part, tensors in zip(("inputs", "fp32", "simulation"), answer, strict=True)
            for name, tensor in tensors.items()
        }
        save_tensors(flat, self.folder / f"{graph}.answers.safetensors")

    def runner(self, graph: str) -> OnnxRunner:
        """The graph in ONNX Runtime."""
        return OnnxRunner(self.onnx(graph))


def _below(flat: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in flat.items() if key.startswith(prefix)}
