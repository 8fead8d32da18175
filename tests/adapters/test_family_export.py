"""Every family's static graph in ONNX Runtime is the model in torch."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from model_families import FAMILIES, SD15_UNET, unet
from static_graphs import Case, simulate

from sdconvert.errors import PreconditionError
from sdconvert.export.aimet import to_onnx
from sdconvert.export.float32 import float32_agreement_db, write_float32
from sdconvert.export.operands import insert_operand_pairs
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.attention import SHAAttentionPatch

# The embedded PASD walks the whole road, and the golden ones their quantized export, in other tests.
QUICK = ("clip", "pixart_with_sizes")
SLOW = sorted(FAMILIES.keys() - set(QUICK))


def check(name: str, path: Path) -> Any:
    torch.manual_seed(2)
    family = FAMILIES[name]()
    inputs = family.adapter.pack(family.call)
    write_float32(family.adapter, inputs, path)
    assert float32_agreement_db(family.adapter, inputs, path) >= 90
    answer = family.call_model()
    outputs = dict(zip(family.adapter.output_names(len(answer)), answer, strict=True))
    assert worst_sqnr_db(outputs, OnnxRunner(path)(inputs)) >= 90
    graph = onnx.load(str(path)).graph
    # Sinusoids enter as inputs.
    assert not {node.op_type for node in graph.node} & {"Sin", "Cos"}
    return graph


@pytest.mark.parametrize("name", QUICK)
def test_onnx_runtime_computes_what_the_model_computes(name: str, tmp_path: Path) -> None:
    graph = check(name, tmp_path / "graph.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    assert types.pop("input_ids", onnx.TensorProto.INT32) == onnx.TensorProto.INT32
    assert set(types.values()) <= {onnx.TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_onnx_runtime_computes_what_the_model_computes_for_the_rest(name: str, tmp_path: Path) -> None:
    check(name, tmp_path / "graph.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd21_unet", "sdxl_unet", "controlnet"])
def test_the_quantized_graph_in_onnx_runtime_is_the_simulation(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]()
    adapter, inputs = family.adapter, family.adapter.pack(family.call)
    samples = [inputs, *(adapter.dummy_inputs(adapter.io_spec(family.size), seed) for seed in (1, 2))]
    simulation = simulate(Case(adapter, family.call, samples))
    model = to_onnx(simulation, inputs, opset=21)
    insert_operand_pairs(model, simulation.operand_encodings())
    onnx.save(model, str(tmp_path / "graph.onnx"))
    assert worst_sqnr_db(simulation(inputs), OnnxRunner(tmp_path / "graph.onnx")(inputs)) >= 50
    assert worst_sqnr_db(adapter.run(inputs), simulation(inputs)) >= 20


def test_x9_an_export_with_unfused_plugins_names_the_fused_model(tmp_path: Path) -> None:
    family = unet(SD15_UNET | {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1})
    SHAAttentionPatch.wrap_model("sha", family.adapter.model)
    with pytest.raises(
        PreconditionError, match=r"the fused model is missing: UNet2DConditionModel has \d+ plugins"
    ) as e:
        write_float32(family.adapter, family.adapter.dummy_inputs(), tmp_path / "graph.onnx")
    assert "fuse()" in e.value.hint
    assert list(tmp_path.iterdir()) == []
