"""What the export stage leaves: one ONNX file per graph, its answers, and what its blocks hand on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sdconvert.adapters import Tensors
from sdconvert.export.blocks import Block
from sdconvert.export.io_manifest import GraphTensor
from sdconvert.export.origin import Origin, key_of, nearest_sources, origins
from sdconvert.export.parts import Part
from sdconvert.export.runner import OnnxRunner
from sdconvert.io.files import read_json, write_json_atomic
from sdconvert.io.tensors import flatten, load_tensors, save_tensors, unflatten

if TYPE_CHECKING:  # AIMET comes with it, and who reads what an export left has no need of that
    from sdconvert.quantize.artifact import BoundaryTensor

__all__ = [
    "Block",
    "ExportArtifact",
    "GraphTensor",
    "OnnxRunner",
    "Origin",
    "Part",
    "key_of",
    "nearest_sources",
    "origins",
]

_PARTS = ("inputs", "fp32", "simulation")


@dataclass(frozen=True)
class ExportArtifact:
    """The stage's folder."""

    folder: Path

    def onnx(self, graph: str) -> Path:
        """The Q/DQ graph, or a part of one."""
        return self.folder / f"{graph}.onnx"

    def graph_bytes(self, graph: str) -> int:
        """Size of the graph, weights included."""
        return sum(path.stat().st_size for path in self.folder.glob(f"{graph}.onnx*"))

    def graphs(self) -> list[str]:
        """Names of the graphs, in the order in which a picture needs them."""
        names: list[str] = list(json.loads((self.folder / "nodes.json").read_text(encoding="utf-8")))
        return names

    def parts(self, graph: str) -> list[Part]:
        """The parts that a graph is compiled in, in execution order; none where it is compiled whole."""
        path = self.folder / f"{graph}.parts.json"
        return [Part(**one | {"blocks": tuple(one["blocks"])}) for one in read_json(path)] if path.is_file() else []

    def write_parts(self, graph: str, parts: Sequence[Part]) -> None:
        """Keep what `parts` returns."""
        write_json_atomic([asdict(part) for part in parts], self.folder / f"{graph}.parts.json")

    def compiled_graphs(self) -> list[str]:
        """Names of what gets a context of its own: the graphs, and in place of those that are split their parts."""
        return [name for graph in self.graphs() for name in ([part.name for part in self.parts(graph)] or [graph])]

    def answers(self, graph: str) -> list[tuple[Tensors, Tensors, Tensors]]:
        """Held-out inputs of a graph or of a part, with fp32's and the simulation's outputs."""
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

    def io(self, graph: str) -> list[GraphTensor]:
        """Inputs and outputs of the graph, in its order."""
        records = read_json(self.folder / f"{graph}.io.json")
        return [GraphTensor(**record | {"shape": tuple(record["shape"])}) for record in records]

    def write_io(self, graph: str, tensors: Sequence[GraphTensor]) -> None:
        """Keep what `io` returns."""
        write_json_atomic([asdict(tensor) for tensor in tensors], self.folder / f"{graph}.io.json")

    def blocks(self, graph: str) -> list[Block]:
        """The graph cut at the model's blocks, in execution order."""
        return [Block(**one) for one in read_json(self.folder / f"{graph}.blocks.json")]

    def boundaries(self, graph: str) -> dict[str, Tensors]:
        """What the tensors between blocks hold for the first held-out inputs, by key.

        Returns:
            `simulated`: in the quantized graph. `fp32`: without quantizers. `fp32_block`: what a block makes in fp32 of
            the quantized graph's tensors.
        """
        flat = load_tensors(self.folder / f"{graph}.blocks.safetensors")
        return {part: _below(flat, f"{part}/") for part in ("simulated", "fp32", "fp32_block")}

    def write_blocks(self, graph: str, blocks: Sequence[Block], boundaries: "Mapping[str, BoundaryTensor]") -> None:
        """Keep what `blocks` and `boundaries` return."""
        write_json_atomic([asdict(block) for block in blocks], self.folder / f"{graph}.blocks.json")
        flat = {f"{part}/{key}": getattr(one, part) for key, one in boundaries.items() for part in vars(one)}
        save_tensors(flat, self.folder / f"{graph}.blocks.safetensors")

    def runner(self, graph: str) -> OnnxRunner:
        """The graph in ONNX Runtime."""
        return OnnxRunner(self.onnx(graph))


def _below(flat: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in flat.items() if key.startswith(prefix)}
