"""Keep a multiplication by one number, such as attention's scale, on integers.

    before   x -> Q/DQ -> Mul(x, number)                    on the HTP: Dequantize, Mul in floating point, Quantize
    after    x -> Q/DQ -> Mul(x, DQ(code))                  on the HTP: Mul

QNN's provider takes a Mul as a quantized one only if both operands have Q/DQ, and the exporter leaves a number of
the program a float. Its code has the bits of what it multiplies, for Mul takes no two precisions. The code is a power
of two, so that code times scale is the number itself, to the last bit.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper


class _Factor(NamedTuple):
    place: int
    """Among the inputs of its Mul."""
    value: np.float32
    zero_point: np.generic
    """Of what is multiplied; its type counts."""


def quantize_factors(model: ModelProto) -> int:
    """Make integers of the number in each Mul of a dequantized tensor by one positive number, in place.

    Returns:
        Number of such Muls.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "Mul" and (factor := _factor(node, constants, producers)):
            nodes.append(_integer(model, node, factor))
        nodes.append(node)
    count = len(nodes) - len(model.graph.node)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(kept)
    return count


def _factor(mul: NodeProto, constants: Mapping[str, TensorProto], producers: Mapping[str, NodeProto]) -> _Factor | None:
    for place, other in enumerate(reversed(mul.input)):
        source, constant = producers.get(other), constants.get(mul.input[place])
        if source is None or source.op_type != "DequantizeLinear" or constant is None:
            continue
        value = numpy_helper.to_array(constant)
        if value.size == 1 and np.isfinite(value).all() and value.item() > 0:
            zero_point = numpy_helper.to_array(constants[source.input[2]])
            return _Factor(place, np.float32(value.item()), zero_point.dtype.type(0))
    return None


def _integer(model: ModelProto, mul: NodeProto, factor: _Factor) -> NodeProto:
    code = type(factor.zero_point)(1 << (8 * factor.zero_point.itemsize - 2))
    names = [f"{mul.name}_factor", f"{mul.name}_factor_scale", f"{mul.name}_factor_zero_point"]
    for name, one in zip(names, (code, factor.value / np.float32(code), factor.zero_point), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(one), name))
    mul.input[factor.place] = f"{names[0]}_dq"
    return helper.make_node("DequantizeLinear", names, [mul.input[factor.place]], name=mul.input[factor.place])
