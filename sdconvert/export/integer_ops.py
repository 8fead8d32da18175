"""Keep ops on integers that QNN's provider would otherwise run in floating point, between a Dequantize and a Quantize.

The provider takes an op as a quantized one only if every operand and the result have Q/DQ. AIMET's exporter leaves two
without, for its quantizers sit on the model's tensors:

    SiLU        x -> Sigmoid -> Mul(x, ·)           Sigmoid -> Q/DQ over [0, 1] -> Mul
    LayerNorm   bias in float32                     bias as int32 with the scale of input times weight

LayerNorm takes that bias with a weight that is int16-symmetric, on v73 and later; GroupNorm takes none (QAIRT 2.51).
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_LIMIT = 2**31 - 1
_STEPS = 65535


def quantize_silu(model: ModelProto) -> int:
    """Put a Q/DQ pair behind each Sigmoid that only Mul reads, in place.

    Returns:
        Number of pairs.
    """
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        users = readers.get(node.output[0], [])
        if node.op_type != "Sigmoid" or {user.op_type for user in users} != {"Mul"}:
            continue
        stem, grid = f"{node.name}_silu", [f"{node.name}_silu_scale", f"{node.name}_silu_zero_point"]
        _add_constants(model, grid, (np.float32(1 / _STEPS), np.uint16(0)))
        quantize = helper.make_node("QuantizeLinear", [node.output[0], *grid], [f"{stem}_q"], name=f"{stem}_q")
        dequantize = helper.make_node("DequantizeLinear", [f"{stem}_q", *grid], [f"{stem}_dq"], name=f"{stem}_dq")
        for user in users:
            user.input[:] = [dequantize.output[0] if name == node.output[0] else name for name in user.input]
        nodes += [quantize, dequantize]
    added = len(nodes) - len(model.graph.node)
    _replace_nodes(model, nodes)
    return added // 2


def quantize_layer_norm_biases(model: ModelProto) -> int:
    """Make int32 of the bias of each LayerNormalization whose weight is int16 with zero point 0, in place.

    Returns:
        Number of biases.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type == "LayerNormalization" and len(node.input) == 3 and node.input[2] in constants:
            source, weight = (producers.get(name) for name in node.input[:2])
            if source is not None and weight is not None and _is_int16(weight, constants):
                scale = np.float32(_value(source.input[1], constants) * _value(weight.input[1], constants))
                nodes.append(_integer_bias(model, node, _value(node.input[2], constants), scale))
        nodes.append(node)
    added = len(nodes) - len(model.graph.node)
    _replace_nodes(model, nodes)
    return added


def _is_int16(dequantize: NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    stored = constants.get(dequantize.input[0])
    symmetric = len(dequantize.input) < 3 or not _value(dequantize.input[2], constants).any()
    return stored is not None and stored.data_type == TensorProto.INT16 and symmetric


def _integer_bias(model: ModelProto, norm: NodeProto, bias: npt.NDArray[np.float32], scale: np.float32) -> NodeProto:
    names = [f"{norm.name}_bias", f"{norm.name}_bias_scale", f"{norm.name}_bias_zero_point"]
    stored = np.clip(np.round(bias.astype(np.float64) / scale), -_LIMIT, _LIMIT).astype(np.int32)
    _add_constants(model, names, (stored, scale, np.int32(0)))
    norm.input[2] = f"{names[0]}_dq"
    return helper.make_node("DequantizeLinear", names, [norm.input[2]], name=norm.input[2])


def _value(name: str, constants: Mapping[str, TensorProto]) -> npt.NDArray[np.float32]:
    return numpy_helper.to_array(constants[name])


def _add_constants(model: ModelProto, names: list[str], values: tuple[npt.ArrayLike, ...]) -> None:
    for name, value in zip(names, values, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def _replace_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Set a model's nodes, and drop constants that no node reads any more."""
    used = Counter(name for node in nodes for name in node.input)
    constants = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
