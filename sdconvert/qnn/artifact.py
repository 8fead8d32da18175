"""What the qnn stage leaves for later stages: contexts by graph and SoC, and the figures measured on them.

`qnn.json` at the root of the folder lists them; paths in it are relative, so the folder may move.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.errors import PreconditionError
from sdconvert.io.files import read_json, write_json_atomic
from sdconvert.io.tensors import load_tensors, unflatten
from sdconvert.qnn.context import Context, TensorSpec
from sdconvert.qnn.info import ContextInfo, check_context_info, parse_context_info
from sdconvert.soc import Soc, find_soc

__all__ = [
    "Context",
    "ContextInfo",
    "QnnArtifact",
    "Soc",
    "TensorSpec",
    "check_context_info",
    "find_soc",
    "parse_context_info",
]

SIMULATED = ".simulated.safetensors"
"""Behind a graph's name: the file with the simulator's answers, beside the contexts."""
_FILE = "qnn.json"


class QnnArtifact:
    """The contexts and figures in a folder of the qnn stage.

    Raises:
        PreconditionError: The folder holds no `qnn.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / _FILE).is_file():
            raise PreconditionError(f"`{folder}` holds no compiled contexts", hint="make them with `sdconvert compile`")

    @classmethod
    def write(cls, folder: Path, contexts: Iterable[Context], figures: Mapping[str, Any]) -> "QnnArtifact":
        """Record contexts, whose files lie under `folder`, and JSON-able figures measured on them."""
        records = [context_record(context, folder) for context in contexts]
        write_json_atomic({"contexts": records, "figures": dict(figures)}, folder / _FILE)
        return cls(folder)

    @cached_property
    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = read_json(self.folder / _FILE)
        return content

    @property
    def figures(self) -> dict[str, Any]:
        """What the stage measured, as it wrote it."""
        figures: dict[str, Any] = self._content["figures"]
        return figures

    def simulated(self, graph: str, soc: str) -> list[dict[str, Tensor]]:
        """What a context answered in the simulator to the held-out inputs of the export stage, in their order."""
        return unflatten(load_tensors(self.folder / soc / f"{graph}{SIMULATED}"))

    def pictures(self) -> dict[str, Tensor]:
        """One tile of every held-out photograph as the simulator draws it, by the calibration stage's names."""
        files = sorted((self.folder / "pictures").glob("*.safetensors"))
        return {path.stem: load_tensors(path)["simulator"] for path in files}

    def steps(self) -> dict[str, list[dict[str, Tensor]]]:
        """The noise predicted in every step that fp32 took with a held-out tile: `fp32` and `simulator`, each (1, …).

        By the tile's name; the steps follow the calibration stage's calls of the ControlNet for it.
        """
        files = sorted((self.folder / "steps").glob("*.safetensors"))
        return {path.stem: unflatten(load_tensors(path)) for path in files}

    @cached_property
    def contexts(self) -> dict[tuple[str, str], Context]:
        """Every compiled context by graph and SoC name."""
        found = (read_context(record, self.folder) for record in self._content["contexts"])
        return {(context.graph, context.soc.name): context for context in found}


def context_record(context: Context, folder: Path) -> dict[str, Any]:
    """A context as JSON values; its files lie below the folder."""
    paths = {key: getattr(context, key).relative_to(folder).as_posix() for key in ("bin", "ctx_onnx")}
    return asdict(context) | paths | {"soc": context.soc.name}


def read_context(record: dict[str, Any], folder: Path) -> Context:
    """What `context_record` described, with its files below a folder."""

    def specs(key: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(x["name"], x["dtype"], tuple(x["shape"])) for x in record[key])

    return Context(
        **record
        | {
            "soc": find_soc(record["soc"]),
            "bin": folder / record["bin"],
            "ctx_onnx": folder / record["ctx_onnx"],
            "info": ContextInfo(**record["info"]),
            "inputs": specs("inputs"),
            "outputs": specs("outputs"),
        }
    )
