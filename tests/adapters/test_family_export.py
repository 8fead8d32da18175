"""Every family's static graph in ONNX Runtime is the model in torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from model_families import FAMILIES, SD15_UNET, Family, clip, pixart, samples, unet
from static_graphs import Case, simulate

from sdconvert.errors import PreconditionError
from sdconvert.export.float32 import float32_agreement_db, write_float32
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.runner import OnnxRunner
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

# The embedded PASD walks the whole road, and the golden ones their quantized export, in other tests.
QUICK: dict[str, Callable[[], Family]] = {
    "sdxl_clip_with_projection": FAMILIES["sdxl_clip_with_projection"],
    "pixart_with_sizes": lambda: pixart(use_additional_conditions=True, num_layers=1),
}
SLOW = sorted(FAMILIES.keys() - {"sdxl_clip_with_projection"})


def check(make: Callable[[], Family], path: Path) -> Any:
    torch.manual_seed(2)
    family = make()
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
    graph = check(QUICK[name], tmp_path / "graph.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for name in ("input_ids", "eos_position"):
        assert types.pop(name, onnx.TensorProto.INT32) == onnx.TensorProto.INT32
    assert set(types.values()) <= {onnx.TensorProto.FLOAT}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_onnx_runtime_computes_what_the_model_computes_for_the_rest(name: str, tmp_path: Path) -> None:
    check(FAMILIES[name], tmp_path / "graph.onnx")


def quantized(family: Family, path: Path) -> tuple[Case, Simulation]:
    """A family's simulation, checked against fp32 and against its Q/DQ graph in ONNX Runtime, written to a path."""
    case = Case(family.adapter, family.call, samples(family))
    inputs = case.samples[0]
    simulation = simulate(case)
    model = to_onnx(simulation, inputs, opset=21)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    assert worst_sqnr_db(simulation(inputs), OnnxRunner(path)(inputs)) >= 50
    assert worst_sqnr_db(case.adapter.run(inputs), simulation(inputs)) >= 20
    return case, simulation


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd21_unet", "sdxl_unet", "controlnet"])
def test_the_quantized_graph_in_onnx_runtime_is_the_simulation(name: str, tmp_path: Path) -> None:
    quantized(FAMILIES[name](), tmp_path / "graph.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "at_least"),
    [
        ("clip", 60),
        ("clip_openai_activation", 50),
        ("sdxl_clip", 55),
        ("sdxl_clip_with_projection", 50),
        ("pixart", 60),
        ("pixart_with_sizes", 60),
    ],
)
def test_the_htp_computes_the_quantized_graph_whole(name: str, at_least: float, tmp_path: Path) -> None:
    """Token ids, lookups, masks and modulations included; figures of SM8650 in QAIRT 2.51's simulator."""
    require_htp_agrees(FAMILIES[name](), at_least, tmp_path)


def test_the_htp_computes_a_text_encoder_s_layer(tmp_path: Path) -> None:
    require_htp_agrees(clip(num_hidden_layers=1), 57, tmp_path)


def require_htp_agrees(family: Family, at_least: float, tmp_path: Path) -> None:
    case, simulation = quantized(family, tmp_path / "graph.onnx")
    context = compile_context(tmp_path / "graph.onnx", tmp_path, find_soc("SM8650"))
    assert context.cpu_nodes == 0
    run = Simulator(context.ctx_onnx)
    for inputs in case.samples:
        answer = run(inputs)
        assert worst_sqnr_db(simulation(inputs), answer) >= at_least
        assert worst_sqnr_db(case.adapter.run(inputs), answer) >= 30


def test_x9_an_export_with_unfused_plugins_names_the_fused_model(tmp_path: Path) -> None:
    family = unet(SD15_UNET | {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1})
    SHAAttentionPatch.wrap_model("sha", family.adapter.model)
    with pytest.raises(
        PreconditionError, match=r"the fused model is missing: UNet2DConditionModel has \d+ plugins"
    ) as e:
        write_float32(family.adapter, family.adapter.dummy_inputs(), tmp_path / "graph.onnx")
    assert "fuse()" in e.value.hint
    assert list(tmp_path.iterdir()) == []
