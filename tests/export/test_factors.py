"""Attention's scale on the HTP: a multiplication on integers, and the same number."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers.models.attention_processor import Attention
from onnx import ModelProto, helper, numpy_helper
from static_graphs import Case, module_case

from sdconvert.export.factors import quantize_factors
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.attention import per_head
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.nodes import read_nodes
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

HEADS = 2


def on_htp(model: ModelProto, path: Path, case: Case, soc: str) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Nodes by type, and what the simulator computes."""
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    context = compile_context(path, path.parent, find_soc(soc))
    return read_nodes(context.bin), Simulator(context.ctx_onnx)(case.samples[0])


@pytest.mark.parametrize(("soc", "bits"), [("SM8650", 16), ("SM8450", 16), ("SM8450", 8)])  # v75 and v69
def test_the_scale_of_attention_is_computed_on_integers(tmp_path: Path, soc: str, bits: int) -> None:
    torch.manual_seed(0)
    case = module_case(per_head(Attention(query_dim=16, heads=HEADS, dim_head=8)), 1, 16, 1, 24)
    settings = load_settings({find_soc(soc).arch}).with_bitwidths(weight=8, activation=bits, per_channel=True)
    simulation = Simulation(case.adapter, case.samples[0], settings)
    simulation.calibrate(case.samples)
    model = to_onnx(simulation, case.samples[0], opset=21)
    before, floating = on_htp(model, tmp_path / "before.onnx", case, soc)
    assert quantize_factors(model) == HEADS
    after, integers = on_htp(model, tmp_path / "after.onnx", case, soc)
    for op in ("Dequantize", "Quantize"):
        assert before[op] - after[op] == HEADS
        assert after[op] == 1
    assert worst_sqnr_db(floating, integers) >= (60 if bits == 16 else 35)
    answers = [OnnxRunner(tmp_path / f"{name}.onnx")(case.samples[0])["y"] for name in ("before", "after")]
    assert torch.equal(*answers)
    assert quantize_factors(model) == 0


@pytest.mark.parametrize("factor", [np.float32(-0.5), np.float32(0), np.asarray([0.5, 2], np.float32)])
def test_other_factors_stay_as_they_are(factor: np.ndarray) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "scale", "zero_point"], ["x_dq"]),
        helper.make_node("Mul", ["x_dq", "factor"], ["y"], name="mul"),
    ]
    values = {"scale": np.float32(0.1), "zero_point": np.uint16(3), "factor": factor}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    x, y = helper.make_tensor_value_info("x", 4, [1, 2]), helper.make_tensor_value_info("y", 1, [1, 2])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants))
    before = model.SerializeToString()
    assert quantize_factors(model) == 0
    assert model.SerializeToString() == before
