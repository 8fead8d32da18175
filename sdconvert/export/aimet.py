"""AIMET's ONNX exporter. The only file of this package that imports AIMET."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import aimet_torch.onnx
import onnx
from onnx import ModelProto

from sdconvert.adapters import Tensors
from sdconvert.quantize.artifact import Simulation


def to_onnx(simulation: Simulation, example: Tensors, *, opset: int) -> ModelProto:
    """Make ONNX of a simulation: every activation quantizer a Q/DQ pair, weights as integers with a DQ, biases float.

    QNN's provider makes int32 of biases, with the product of input and weight scale. Second operands of MatMul are
    left without their own pair; see `export/operands.py`.

    Args:
        simulation: With ranges.
        example: One set of graph inputs; their shapes are the model's.
        opset: At least 21, which has 16-bit Q/DQ.
    """
    inputs = tuple(example[name] for name in simulation.input_names)
    # The exporter reports its progress on stdout, which belongs to our data.
    with (
        tempfile.TemporaryDirectory() as folder,
        simulation.without_operand_quantizers(),
        simulation.ties_decided(),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
        _quiet(logging.getLogger("torch.onnx")),
    ):
        aimet_torch.onnx.export(
            simulation.graph_module,
            inputs,
            path := str(Path(folder) / "graph.onnx"),
            dynamo=True,
            opset_version=opset,
            prequantize_constants=True,
            input_names=list(simulation.input_names),
            output_names=list(simulation.output_names),
            verbose=False,
        )
        # It also leaves one file per large constant beside the model, and the exporting machine's paths in every node.
        model = onnx.load(path)
    for annotated in (model, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del annotated.metadata_props[:]
    del model.graph.metadata_props[:]
    return model


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """The exporter warns that AIMET's own operators have signatures it cannot infer, once per operator and export."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
