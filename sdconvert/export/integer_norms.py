"""Norms without floating point, for chips of v68 and v69.

Some of these chips compute nothing in floating point (QCS6490, SM7475), and SM8350 has no GroupNorm (QAIRT 2.51 ends
with a failed allocation). What all of them take on integers is LayerNorm with an uint8 weight and no bias:

    GroupNorm   x -> Reshape (b, groups, ...) -> LayerNorm, weights of 1 -> Q/DQ -> Reshape -> Conv per channel
    LayerNorm   x -> LayerNorm, weights of 1 -> Q/DQ -> Mul -> Q/DQ -> Add

What follows multiplies by the norm's weight and adds its bias. A convolution per channel has a scale per channel, so
that its weight is exact. Mul and Add in its place, before a SiLU on integers, come out as garbage for some shapes (0
dB). The simulation keeps the norm whole; it and the HTP agree at 65 dB and more.
"""

from math import prod, sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sdconvert.export.integer_ops import replace_nodes

_Values = npt.NDArray[np.float64]
_NORMS = {"GroupNormalization", "LayerNormalization"}
# Values of a normalized row of n reach sqrt(n - 1) at most. Rows of a GroupNorm have up to a million values, none of
# which is 64 deviations away.
_MOST_DEVIATIONS = 64.0
_LARGEST_BIAS = 2.0**29


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
        weight = self._real(node.input[1])
        bias = self._real(node.input[2]) if len(node.input) > 2 else np.zeros_like(weight)
        if node.op_type == "GroupNormalization":
            self._group_norm(node, quantize, weight, bias)
        else:
            self._layer_norm(node, quantize, weight, bias)
        return self._nodes

    def _group_norm(self, node: NodeProto, quantize: NodeProto, weight: _Values, bias: _Values) -> None:
        stem, shape = node.name, self._shape(node)
        groups = next(one.i for one in node.attribute if one.name == "num_groups")
        length = prod(shape[1:]) // groups
        rows = self._constant(f"{stem}_rows", np.array([shape[0], groups, length]))
        plain, limit = self._plain(
            node, self._node("Reshape", [node.input[0], rows], f"{stem}_grouped"), length, quantize
        )
        # A sequence (b, C, T) becomes an image of one row.
        image = [*shape[:2], *[1] * (4 - len(shape)), *shape[2:]]
        plain = self._node("Reshape", [plain, self._constant(f"{stem}_shape", np.array(image))], f"{stem}_image")
        step = 2 * limit / np.iinfo(self._stored(quantize.input[2]).dtype).max
        # The bias has to fit into int32, in steps of both scales.
        scale = np.maximum(np.abs(weight) / 127, np.maximum(np.abs(bias), 1e-6) / (_LARGEST_BIAS * step))
        codes = np.rint(weight / scale).astype(np.int8).reshape(-1, 1, 1, 1)
        zero = np.zeros(len(scale), np.int8)
        table = self._dequantize(f"{stem}_weight", codes, scale.astype(np.float32), zero, axis=0)
        inputs = [plain, table, self._constant(f"{stem}_bias", bias.astype(np.float32))]
        result = node.output[0] if image == shape else f"{stem}_scaled"
        self._node("Conv", inputs, result, group=len(weight), kernel_shape=[1, 1])
        if image != shape:
            stored = self._stored_as(result, list(quantize.input[1:]))
            back = self._constant(f"{stem}_back", np.array(shape))
            self._node("Reshape", [stored, back], node.output[0])

    def _layer_norm(self, node: NodeProto, quantize: NodeProto, weight: _Values, bias: _Values) -> None:
        stem, grid = node.name, self._stored(quantize.input[2])
        plain, _ = self._plain(node, node.input[0], weight.size, quantize)
        step = float(self._stored(quantize.input[1]))
        low, high = (step * (end - float(grid)) for end in (0, np.iinfo(grid.dtype).max))
        product = self._node("Mul", [plain, self._table(f"{stem}_weight", weight, grid.dtype)], f"{stem}_product")
        product = self._pair(product, low - float(bias.max()), high - float(bias.min()), grid.dtype)
        self._node("Add", [product, self._table(f"{stem}_bias", bias, grid.dtype)], node.output[0])

    def _plain(self, node: NodeProto, source: str, length: int, quantize: NodeProto) -> tuple[str, float]:
        """A norm of rows without weight and bias, stored; its name and its largest value."""
        epsilon = next(one.f for one in node.attribute if one.name == "epsilon")
        # 255 / 255: the weight of one is exact.
        codes = np.full(length, 255, np.uint8)
        ones = self._dequantize(f"{node.name}_ones", codes, np.float32(1 / 255), np.uint8(0))
        plain = self._node("LayerNormalization", [source, ones], f"{node.name}_plain", epsilon=epsilon, axis=-1)
        limit = min(sqrt(length - 1), _MOST_DEVIATIONS)
        return self._pair(plain, -limit, limit, self._stored(quantize.input[2]).dtype), limit

    def _shape(self, node: NodeProto) -> list[int]:
        """Shape of what enters a norm, which is that of the tensor before its Q/DQ pair."""
        name = node.input[0]
        while name not in self._shapes:
            name = self._producers[name].input[0]
        return self._shapes[name]

    def _stored(self, name: str) -> npt.NDArray[Any]:
        value: npt.NDArray[Any] = numpy_helper.to_array(self._values[name])
        return value

    def _real(self, name: str) -> _Values:
        """A parameter's values, those of its codes if it has any."""
        if name in self._values:
            return self._stored(name).astype(np.float64)
        codes, scale, zero = (self._stored(one).astype(np.float64) for one in self._producers[name].input)
        values: _Values = (codes - zero) * scale
        return values

    def _table(self, stem: str, values: _Values, dtype: np.dtype[Any]) -> str:
        scale, zero = _grid(float(values.min()), float(values.max()), dtype)
        codes = np.clip(np.rint(values / scale) + zero, 0, np.iinfo(dtype).max).astype(dtype)
        return self._dequantize(stem, codes, scale, zero)

    def _dequantize(self, stem: str, *parts: npt.ArrayLike, **attributes: int) -> str:
        names = [f"{stem}_{part}" for part in ("codes", "scale", "zero_point")]
        inputs = [self._constant(name, value) for name, value in zip(names, parts, strict=True)]
        return self._node("DequantizeLinear", inputs, f"{stem}_dq", **attributes)

    def _pair(self, name: str, low: float, high: float, dtype: np.dtype[Any]) -> str:
        parts = zip(("scale", "zero_point"), _grid(low, high, dtype), strict=True)
        return self._stored_as(name, [self._constant(f"{name}_{part}", value) for part, value in parts])

    def _stored_as(self, name: str, grid: list[str]) -> str:
        quantized = self._node("QuantizeLinear", [name, *grid], f"{name}_q")
        return self._node("DequantizeLinear", [quantized, *grid], f"{name}_dq")

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
