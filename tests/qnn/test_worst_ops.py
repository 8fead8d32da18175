"""An op that the HTP computes badly is found among those it computes well."""

from pathlib import Path

import numpy as np
import onnx
import torch
from qdq_graph import QdqGraph

from sdconvert.export.marked import TENSOR_KEY
from sdconvert.qnn.worst_ops import worst_ops
from sdconvert.soc import find_soc


def test_a_product_whose_second_operand_is_cut_to_8_bits_is_named(tmp_path: Path) -> None:
    graph, random = QdqGraph(), np.random.default_rng(0)
    x = graph.qdq(graph.input("x", (1, 16, 8, 8)), -4, 4)
    weight = graph.weight("weight", random.normal(0, 0.25, (16, 16, 1, 1)))
    conv = graph.qdq(graph.node("Conv", [x, weight], "conv"), -6, 6)
    # Both uint16: the HTP takes the second one as uint8.
    product = graph.qdq(graph.node("MatMul", [conv, conv], "product"), -80, 80)
    graph.qdq(graph.node("Relu", [product], "relu"), 0, 80, output="y")
    graph.output("y", (1, 16, 8, 8))
    model = onnx.shape_inference.infer_shapes(onnx.load(graph.save(tmp_path / "graph.onnx")))
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            node.metadata_props.add(key=TENSOR_KEY, value=f"block:{node.input[0]}")
    inputs = {"x": torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))}
    worst, *others = worst_ops(model, inputs, tmp_path, find_soc("SM8650"))
    assert worst.tensor == "block:product_dq_q"
    assert worst.entering_db > 75
    assert worst.leaving_db < 50
    assert all(loss.added < worst.added / 10 for loss in others)
