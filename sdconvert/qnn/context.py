"""Compile a Q/DQ graph for one SoC, whole, and check that the answer is what was asked for."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from sdconvert.errors import CompileError, UsageError
from sdconvert.io.files import atomic_file, write_json_atomic
from sdconvert.qnn.info import ContextInfo, check_context_info, read_context_info
from sdconvert.qnn.nodes import nodes_path
from sdconvert.qnn.refusal import explain_refusal
from sdconvert.soc import Soc

FinalizationMode = Literal[2, 3]
"""HTP graph finalization. Mode 1 computes garbage (SQNR below 0 dB in the simulator), so it cannot be asked for."""


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output, as the ONNX names it: layout NCHW, static shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the raw tensor."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Context:
    """One graph compiled for one SoC: the binary, the EPContext model that refers to it, and the figures."""

    graph: str
    soc: Soc
    bin: Path
    ctx_onnx: Path
    info: ContextInfo
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cpu_nodes: int
    """Nodes of the EPContext model that are not contexts; a compiled graph has none."""
    seconds: float
    peak_rss_bytes: int
    phases: dict[str, float]
    """Seconds of the compiler's phases, in their order and by its own names."""


def compile_context(
    onnx: Path, out_dir: Path, soc: Soc, *, finalization_mode: FinalizationMode = 3, dlc: bool = False
) -> Context:
    """Compile a Q/DQ ONNX graph into `<stem>_qnn.bin` and `<stem>.ctx.onnx`; the log becomes `<stem>.compile.log`.

    `<stem>.nodes.json` counts the nodes of the compiled graph by type. Graph inputs and outputs stay float32 NCHW under
    their ONNX names. With `dlc` the graph is also written as `<stem>.dlc`, for tools of the QAIRT SDK. The binary and
    the EPContext model appear whole or not at all.

    Raises:
        UsageError: The graph file is missing, or the finalization mode is not one that computes right.
        CompileError: HTP refuses nodes, the compiler fails, or its answer is not for this SoC.
        EnvironmentProblem: The disk is full.
    """
    if finalization_mode not in get_args(FinalizationMode):
        raise UsageError(
            f"HTP graph finalization mode {finalization_mode!r} is not offered",
            hint="use 3, or 2; mode 1 computes garbage",
        )
    if not onnx.is_file():
        raise UsageError(f"no ONNX graph at `{onnx}`", hint="export the graph first")
    out_dir.mkdir(parents=True, exist_ok=True)
    graph, log = onnx.stem, out_dir / f"{onnx.stem}.compile.log"
    with tempfile.TemporaryDirectory(prefix=f".partial-{graph}-", dir=out_dir) as folder:
        work = Path(folder)
        # The binary is named after this file, and the EPContext node refers to it by that bare name.
        built, result = work / f"{graph}.onnx", work / "result.json"
        paths = [str(path.absolute()) for path in (onnx, built, result)]
        dlcs = [str((work / f"{graph}.dlc").absolute())] if dlc else []
        _run_worker([*paths, str(soc.soc_model), str(finalization_mode), *dlcs], log, onnx, soc)
        binary = work / f"{graph}_qnn.bin"
        info = read_context_info(binary)
        check_context_info(info, soc, binary.name)
        inputs, outputs, left = _read_ctx_onnx(built)
        if left:
            raise CompileError(f"{soc.name} leaves {len(left)} nodes of `{onnx.name}` on the CPU: {', '.join(left)}")
        for path in map(Path, dlcs):
            path.replace(out_dir / path.name)
        binary.replace(out_dir / binary.name)
        built.replace(out_dir / f"{graph}.ctx.onnx")
        figures = json.loads(result.read_text())
        write_json_atomic(figures["nodes"], nodes_path(out_dir / binary.name))
    return Context(
        graph=graph,
        soc=soc,
        bin=out_dir / f"{graph}_qnn.bin",
        ctx_onnx=out_dir / f"{graph}.ctx.onnx",
        info=info,
        inputs=inputs,
        outputs=outputs,
        cpu_nodes=len(left),
        seconds=figures["seconds"],
        peak_rss_bytes=figures["peak_rss_bytes"],
        phases=figures["phases"],
    )


def _run_worker(arguments: list[str], log: Path, onnx: Path, soc: Soc) -> None:
    with atomic_file(log) as partial, partial.open("wb") as file:
        command = [sys.executable, "-m", "sdconvert.qnn.worker", *arguments]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise explain_refusal(status, log, onnx, soc)


def _read_ctx_onnx(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], list[str]]:
    """Return inputs, outputs, and the operators of the nodes that are no compiled context."""
    import onnx

    model = onnx.load(path)
    left = [node.op_type for node in model.graph.node if node.op_type != "EPContext"]

    def specs(values: "list[onnx.ValueInfoProto]") -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                value.name,
                str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
                tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    return specs(list(model.graph.input)), specs(list(model.graph.output)), left
