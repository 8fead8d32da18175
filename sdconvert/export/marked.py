"""The traced graph by PyTorch's exporter, one opaque marker in place of each quantizer.

Nothing is merged across a marker. What becomes of the markers is for others: Q/DQ pairs (`export/onnx_graph.py`), or
nothing, with the ranges beside the graph (`export/float_graph.py`).
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnx import ModelProto
from torch import Tensor, nn

from sdconvert.adapters import Tensors
from sdconvert.export.onnx_passes import simplify_onnx
from sdconvert.export.origin import TENSOR_KEY
from sdconvert.quantize.artifact import Simulation

_DOMAIN, _MARKER, _KEY = "sdconvert", "Quantizer", "key"


def export_marked(simulation: Simulation, example: Tensors, opset: int) -> ir.Model:
    """The graph of a simulation, with markers.

    Args:
        simulation: Its graph counts, not its ranges.
        example: One set of graph inputs; their shapes are the model's.
        opset: Of the ONNX operators.
    """
    inputs = tuple(example[name] for name in simulation.input_names)
    # The exporter reports its progress on stdout, which belongs to our data.
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        _quiet(logging.getLogger("torch.onnx")),
    ):
        program = torch.onnx.export(
            simulation.with_quantizers_as(_Marker),
            inputs,
            dynamo=True,
            opset_version=opset,
            input_names=list(simulation.input_names),
            output_names=list(simulation.output_names),
            optimize=False,
            verbose=False,
        )
    assert program is not None  # for the type checker: dynamo=True returns one
    simplify_onnx(program.model)
    return program.model


def markers(graph: ir.Graph) -> list[tuple[str, ir.Node]]:
    """Every marker that is left in a graph, with its key, in execution order."""
    found = [node for node in graph if (node.domain, node.op_type) == (_DOMAIN, _MARKER)]
    return [(node.attributes[_KEY].as_string(), node) for node in found]


def finish(model: ir.Model) -> ModelProto:
    """The model without markers, free of tensors that nothing reads and of the exporting machine's paths."""
    graph = model.graph
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    model.opset_imports.pop(_DOMAIN, None)
    return _bare(ir.serde.serialize_model(model))


class _Marker(nn.Module):
    """Stands for a quantizer while the graph is exported."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self._key = key

    def forward(self, tensor: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_MARKER}", (tensor,), {_KEY: self._key}, dtype=tensor.dtype, shape=tensor.shape, version=1
        )


def _bare(model: ModelProto) -> ModelProto:
    """Without the exporting machine's paths, which it leaves in every node."""
    for annotated in (model, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        kept = [entry for entry in annotated.metadata_props if entry.key == TENSOR_KEY]
        del annotated.metadata_props[:]
        annotated.metadata_props.extend(kept)
    del model.graph.metadata_props[:]
    return model


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """The exporter warns of operators that it does not know."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
