"""`manifest.json` of a bundle: what is in it, for which SoCs, and what the graphs must answer."""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, StringConstraints, model_validator

NAME = r"[A-Za-z0-9_]+"
"""Graph and tensor names: the runners rewrite any other character, and then find no file under the name."""
SAMPLE_ID = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
BUNDLE_PATH = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*"
"""A file's path in the bundle: it cannot lead out of it, hide, or mean anything to a shell."""

Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
SampleId = Annotated[str, StringConstraints(pattern=f"^{SAMPLE_ID}$")]
BundlePath = Annotated[str, StringConstraints(pattern=f"^{BUNDLE_PATH}$")]
Role = Literal["context", "epcontext", "input", "input_list", "expected_fp32", "expected_sim", "loop"]
LOOP = "loop"
"""Folder of what stays on this computer, for drawing pictures with the graphs."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SocRecord(_Record):
    """A SoC as read back from the contexts compiled for it; `name` is what the user asked for."""

    name: Name
    soc_model: int
    soc_type: str
    arch: int
    min_arch: int
    vtcm_mb: int
    hvx_threads: int


class TensorRecord(_Record):
    """One graph input or output: raw float32, or int32 for token ids, little endian, NCHW."""

    name: Name
    dtype: Literal["float32", "int32"]
    shape: tuple[int, ...]


class GraphRecord(_Record):
    """One graph compiled for one SoC; `context` and `epcontext` are paths in the bundle."""

    name: Name
    soc: Name
    context: str
    epcontext: str
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]


class ChainRecord(_Record):
    """A model in several graphs, which run one after another; a tensor has the same name in all of them."""

    name: Name
    parts: tuple[Name, ...]
    outputs: tuple[Name, ...]
    """Of the model; each is an output of one of the parts."""


class SampleRecord(_Record):
    """One test input of one graph."""

    id: SampleId
    graph: Name


class LoopRecord(_Record):
    """What it takes to draw pictures with the graphs; files lie in `loop/` (loop_files.py)."""

    arguments: dict[str, Any]
    """Of a call of the pipeline, beside the picture."""
    simulated_soc: Name
    """The SoC whose contexts drew the simulator's pictures."""
    pictures: tuple[SampleId, ...]
    steps: tuple[SampleId, ...]
    """Those of the pictures whose single steps are there too."""

    def paths(self) -> list[str]:
        """Return the files of all pictures."""
        kinds = {"pictures": self.pictures, "steps": self.steps}
        return [f"{LOOP}/{kind}/{name}.safetensors" for kind, names in kinds.items() for name in names]


class FileRecord(_Record):
    """Checksum and size of one file, and what it is there for."""

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    bytes: int
    role: Role


class Manifest(_Record):
    """The bundle's table of contents; `files` lists every file but the manifest and `sums.txt`."""

    schema_version: Literal[1] = 1
    model: str
    qairt: str
    """Build of the compiler; the device's runtime must not be older."""
    socs: tuple[SocRecord, ...]
    graphs: tuple[GraphRecord, ...]
    chains: tuple[ChainRecord, ...] = ()
    """Models in several graphs."""
    scheduler: dict[str, Any]
    """The sampler that calls the graphs: class, configuration, and as `table` a `SchedulerSpec`, all a loop needs."""
    samples: tuple[SampleRecord, ...]
    loop: LoopRecord | None = None
    """What a device's own pictures take; nothing if the graphs cannot sample."""
    metrics: dict[str, Any]
    """Figures expected of the graphs, as measured before shipping."""
    files: dict[BundlePath, FileRecord]

    def models(self) -> set[str]:
        """Names of what a pipeline calls: graphs, and models in several graphs."""
        parts = {part for chain in self.chains for part in chain.parts}
        return {graph.name for graph in self.graphs} - parts | {chain.name for chain in self.chains}

    def parts_of(self, model: str) -> tuple[str, ...]:
        """Names of the graphs that a model is in, in the order in which they run."""
        return next((chain.parts for chain in self.chains if chain.name == model), (model,))

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        socs, graphs = {soc.name for soc in self.socs}, {graph.name for graph in self.graphs}
        loose = [f"soc {graph.soc}" for graph in self.graphs if graph.soc not in socs]
        loose += [f"file {path}" for g in self.graphs for path in (g.context, g.epcontext) if path not in self.files]
        loose += [f"graph {sample.graph}" for sample in self.samples if sample.graph not in graphs]
        loose += [f"graph {part}" for chain in self.chains for part in chain.parts if part not in graphs]
        made = {(graph.name, tensor.name) for graph in self.graphs for tensor in graph.outputs}
        for chain in self.chains:
            loose += [f"tensor {name}" for name in chain.outputs if not made & {(one, name) for one in chain.parts}]
        if self.loop:
            loose += [f"file {path}" for path in self.loop.paths() if path not in self.files]
            loose += [f"soc {self.loop.simulated_soc}"] if self.loop.simulated_soc not in socs else []
        if loose:
            raise ValueError(f"refers to what it does not list: {', '.join(loose)}")
        return self


def input_list(inputs: Iterable[str], ids: Iterable[str]) -> str:
    """Return what `input_list_<graph>.txt` says: one line per sample, in qnn-net-run's format."""
    return "".join(" ".join(f"{name}:=inputs/{one}/{name}.raw" for name in inputs) + "\n" for one in ids)
