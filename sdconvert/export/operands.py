"""Give the second operand of every dynamic MatMul its own Q/DQ pair, directly before the MatMul.

Without it ONNX Runtime's QNN provider turns a uint16 second operand into uint8 silently (84 → 41 dB); an int16 pair
with zero point 0 keeps all 16 bits on v73 and later. AIMET's exporter writes one pair per tensor, and no signed ones
beside unsigned ones, so this pair is put in here.
"""

from collections.abc import Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sdconvert.errors import SdconvertError
from sdconvert.io.encodings import Encoding


def insert_operand_pairs(model: ModelProto, encodings: Sequence[Encoding]) -> None:
    """Put a Q/DQ pair before the second input of each dynamic MatMul of a model, in place.

    Args:
        model: As AIMET's exporter writes it.
        encodings: Of the second operands, in execution order.

    Raises:
        SdconvertError: The model has another number of dynamic MatMuls.
    """
    constants = _constants(model)
    dynamic = [node for node in model.graph.node if node.op_type == "MatMul" and node.input[1] not in constants]
    if len(dynamic) != len(encodings):
        raise SdconvertError(
            f"the ONNX graph has {len(dynamic)} MatMuls of two computed tensors, its source {len(encodings)}",
            hint="the exporter rewrote attention; please report this with the versions that `sdconvert doctor` prints",
        )
    pairs = {node.name: _pair(model, node, encoding) for node, encoding in zip(dynamic, encodings, strict=True)}
    nodes = [new for node in model.graph.node for new in (*pairs.get(node.name, ()), node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _constants(model: ModelProto) -> set[str]:
    """Names of tensors that depend on no graph input."""
    known = {initializer.name for initializer in model.graph.initializer} | {""}
    for node in model.graph.node:
        if all(name in known for name in node.input):
            known.update(node.output)
    return known


def _pair(model: ModelProto, node: NodeProto, encoding: Encoding) -> tuple[NodeProto, NodeProto]:
    symmetric = encoding["is_symmetric"] == "True"
    dtype = np.dtype(f"{'int' if symmetric else 'uint'}{encoding['bitwidth']}")
    zero_point = 0 if symmetric else -encoding["offset"]
    stem, source = f"{node.name}_second", node.input[1]
    grid = [f"{stem}_scale", f"{stem}_zero_point"]
    for name, value in zip(grid, (np.float32(encoding["scale"]), dtype.type(zero_point)), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    node.input[1] = f"{stem}_dq"
    return (
        helper.make_node("QuantizeLinear", [source, *grid], [f"{stem}_q"], name=f"{stem}_q"),
        helper.make_node("DequantizeLinear", [f"{stem}_q", *grid], [f"{stem}_dq"], name=f"{stem}_dq"),
    )
