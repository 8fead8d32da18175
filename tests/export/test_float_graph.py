"""A graph without Q/DQ nodes and the encodings beside it."""

from pathlib import Path

import onnx
import torch
from diffusers.models.attention_processor import Attention
from onnx import numpy_helper
from static_graphs import module_case, simulate
from torch import nn

from sdconvert.export.float_graph import to_float_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.io.encodings import dump_encodings, parse_encodings


def test_the_graph_is_fp32_s_and_every_stored_tensor_has_a_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = module_case(nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU()), 1, 4, 6, 6)
    simulation = simulate(case)
    model, encodings = to_float_onnx(simulation, case.samples[0], opset=21)
    onnx.checker.check_model(model, full_check=True)
    assert {node.op_type for node in model.graph.node} == {"Conv", "GroupNormalization", "Sigmoid", "Mul"}
    onnx.save(model, str(tmp_path / "float.onnx"))
    answer = OnnxRunner(tmp_path / "float.onnx")(case.samples[0])["y"]
    torch.testing.assert_close(answer, case.adapter.run(case.samples[0])["y"], rtol=0, atol=1e-5)
    tensors = {name for node in model.graph.node for name in node.output} | {value.name for value in model.graph.input}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    # What the HTP computes as one op with the next has none: x * sigmoid(x).
    (sigmoid,) = (node for node in model.graph.node if node.op_type == "Sigmoid")
    assert encodings["activation_encodings"].keys() == tensors - set(sigmoid.output)
    assert encodings["param_encodings"].keys() == {name for name in weights if name.endswith("weight")}
    for name, entries in encodings["param_encodings"].items():
        assert len(entries) in (1, len(weights[name]))
    assert encodings["activation_encodings"]["y"] == simulation.encodings().activations["2:silu.0"]


def test_the_encodings_are_a_file_of_form_0_6_1() -> None:
    case = module_case(Attention(query_dim=16, heads=2, dim_head=8), 1, 6, 16)
    _, encodings = to_float_onnx(simulate(case), case.samples[0], opset=21)
    file = parse_encodings(dump_encodings(encodings))
    assert file.version == "0.6.1"
    assert "x" in file.activations
    assert not file.modules
