"""Keys as rows: fewer nodes for the HTP, the same numbers from every runtime."""

from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from onnx import ModelProto
from static_graphs import Case, module_case, simulate

from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.export.transposed_keys import take_keys_as_rows
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.attention import per_head
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.soc import find_soc

HEADS = 2
SOCS = {75: "SM8650", 69: "SM8450"}


@pytest.fixture(scope="module", params=SOCS, ids=lambda arch: f"v{arch}")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, str]:
    """Attention per head of an image; a folder with `before.onnx` and `after.onnx`; a SoC."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("keys")
    case = module_case(per_head(Attention(query_dim=16, heads=HEADS, dim_head=8)), 1, 16, 1, 24)
    simulation = simulate(case, request.param)
    model = to_onnx(simulation, case.samples[0], opset=21)
    onnx.save(model, folder / "before.onnx")
    assert take_keys_as_rows(model) == HEADS
    onnx.save(model, folder / "after.onnx")
    return case, folder, SOCS[request.param]


def operators(model: ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_only_the_products_with_keys_change(exported: tuple[Case, Path, str]) -> None:
    case, folder, _ = exported
    onnx.checker.check_model(str(folder / "after.onnx"), full_check=True)
    before, after = (onnx.load(folder / f"{name}.onnx") for name in ("before", "after"))
    assert operators(after) - operators(before) == {"Einsum": HEADS}
    assert operators(before) - operators(after) == {"MatMul": HEADS}
    for inputs in case.samples:
        results = [OnnxRunner(folder / f"{name}.onnx")(inputs) for name in ("before", "after")]
        assert worst_sqnr_db(*results) >= 100
    assert take_keys_as_rows(after) == 0


def test_the_htp_computes_the_same_bits(exported: tuple[Case, Path, str]) -> None:
    case, folder, soc = exported
    contexts = [compile_context(folder / f"{name}.onnx", folder, find_soc(soc)) for name in ("before", "after")]
    before, after = (Simulator(context.ctx_onnx) for context in contexts)
    for inputs in case.samples:
        assert torch.equal(before(inputs)["y"], after(inputs)["y"])


def test_keys_that_somebody_else_reads_stay() -> None:
    """A second reader of the transposed keys would get them in another shape."""
    nodes = [
        onnx.helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 2, 1, 3]),
        onnx.helper.make_node("MatMul", ["q", "kt"], ["y"]),
        onnx.helper.make_node("Relu", ["kt"], ["z"]),
    ]
    shapes = {"q": [1, 1, 3, 4], "k": [1, 4, 1, 5], "y": [1, 1, 3, 5], "z": [1, 1, 4, 5]}
    q, k, y, z = (onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items())
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [q, k], [y, z]))
    assert take_keys_as_rows(model) == 0
    assert [node.op_type for node in model.graph.node] == ["Transpose", "MatMul", "Relu"]
    del model.graph.node[2], model.graph.output[1]
    assert take_keys_as_rows(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Transpose", "Einsum"]
