"""A model's static graph as fp32 ONNX, without quantizers: the shortest proof that a family takes the road."""

import contextlib
import io
import warnings
from pathlib import Path

import torch

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.errors import PluginError, PreconditionError
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.plugins import require_fused


def write_float32(adapter: ModelAdapter, inputs: Tensors, path: Path, *, opset: int = 21) -> None:
    """Write a model's static graph.

    Args:
        adapter: Covers the model, which is left as it was.
        inputs: One set of graph inputs; their shapes become the graph's.
        path: Of the ONNX file.
        opset: ONNX operator set.

    Raises:
        UnsupportedModelError: The model cannot be a static graph.
        PreconditionError: Plugins are not part of its weights yet.
    """
    try:
        require_fused(adapter.model)
    except PluginError as error:
        raise PreconditionError(f"the fused model is missing: {error.args[0]}", hint=error.hint) from error
    with adapter.as_graph() as graph, torch.no_grad():
        program = torch.export.export(graph, tuple(inputs.values()), strict=False)
    names = adapter.output_names(len(program.graph_signature.user_outputs))
    # The exporter reports its progress on stdout, which belongs to our data.
    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            program,
            f=str(path),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(names),
            external_data=False,
            verbose=False,
        )


def float32_agreement_db(adapter: ModelAdapter, inputs: Tensors, path: Path) -> float:
    """SQNR in dB of an ONNX file's worst output in ONNX Runtime, against the model in torch."""
    return worst_sqnr_db(adapter.run(inputs), OnnxRunner(path)(inputs))
