"""Builds small ONNX graphs with Q/DQ nodes, for tests of the compiler."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper


class QdqGraph:
    """One graph under construction; every method returns the name of the tensor that it made."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def constant(self, name: str, value: npt.ArrayLike) -> str:
        self._constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=f"{output}_node", **attributes))
        return output

    def input(self, name: str, shape: Sequence[int]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, name: str, shape: Sequence[int]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def qdq(self, tensor: str, low: float, high: float, output: str | None = None) -> str:
        """Asymmetric uint16 over [low, high]."""
        scale = np.float32((high - low) / 65535)
        return self._qdq(tensor, scale, np.uint16(round(-low / scale)), output or f"{tensor}_dq")

    def qdq_symmetric(self, tensor: str, limit: float) -> str:
        """Symmetric int16 over [-limit, limit]."""
        return self._qdq(tensor, np.float32(limit / 32767), np.int16(0), f"{tensor}_s16")

    def _qdq(self, tensor: str, scale: np.float32, zero: np.generic, output: str) -> str:
        names = [self.constant(f"{output}_scale", scale), self.constant(f"{output}_zero", zero)]
        self.node("QuantizeLinear", [tensor, *names], f"{output}_q")
        return self.node("DequantizeLinear", [f"{output}_q", *names], output)

    def weight(self, name: str, value: npt.NDArray[np.float64]) -> str:
        """Symmetric int8, one scale per output channel (axis 0)."""
        scale = (np.abs(value).reshape(len(value), -1).max(1) / 127).astype(np.float32)
        stored = np.round(value / scale.reshape(-1, *[1] * (value.ndim - 1))).astype(np.int8)
        names = [
            self.constant(f"{name}_q", stored),
            self.constant(f"{name}_scale", scale),
            self.constant(f"{name}_zero", np.zeros(len(scale), np.int8)),
        ]
        return self.node("DequantizeLinear", names, name, axis=0)

    def save(self, path: Path) -> Path:
        graph = helper.make_graph(self._nodes, path.stem, self._inputs, self._outputs, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
        return path


def conv_silu_conv(path: Path) -> Path:
    """W8A16 Conv -> SiLU -> Conv on `x` (1, 4, 16, 16), giving `y` of the same shape."""
    rng, graph = np.random.default_rng(0), QdqGraph()
    x = graph.qdq(graph.input("x", (1, 4, 16, 16)), -4, 4)
    weights = [graph.weight(n, rng.normal(0, 0.2, s)) for n, s in (("w1", (8, 4, 3, 3)), ("w2", (4, 8, 3, 3)))]
    hidden = graph.qdq(graph.node("Conv", [x, weights[0]], "hidden", pads=[1] * 4), -7, 7)
    gate = graph.qdq(graph.node("Sigmoid", [hidden], "gate"), 0, 1)
    silu = graph.qdq(graph.node("Mul", [hidden, gate], "silu"), -0.3, 7)
    graph.qdq(graph.node("Conv", [silu, weights[1]], "out", pads=[1] * 4), -7, 7, output="y")
    graph.output("y", (1, 4, 16, 16))
    return graph.save(path)


def matmul(path: Path, *, symmetric_second: bool) -> Path:
    """Dynamic MatMul of `q` and `k` (both 1, 2, 64, 64), both uint16, the second then to symmetric int16 if asked."""
    graph = QdqGraph()
    q = graph.qdq(graph.input("q", (1, 2, 64, 64)), -4.5, 4.5)
    k = graph.qdq(graph.input("k", (1, 2, 64, 64)), -4.5, 4.5)
    if symmetric_second:
        k = graph.qdq_symmetric(k, 4.5)
    graph.qdq(graph.node("MatMul", [q, k], "scores"), -45, 45, output="y")
    graph.output("y", (1, 2, 64, 64))
    return graph.save(path)


def group_norm(path: Path) -> Path:
    """GroupNorm of `x` (1, 16, 8, 8) in 4 groups as exporters write it: InstanceNormalization between reshapes."""
    graph = QdqGraph()
    x = graph.qdq(graph.input("x", (1, 16, 8, 8)), -5, 5)
    grouped = graph.qdq(graph.node("Reshape", [x, graph.constant("to_groups", [1, 4, -1])], "grouped"), -5, 5)
    one = [graph.constant("one_scale", np.float32(1 / 255)), graph.constant("one_zero", np.uint8(0))]
    gamma = graph.node("DequantizeLinear", [graph.constant("one_q", np.full(4, 255, np.uint8)), *one], "gamma")
    # HTP takes the bias as int32 with scale(x) * scale(gamma), and refuses it in any other form.
    zero = [graph.constant("beta_scale", np.float32(10 / 65535 / 255)), graph.constant("beta_zero", np.int32(0))]
    beta = graph.node("DequantizeLinear", [graph.constant("beta_q", np.zeros(4, np.int32)), *zero], "beta")
    normed = graph.qdq(graph.node("InstanceNormalization", [grouped, gamma, beta], "normed", epsilon=1e-5), -5, 5)
    graph.qdq(graph.node("Reshape", [normed, graph.constant("to_image", [1, 16, 8, 8])], "image"), -5, 5, output="y")
    graph.output("y", (1, 16, 8, 8))
    return graph.save(path)


def refused(path: Path) -> Path:
    """A graph with an operator (Det) that HTP does not have."""
    graph = QdqGraph()
    x = graph.qdq(graph.input("x", (1, 4, 8, 8)), -5, 5)
    graph.qdq(graph.node("Det", [x], "determinant"), -9, 9, output="y")
    graph.output("y", (1, 4))
    return graph.save(path)


def signed_conv_output(path: Path) -> Path:
    """A Conv whose input is uint16 and whose output is int16: signed and unsigned in one operator."""
    graph = QdqGraph()
    x = graph.qdq(graph.input("x", (1, 4, 8, 8)), -4, 4)
    weight = graph.weight("weight", np.random.default_rng(0).normal(0, 0.5, (4, 4, 1, 1)))
    signed = graph.qdq_symmetric(graph.node("Conv", [x, weight], "conv"), 6)
    graph.qdq(graph.node("Relu", [signed], "relu"), 0, 6, output="y")
    graph.output("y", (1, 4, 8, 8))
    return graph.save(path)
