"""AIMET's ONNX exporter. The only file of this package that imports AIMET."""

import contextlib
import io
import warnings
from pathlib import Path

import aimet_torch.onnx

from sdconvert.adapters import Tensors
from sdconvert.quantize.artifact import Simulation


def export_quantized(simulation: Simulation, example: Tensors, path: Path, *, opset: int) -> None:
    """Write a simulation as ONNX: every activation quantizer a Q/DQ pair, weights as integers with a DQ, biases int32.

    Second operands of MatMul are left without their own pair; see `export/operands.py`.

    Args:
        simulation: With ranges.
        example: One set of graph inputs; their shapes are the file's.
        path: Of the ONNX file.
        opset: At least 21, which has 16-bit Q/DQ.
    """
    inputs = tuple(example[name] for name in simulation.input_names)
    # The exporter reports its progress on stdout, which belongs to our data.
    with (
        simulation.without_operand_quantizers(),
        warnings.catch_warnings(action="ignore"),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        aimet_torch.onnx.export(
            simulation.graph_module,
            inputs,
            str(path),
            dynamo=True,
            opset_version=opset,
            prequantize_constants=True,
            input_names=list(simulation.input_names),
            output_names=list(simulation.output_names),
            verbose=False,
        )
