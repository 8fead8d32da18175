"""Equal scales and zero points in one constant: the same graph, with fewer constants."""

import numpy as np
import onnx
import onnxruntime
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from sdconvert.export.shared_grids import share_grids

STEPS = st.lists(st.sampled_from([0.5, 0.25, 0.125]), min_size=1, max_size=6)


def chain(steps: list[float], *, zero_point: int = 3) -> ModelProto:
    """A pair of Q/DQ for every step, and behind each a multiplication with a constant of the same step's value."""
    nodes, constants, value = [], [], "x"
    for index, step in enumerate(steps):
        scale, zero, factor = (f"{name}_{index}" for name in ("scale", "zero", "factor"))
        constants += [
            numpy_helper.from_array(np.array(step, np.float32), scale),
            helper.make_tensor(zero, TensorProto.UINT16, (), [zero_point]),  # int32_data, where others have raw_data
            numpy_helper.from_array(np.array(step, np.float32), factor),
        ]
        nodes += [
            helper.make_node("QuantizeLinear", [value, scale, zero], [f"q_{index}"]),
            helper.make_node("DequantizeLinear", [f"q_{index}", scale, zero], [f"dq_{index}"]),
            helper.make_node("Mul", [f"dq_{index}", factor], [f"y_{index}"]),
        ]
        value = f"y_{index}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def compute(model: ModelProto) -> list[float]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.array([-1.5, 0.3, 0.7, 2.0], np.float32)})
    return [float(value) for value in found]


@given(STEPS)
def test_one_constant_is_left_of_each_and_the_graph_computes_the_same(steps: list[float]) -> None:
    model = chain(steps)
    before = compute(model)
    gone = share_grids(model)
    onnx.checker.check_model(model, full_check=True)
    assert compute(model) == before
    # Of scales one per value, of zero points one; factors are no grid's.
    assert len(model.graph.initializer) == len(set(steps)) + 1 + len(steps)
    assert gone == 2 * len(steps) - len(set(steps)) - 1
    assert share_grids(model) == 0


def test_zero_points_of_other_types_and_codes_stay_apart() -> None:
    values = {"a": np.zeros(2, np.int8), "b": np.zeros(2, np.int8), "scale": np.ones((), np.float32)}
    zeros = {"zero_a": np.zeros((), np.int8), "zero_b": np.zeros((), np.int8), "zero_c": np.zeros((), np.uint8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "scale", "zero_a"], ["one"]),
        helper.make_node("DequantizeLinear", ["b", "scale", "zero_b"], ["two"]),
        helper.make_node("QuantizeLinear", ["one", "scale", "zero_c"], ["three"]),
    ]
    outputs = [helper.make_tensor_value_info("two", TensorProto.FLOAT, [2])]
    constants = [numpy_helper.from_array(value, name) for name, value in {**values, **zeros}.items()]
    model = helper.make_model(helper.make_graph(nodes, "codes", [], outputs, constants))
    assert share_grids(model) == 1
    assert [constant.name for constant in model.graph.initializer] == ["a", "b", "scale", "zero_a", "zero_c"]
    assert [list(node.input) for node in nodes] != [list(node.input) for node in model.graph.node]
    assert [list(node.input)[2] for node in model.graph.node] == ["zero_a", "zero_a", "zero_c"]
