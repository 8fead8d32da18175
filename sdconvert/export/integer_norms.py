"""Norms without floating point, for chips of v68 and v69.

Some of these chips compute nothing in floating point (QCS6490, SM7475), and SM8350 has no GroupNorm (QAIRT 2.51 ends
with a failed allocation). What all of them take on integers is LayerNorm with an uint8 weight and no bias:

    GroupNorm   x -> Reshape (b, groups, ...) -> LayerNorm, weights of 1 -> Q/DQ -> Reshape -> Mul -> Q/DQ -> Add
    LayerNorm   x -> LayerNorm, weights of 1 -> Q/DQ -> Mul -> Q/DQ -> Add

Mul takes the norm's weight, Add its bias, both with the activations' bits. The simulation keeps the norm whole; it and
the HTP agree at 65 dB and more.
"""

from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sdconvert.export.integer_ops import replace_nodes

_NORMS = {"GroupNormalization", "LayerNormalization"}
# Values of a normalized row of n reach sqrt(n - 1) at most. Rows of a GroupNorm have up to a million values, none of
# which is 64 deviations away.
_MOST_DEVIATIONS = 64.0


def write_norms_on_integers(model: ModelProto) -> int:
    """Write every GroupNormalization and LayerNormalization over its last axis as above, in place.

    Args:
        model: As AIMET's exporter writes it: quantized weights, biases in floating point, Q/DQ behind each norm.

    Returns:
        Number of norms.
    """
    writer = _Writer(model)
    nodes: list[NodeProto] = []
    count = 0
    for node in model.graph.node:
        if node.op_type in _NORMS and (quantize := writer.quantizers.get(node.output[0])) is not None:
            nodes += writer.norm(node, quantize)
            count += 1
        else:
            nodes.append(node)
    read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
    # The norms' own weights: what nobody reads would still be compiled.
    replace_nodes(model, [node for node in nodes if node.output[0] in read])
    return count


class _Writer:
    """Writes the nodes of one norm after the other, and adds their constants to the model."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._values = {tensor.name: tensor for tensor in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self.quantizers = {node.input[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
        every = (*model.graph.value_info, *model.graph.input, *model.graph.output)
        self._shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in every}
        self._nodes: list[NodeProto] = []

    def norm(self, node: NodeProto, quantize: NodeProto) -> list[NodeProto]:
        """The nodes that replace a norm whose result `quantize` stores."""
        self._nodes = []
        stem, grouped = node.name, node.op_type == "GroupNormalization"
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        weight = self._real(node.input[1])
        bias = self._real(node.input[2]) if len(node.input) > 2 else np.zeros_like(weight)
        source, length = node.input[0], weight.size
        if grouped:
            shape = self._shape(node)
            rows = [shape[0], attributes["num_groups"]]
            length = prod(shape) // prod(rows)
            source = self._node(
                "Reshape", [source, self._constant(f"{stem}_rows", np.array([*rows, length]))], f"{stem}_grouped"
            )
            weight, bias = (one.reshape(-1, *[1] * (len(shape) - 2)) for one in (weight, bias))
        grid = self._stored(quantize.input[2])
        # 255 / 255: the weight of one is exact.
        ones = self._dequantize(f"{stem}_ones", np.full(length, 255, np.uint8), np.float32(1 / 255), np.uint8(0))
        plain = self._node(
            "LayerNormalization", [source, ones], f"{stem}_plain", epsilon=attributes["epsilon"], axis=-1
        )
        limit = min(sqrt(length - 1), _MOST_DEVIATIONS)
        plain = self._pair(plain, -limit, limit, grid.dtype)
        if grouped:
            plain = self._node("Reshape", [plain, self._constant(f"{stem}_shape", np.array(shape))], f"{stem}_image")
        step = float(self._stored(quantize.input[1]))
        low, high = (step * (end - float(grid)) for end in (0, np.iinfo(grid.dtype).max))
        product = self._node("Mul", [plain, self._table(f"{stem}_weight", weight, grid.dtype)], f"{stem}_product")
        product = self._pair(product, low - float(bias.max()), high - float(bias.min()), grid.dtype)
        table = self._table(f"{stem}_bias", bias, grid.dtype)
        self._nodes.append(helper.make_node("Add", [product, table], list(node.output), name=f"{stem}_sum"))
        return self._nodes

    def _shape(self, node: NodeProto) -> list[int]:
        """Shape of what enters a norm, which is that of the tensor before its Q/DQ pair."""
        name = node.input[0]
        while name not in self._shapes:
            name = self._producers[name].input[0]
        return self._shapes[name]

    def _stored(self, name: str) -> npt.NDArray[Any]:
        value: npt.NDArray[Any] = numpy_helper.to_array(self._values[name])
        return value

    def _real(self, name: str) -> npt.NDArray[np.float64]:
        """A parameter's values, those of its codes if it has any."""
        if name in self._values:
            return self._stored(name).astype(np.float64)
        codes, scale, zero = (self._stored(one).astype(np.float64) for one in self._producers[name].input)
        values: npt.NDArray[np.float64] = (codes - zero) * scale
        return values

    def _table(self, stem: str, values: npt.NDArray[np.float64], dtype: np.dtype[Any]) -> str:
        scale, zero = _grid(float(values.min()), float(values.max()), dtype)
        codes = np.clip(np.rint(values / scale) + zero, 0, np.iinfo(dtype).max).astype(dtype)
        return self._dequantize(stem, codes, scale, zero)

    def _dequantize(self, stem: str, codes: npt.ArrayLike, scale: npt.ArrayLike, zero: npt.ArrayLike) -> str:
        parts = {"codes": codes, "scale": scale, "zero_point": zero}
        return self._node(
            "DequantizeLinear", [self._constant(f"{stem}_{k}", v) for k, v in parts.items()], f"{stem}_dq"
        )

    def _pair(self, name: str, low: float, high: float, dtype: np.dtype[Any]) -> str:
        parts = zip(("scale", "zero_point"), _grid(low, high, dtype), strict=True)
        grid = [self._constant(f"{name}_{part}", value) for part, value in parts]
        return self._node(
            "DequantizeLinear", [self._node("QuantizeLinear", [name, *grid], f"{name}_q"), *grid], f"{name}_dq"
        )

    def _node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def _constant(self, name: str, value: npt.ArrayLike) -> str:
        self._model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name


def _grid(low: float, high: float, dtype: np.dtype[Any]) -> tuple[np.float32, Any]:
    """Scale and zero point of an unsigned grid over a range and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / np.iinfo(dtype).max or 1.0)
    return scale, dtype.type(round(-low / float(scale)))
