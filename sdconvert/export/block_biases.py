"""Biases beside weights whose blocks of input channels have own scales, in the forms that the HTP computes right.

A float bias becomes int32 with the product of input and weight scale; with blocks there is no one such scale, and
QAIRT 2.51 computes garbage (-12 dB) for Conv, and refuses MatMul followed by Add. So Conv gets its bias as int32, with
the largest scale of each channel's blocks, and MatMul a Q/DQ pair of its own before the Add (both 68 dB).
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper

from sdconvert.errors import SdconvertError


def adapt_block_biases(model: ModelProto) -> None:
    """Give the biases beside block-wise weights of a model their form, in place.

    Args:
        model: As `to_onnx` makes it, with 16-bit activations.

    Raises:
        SdconvertError: A layer has another form than the exporter gives it.
    """
    graph = _Graph(model)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        weight = graph.producers.get(node.input[1]) if len(node.input) > 1 else None
        after: list[NodeProto] = []
        if weight is not None and any(attribute.name == "block_size" for attribute in weight.attribute):
            if node.op_type == "MatMul":
                after = graph.pair_before_add(node)
            elif len(node.input) > 2:
                nodes.append(graph.integer_bias(node, weight))
        nodes += [node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


class _Graph:
    """A model's tensors by name."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        self._values = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self._consumers = {name: node for node in model.graph.node for name in node.input}

    def integer_bias(self, node: NodeProto, weight: NodeProto) -> NodeProto:
        """Make a node's bias int32; return its DequantizeLinear."""
        name = node.input[2]
        scales = self._value(weight.input[1])
        largest = scales.reshape(len(scales), -1).max(1)
        scale = np.asarray(largest * self._value(self._grid(node.input[0], node)[0]), dtype=np.float32)
        steps = np.rint(self._value(name) / scale).clip(-(2**31), 2**31 - 1).astype(np.int32)
        inputs = [self._constant(f"{name}_block_q", steps), self._constant(f"{name}_block_scale", scale)]
        node.input[2] = f"{name}_block_dq"
        return helper.make_node("DequantizeLinear", inputs, [node.input[2]], name=node.input[2], axis=0)

    def pair_before_add(self, matmul: NodeProto) -> list[NodeProto]:
        """Put a Q/DQ pair between a MatMul and the addition of its bias, if it has one; return the pair.

        The range is that of the sum, less the bias.
        """
        product = matmul.output[0]
        add = self._consumers[product]
        if add.op_type != "Add":
            return []
        bias = next(self._value(name) for name in add.input if name in self._values)
        names = self._consumers[add.output[0]].input[1:]
        scale, zero = (self._value(name) for name in names)
        last = np.iinfo(zero.dtype).max
        low = min(float(-zero.astype(np.float64) * scale) - float(bias.max()), 0.0)
        high = max(float((last - zero.astype(np.float64)) * scale) - float(bias.min()), 0.0)
        wide = np.float32((high - low) / last)
        grid = [
            self._constant(f"{product}_scale", np.asarray(wide)),
            self._constant(f"{product}_zero_point", np.asarray(round(-low / wide), dtype=zero.dtype)),
        ]
        add.input[list(add.input).index(product)] = f"{product}_dq"
        return [
            helper.make_node("QuantizeLinear", [product, *grid], [f"{product}_q"], name=f"{product}_q"),
            helper.make_node("DequantizeLinear", [f"{product}_q", *grid], [f"{product}_dq"], name=f"{product}_dq"),
        ]

    def _grid(self, tensor: str, node: NodeProto) -> list[str]:
        dequantize = self.producers.get(tensor)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            raise SdconvertError(
                f"the input of `{node.name}` is not quantized, and its weight is, in blocks",
                hint="please report this with the versions that `sdconvert doctor` prints",
            )
        return list(dequantize.input[1:])

    def _value(self, name: str) -> npt.NDArray[Any]:
        value: npt.NDArray[Any] = numpy_helper.to_array(self._values[name])
        return value

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self._model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name
