"""Weights whose scale leaves their bias no room in int32, on a wider grid.

QNN stores a bias as int32 in steps of input scale times weight scale. An output channel whose weights are zero, or all
but zero, has a scale so small that its bias does not fit: QAIRT 2.51 then computes garbage without a word (0.2 dB for a
VAE encoder whose variance is constant). Such a channel is its bias; a wider grid for its weights changes nothing that
16-bit activations could show.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

# Two bits less than int32 holds: products are added to the bias.
_LARGEST_BIAS = 2.0**29
_BIASED = {"Conv", "Gemm"}


def make_room_for_biases(model: ModelProto) -> list[str]:
    """Widen, in place, the grids of output channels whose bias would not fit into int32.

    Args:
        model: As `to_onnx` makes it: integer weights behind a DequantizeLinear, biases in floating point.

    Returns:
        Names of the weights that were changed.
    """
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    changed = []
    for node in model.graph.node:
        if node.op_type not in _BIASED or len(node.input) < 3 or node.input[2] not in values:
            continue
        data, weight = (producers.get(name) for name in node.input[:2])
        if data is None or weight is None or {data.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        if _widen(weight, data, node.input[2], values):
            changed.append(weight.input[0])
    return changed


def _widen(weight: NodeProto, data: NodeProto, bias: str, values: dict[str, Any]) -> bool:
    names = (weight.input[0], weight.input[1], data.input[1], bias)
    if not all(name in values for name in names):
        return False
    codes, scale, step, offset = (numpy_helper.to_array(values[name]) for name in names)
    if scale.ndim != 1 or len(scale) != len(offset) or codes.shape[0] != len(scale):
        return False  # one scale for all channels, blocks, or channels on another axis
    needed = np.abs(offset.astype(np.float64)) / (_LARGEST_BIAS * float(step))
    wide = np.maximum(scale, needed.astype(np.float32))
    rows = wide > scale
    if not rows.any():
        return False
    ratio = np.where(rows, scale.astype(np.float64) / wide, 1.0).reshape(-1, *[1] * (codes.ndim - 1))
    _replace(values[weight.input[0]], np.rint(codes.astype(np.float64) * ratio).astype(codes.dtype))
    _replace(values[weight.input[1]], wide)
    return True


def _replace(tensor: Any, value: npt.NDArray[Any]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
