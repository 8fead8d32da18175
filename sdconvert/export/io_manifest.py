"""What goes into a graph and what comes out: names, order, types, shapes, ranges and grids, checked and written down.

Days are lost in the field to what this refuses: names that runners rewrite, tensors without a dimension, sizes that are
left open, an input that no range was measured for.
"""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from sdconvert.errors import SdconvertError

_NAME = re.compile(r"[A-Za-z0-9_]+")
_TYPES = {"float32", "int32"}


@dataclass(frozen=True)
class GraphTensor:
    """An input or output of a graph, in the graph's order.

    Attributes:
        name: As runners write it into file names.
        kind: `input` or `output`.
        dtype: Of the raw values that a runner reads or writes: float32, or int32 for token ids.
        shape: Channels first.
        quantized: Type of the integers behind it, `uint16` for instance; None for token ids.
        scale: A step; None for token ids.
        zero_point: The integer that stands for zero; None for token ids.
        lowest: Smallest value that the grid holds; values below are clipped.
        highest: Largest one.
    """

    name: str
    kind: Literal["input", "output"]
    dtype: str
    shape: tuple[int, ...]
    quantized: str | None = None
    scale: float | None = None
    zero_point: int | None = None
    lowest: float | None = None
    highest: float | None = None


def describe_io(model: ModelProto, graph: str) -> list[GraphTensor]:
    """List the inputs and outputs of a Q/DQ graph.

    Args:
        model: As `graph_for_compiler` makes it.
        graph: Its name, for messages.

    Raises:
        SdconvertError: A name, type or shape would not reach a runner as it is, or a float tensor has no grid.
    """
    readers = {node.input[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = [_describe(model, value, "input", readers.get(value.name), graph) for value in model.graph.input]
    return found + [_describe(model, value, "output", makers.get(value.name), graph) for value in model.graph.output]


def _describe(
    model: ModelProto, value: ValueInfoProto, kind: Literal["input", "output"], node: NodeProto | None, graph: str
) -> GraphTensor:
    tensor = value.type.tensor_type
    dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    shape = tuple(dimension.dim_value for dimension in tensor.shape.dim)
    what = f"{kind} `{value.name}` of the {graph} graph"
    if not _NAME.fullmatch(value.name):
        raise SdconvertError(
            f"{what} has a name that runners rewrite", hint="use letters, digits and _ in the adapter's io_spec"
        )
    if not shape or min(shape) < 1:
        raise SdconvertError(
            f"{what} has the shape {list(shape)}", hint="give it at least one dimension, and sizes that are fixed"
        )
    if dtype not in _TYPES:
        raise SdconvertError(f"{what} is {dtype}", hint="runners take float32, and int32 for token ids")
    if dtype == "int32":
        return GraphTensor(value.name, kind, dtype, shape)
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        raise SdconvertError(f"{what} is not quantized", hint="the adapter must give it a place in the traced graph")
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in node.input[1:]}
    scale, zero_point = (numpy_helper.to_array(stored[name]) for name in node.input[1:])
    limits, step, zero = np.iinfo(zero_point.dtype), float(scale), int(zero_point)
    return GraphTensor(
        value.name,
        kind,
        dtype,
        shape,
        str(zero_point.dtype),
        step,
        zero,
        (int(limits.min) - zero) * step,
        (int(limits.max) - zero) * step,
    )
