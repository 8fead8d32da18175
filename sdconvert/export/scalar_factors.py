"""Keep a multiplication by one number, such as attention's scale, on integers.

QNN's provider takes a Mul as a quantized one only if both operands have Q/DQ. AIMET's exporter leaves a number that
stands in the program a float, and the HTP then computes Dequantize, Mul in floating point, Quantize. Here the number
becomes one 16-bit code with a DequantizeLinear: code times scale is the number itself.
"""

from math import isfinite

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

_CODE = 32768


def quantize_scalar_factors(model: ModelProto) -> int:
    """Give the number in each multiplication of a dequantized tensor by one positive number integers, in place.

    Returns:
        Number of multiplications that were changed.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    numbers = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.dims or list(tensor.dims) == [1]}
    nodes: list[NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type == "Mul":
            factors = [index for index, name in enumerate(node.input) if name in numbers]
            others = [producers.get(name) for name in node.input if name not in numbers]
            if len(factors) == 1 and others[0] is not None and others[0].op_type == "DequantizeLinear":
                value = float(numpy_helper.to_array(numbers[node.input[factors[0]]]).reshape(()))
                if isfinite(value) and value > 0:
                    nodes.append(_dequantized(model, node, factors[0], value))
                    count += 1
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return count


def _dequantized(model: ModelProto, node: NodeProto, index: int, value: float) -> NodeProto:
    stem = f"{node.name}_factor"
    names = [f"{stem}_q", f"{stem}_scale", f"{stem}_zero_point"]
    for name, one in zip(names, (np.uint16(_CODE), np.float32(value / _CODE), np.uint16(0)), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(one), name))
    node.input[index] = f"{stem}_dq"
    return helper.make_node("DequantizeLinear", names, [node.input[index]], name=f"{stem}_dq")
